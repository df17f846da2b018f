"""Log-probabilities on the device against the oracle: the same tokens and ranks, logarithms within 2e-5."""

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.gpu.logprobs import ENTRY_SIZE, MAX_WIDTH, LogprobEntries, LogprobWorkspace, log_probabilities

POISON = -(2**31)


def run(
    logits: torch.Tensor, token_ids: list[int], rows: list[int], widths: list[int]
) -> tuple[LogprobEntries, np.ndarray]:
    device = logits.device
    workspace = LogprobWorkspace.empty(len(rows), logits.shape[1], device)
    workspace.tiles.fill_(torch.nan)
    workspace.keys.fill_(-1)
    entries = torch.full((len(rows), ENTRY_SIZE), POISON, dtype=torch.int32, device=device)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    log_probabilities(logits, ints(token_ids), torch.stack([ints(rows), ints(widths)]), entries, workspace)
    raw = entries.cpu().numpy()
    return LogprobEntries.of(raw), raw


def check(logits: torch.Tensor, token_ids: list[int], rows: list[int], widths: list[int]) -> None:
    """Exact tokens and ranks; nothing is written behind a row's width."""
    entries, raw = run(logits, token_ids, rows, widths)
    for index, (row, width) in enumerate(zip(rows, widths, strict=True)):
        one = logits[row : row + 1].cpu().float()
        expected_ids, expected, ranks = reference.log_probabilities(one, torch.tensor([token_ids[row]]), width - 1)
        assert entries.token_ids[index, :width].tolist() == expected_ids[0].tolist()
        assert entries.ranks[index] == ranks[0]
        actual = torch.from_numpy(entries.logprobs[index, :width].copy())
        torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=2e-5)
        assert (raw[index, width:MAX_WIDTH] == POISON).all()
        assert (raw[index, MAX_WIDTH + width : 2 * MAX_WIDTH] == POISON).all()


def make_logits(shape: str, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows lie further apart than they are long, with NaN between them."""
    logits = torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(8)) * 3
    match shape:
        case "equal":
            logits = torch.zeros_like(logits)
        case "few values":  # ties in and across tiles, -0 among them
            logits = (logits / 2).round()
        case "descending":  # all of the likeliest in one tile
            logits = torch.arange(vocab_size, 0, -1)[None].repeat(num_rows, 1) / 50
        case "far apart":
            logits = logits * 1e5
    padded = torch.full((num_rows, vocab_size + 24), torch.nan, dtype=dtype, device=device)
    padded[:, :vocab_size] = logits.to(device)
    return padded[:, :vocab_size]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["normal", "few values", "equal", "descending", "far apart"])
def test_tokens_logarithms_and_ranks_are_the_oracles(shape, dtype, device):
    logits = make_logits(shape, 5, 3100, dtype, device)
    likeliest, least = int(logits[3].argmax()), int(logits[1].argmin())
    check(logits, [0, least, 3099, likeliest, 1024], [3, 0, 4, 1], [MAX_WIDTH, 1, 6, 2])


@pytest.mark.parametrize("vocab_size", [1, 20, 1023, 1024, 1025])
def test_ragged_vocabularies(vocab_size, device):
    logits = make_logits("normal", 2, vocab_size, torch.bfloat16, device)
    width = min(MAX_WIDTH, vocab_size + 1)  # all tokens of a small vocabulary
    check(logits, [vocab_size - 1, 0], [0, 1], [width, width])


def test_a_row_without_a_token_is_left_alone_and_one_that_is_not_finite_ends(device):
    logits = make_logits("normal", 3, 2000, torch.float32, device)
    logits[0], logits[2, 5], logits[2, 1999] = torch.nan, torch.nan, torch.inf
    entries, raw = run(logits, [-2, 7, 9], [0, 1, 2], [5, 5, MAX_WIDTH])
    assert (raw[0] == POISON).all()
    assert entries.token_ids[1, 0] == 7
    assert np.isnan(entries.logprobs[2, 0])


def test_real_vocabularies(device):
    if device.type != "cuda":
        pytest.skip("too slow in the interpreter")
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ("normal", "few values"):
            logits = make_logits(shape, 64, 151_936, dtype, device)
            check(logits, [997 * row for row in range(64)], list(range(64)), [1 + row % MAX_WIDTH for row in range(64)])
