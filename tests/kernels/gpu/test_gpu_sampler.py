"""The device's sampler against the oracle: the same tokens, up to near ties of the oracle's own scores."""

# pyright: reportCallIssue=false

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.gpu.gumbel import gumbel_noise_log2, noise_state
from kernels.gpu.sampler import Tuning, Workspace, sample
from kernels.gpu.slot_state import NUM_FIELDS, Admission, admit, pack, packed_size
from kernels.gpu.step_rings import FAILED

# The interpreter computes masked lanes too, where the smallest float and infinities overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCAB_SIZE = 1000
SMALL = Tuning(tile=512, tile_warps=2, chunk=512, row_warps=2)
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice_index": 0}


def make_state(rows: list[dict], device: torch.device) -> torch.Tensor:
    """Row i in slot len(rows) - 1 - i, so that rows and slots differ."""
    sequences = [
        Admission(
            slot=len(rows) - 1 - index, context_len=0, max_total=9, block_ids=np.zeros(1, np.int32),
            stop_token_ids=np.zeros(1, np.int32), **(DEFAULTS | row),
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    staging = np.zeros(packed_size(sequences), np.int32)
    pack(sequences, staging)
    state = torch.full((NUM_FIELDS.value, len(rows)), -(2**31), dtype=torch.int32, device=device)
    table = torch.zeros((len(rows), 1), dtype=torch.int32, device=device)
    for start in range(len(rows)):  # one by one, for the interpreter
        pack(sequences[start : start + 1], staging)
        admit(torch.from_numpy(staging.copy()).to(device), 1, state, table.clone(), table)
    return state


def row_slots_of(rows: list[dict], device: torch.device) -> torch.Tensor:
    return torch.arange(len(rows) - 1, -1, -1, dtype=torch.int32, device=device)


def run(
    logits: torch.Tensor, rows: list[dict], positions: list[int], tuning: Tuning | None, num_candidates: int,
    row_slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    device = logits.device
    workspace = Workspace.empty(
        len(rows), logits.shape[1], logits.dtype, device, tuning.tile if tuning else 1024, num_candidates
    )
    for scratch in (workspace.tiles, workspace.candidates):
        scratch.fill_(math.nan)
    token_ids, logprobs = sample(
        logits, row_slots_of(rows, device) if row_slots is None else row_slots, make_state(rows, device),
        torch.tensor(positions, dtype=torch.int32, device=device), workspace, tuning,
    )  # fmt: skip
    assert token_ids.dtype == torch.int32
    return token_ids.cpu().long(), logprobs.cpu()


def by_reference(logits: torch.Tensor, rows: list[dict], positions: list[int]) -> torch.Tensor:
    columns = [DEFAULTS | row for row in rows]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row[name] for row in columns], dtype=dtype)

    seeds = np.array([row["seed"] for row in columns], dtype=np.uint64).view(np.int64)
    return reference.sample(
        logits.cpu().float(), column("temperature", torch.float32), column("top_k", torch.int64),
        column("top_p", torch.float32), column("min_p", torch.float32), torch.from_numpy(seeds),
        column("choice_index", torch.int64), torch.tensor(positions),
    )  # fmt: skip


def check(
    logits: torch.Tensor, rows: list[dict], tuning: Tuning | None = SMALL, num_candidates: int = 64,
    max_near_ties: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Returns the tokens."""
    positions = [3 + 7 * index for index in range(len(rows))]
    token_ids, logprobs = run(logits, rows, positions, tuning, num_candidates)
    expected = by_reference(logits, rows, positions)
    others = (token_ids != expected).nonzero().flatten().tolist()
    for index in others:
        row = DEFAULTS | rows[index]
        tokens = torch.stack([token_ids[index], expected[index]])
        seed = torch.tensor(int(np.uint64(row["seed"]).view(np.int64)))
        noise = reference.gumbel_noise(seed, torch.tensor(row["choice_index"]), torch.tensor(positions[index]), tokens)
        scores = logits[index].cpu().double()[tokens] / row["temperature"] + noise
        assert abs(scores[0] - scores[1]) < 1e-4, f"{row}: {tokens.tolist()} with scores {scores.tolist()}"
    assert len(others) <= max_near_ties
    by_softmax = logits.cpu().double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), by_softmax, rtol=1e-5, atol=2e-5)
    return token_ids


def make_logits(shape: str, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows lie `vocab_size` rounded up apart, with NaN between them."""
    logits = torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(5)) * 3
    match shape:
        case "equal":
            logits = torch.zeros_like(logits)
        case "few values":  # ties everywhere, at every threshold; -0 among them
            logits = (logits / 2).round()
        case "peaked":
            logits[:, 700] = 18.0
        case "negative":
            logits = logits - 40
    padded = torch.full((num_rows, vocab_size + 24), math.nan, dtype=dtype, device=device)
    padded[:, :vocab_size] = logits.to(device)
    return padded[:, :vocab_size]


ROWS = {
    "greedy and free": [{"temperature": 0.0}, {}, {"temperature": 0.3}, {"temperature": 100.0, "seed": 9}],
    "cold": [{"temperature": 1e-30}, {"temperature": 1e-38, "top_k": 5}, {"temperature": 1e-4, "top_p": 0.9},
             {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5}],
    "top_k": [{"top_k": 1}, {"top_k": 2}, {"top_k": 7, "temperature": 3.0}, {"top_k": 300, "temperature": 9.0}],
    "top_k at the vocabulary": [{"top_k": 999}, {"top_k": 1000}, {"top_k": 2**32 - 1}, {"top_k": 2, "seed": 1}],
    "top_p": [{"top_p": 1e-9}, {"top_p": 0.25}, {"top_p": 0.9, "temperature": 0.7}, {"top_p": 0.999999}],
    "min_p": [{"min_p": 0.01}, {"min_p": 0.2, "temperature": 2.0}, {"min_p": 1.0}, {"min_p": 0.5, "seed": 77}],
    "all": [{"top_k": 50, "top_p": 0.8}, {"top_k": 3, "top_p": 0.99, "min_p": 0.1, "temperature": 5.0},
            {"top_p": 0.9, "min_p": 0.05, "temperature": 1.5}, {"top_k": 400, "min_p": 0.3, "temperature": 8.0}],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["normal", "few values"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tokens_are_the_oracles(rows, shape, dtype, device):
    check(make_logits(shape, len(rows), VOCAB_SIZE, dtype, device), rows)


@pytest.mark.parametrize("shape", ["equal", "peaked", "negative"])
@pytest.mark.parametrize("rows", [ROWS["top_k"], ROWS["top_p"], ROWS["all"]], ids=["top_k", "top_p", "all"])
def test_tokens_of_extreme_rows_are_the_oracles(rows, shape, device):
    check(make_logits(shape, len(rows), VOCAB_SIZE, torch.bfloat16, device), rows)


@pytest.mark.parametrize("num_candidates", [2, 64])
def test_no_filter_is_off_by_one_logit(num_candidates, device):
    """Neighbouring floats in a random order, so hot that each token kept is almost as likely as any other."""
    ladder = 8 + torch.randperm(128, generator=torch.Generator().manual_seed(3)) / 16
    logits = ladder.to(device, torch.bfloat16).repeat(4, 1)
    for cut in ({"top_k": 1}, {"top_k": 2}, {"top_k": 4}, {"top_p": 0.005}, {"top_p": 0.02}, {"top_p": 0.05}):
        rows = [cut | {"temperature": 50.0, "seed": seed} for seed in range(4)]
        check(logits, rows, Tuning(tile=128, tile_warps=2, chunk=128, row_warps=2), num_candidates)


@pytest.mark.parametrize("num_candidates", [1, 8, 1024])
def test_tokens_do_not_depend_on_the_room_for_candidates(num_candidates, device):
    rows = [*ROWS["top_p"][1:3], *ROWS["all"][:2]]
    check(make_logits("few values", len(rows), VOCAB_SIZE, torch.bfloat16, device), rows, SMALL, num_candidates)


@pytest.mark.parametrize("vocab_size", [1, 7, 512, 513])
def test_ragged_vocabularies(vocab_size, device):
    rows = [{"temperature": 0.0}, {"seed": 4}, {"top_k": 3, "temperature": 4.0}, {"top_p": 0.9, "temperature": 4.0}]
    check(make_logits("normal", len(rows), vocab_size, torch.bfloat16, device), rows)


def test_the_lowest_id_wins_a_tie_across_tiles(device):
    logits = torch.zeros((2, VOCAB_SIZE), device=device)
    logits[0, [300, 600, 999]] = 1.0
    logits[1, [600, 999]] = 1.0
    assert check(logits, [{"temperature": 0.0}] * 2).tolist() == [300, 600]


def test_every_part_of_the_key_moves_the_noise(device):
    rows = [
        {"seed": 5}, {"seed": 5 + 2**32}, {"seed": 5 + 2**63}, {"seed": 2**64 - 1}, {"seed": 5, "choice_index": 1},
    ]  # fmt: skip
    logits = torch.zeros((len(rows), VOCAB_SIZE), device=device)
    assert len(set(check(logits, rows).tolist())) == len(rows)
    token_ids, _ = run(logits, [{"seed": 5}] * 5, [0, 1, 2, 3, 2**31 - 1], SMALL, 64)
    assert token_ids.tolist() == by_reference(logits, [{"seed": 5}] * 5, [0, 1, 2, 3, 2**31 - 1]).tolist()
    assert len(set(token_ids.tolist())) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [{"temperature": 0.0}, {}, {"top_k": 4, "top_p": 0.5}], ids=["greedy", "free", "cut"])
def test_a_row_that_is_not_finite_fails_alone(row, value, device):
    logits = make_logits("normal", 3, VOCAB_SIZE, torch.bfloat16, device)
    clean, _ = run(logits, [row] * 3, [0, 1, 2], SMALL, 64)
    logits[1, 999] = value
    token_ids, logprobs = run(logits, [row] * 3, [0, 1, 2], SMALL, 64)
    assert token_ids.tolist() == [clean[0], FAILED.value, clean[2]]
    assert logprobs[1] == 0


def test_a_row_without_a_slot_is_not_read(device):
    logits = make_logits("normal", 3, VOCAB_SIZE, torch.bfloat16, device)
    logits[1] = math.nan
    row_slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    token_ids, logprobs = run(logits, [{}] * 3, [0, 1, 2], SMALL, 64, row_slots)
    expected = by_reference(logits.nan_to_num(), [{}] * 3, [0, 1, 2])
    assert token_ids.tolist() == [expected[0], -1, expected[2]]
    assert logprobs[1] == 0


@triton.jit
def _noise_kernel(state, out, BLOCK: tl.constexpr):
    token_ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + token_ids, gumbel_noise_log2(noise_state(state, 1, 0, tl.full((), 11, tl.int32)), token_ids))


def test_noise_is_the_oracles(device):
    state = make_state([{"seed": 2**63 + 12345, "choice_index": 2}], device)
    num_tokens = 2**17
    noise = torch.empty(num_tokens, device=device)
    _noise_kernel[(8,)](state, noise, BLOCK=num_tokens // 8, num_warps=8)
    seed, choice_index, position = (torch.tensor(value) for value in (-(2**63) + 12345, 2, 11))
    expected = reference.gumbel_noise(seed, choice_index, position, torch.arange(num_tokens))
    actual = noise.cpu().double() * math.log(2) - math.log(math.log(2))
    assert expected.max() > 10
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_vocabularies(num_rows, dtype, device):
    if device.type != "cuda":
        pytest.skip("too slow in the interpreter")
    rows = [
        row | {"seed": index}
        for index, row in enumerate(itertools.chain(*ROWS.values(), *ROWS.values(), *ROWS.values()))
    ]
    rows = rows[:num_rows]
    logits = make_logits("normal", num_rows, 151_936, dtype, device)
    check(logits, rows, None, 4096, max_near_ties=2)
    positions = list(range(num_rows))
    first = run(logits, rows, positions, None, 4096)
    for _ in range(20):
        again = run(logits, rows, positions, None, 4096)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
