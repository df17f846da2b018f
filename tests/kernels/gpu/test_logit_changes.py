"""Changed logits on the device against the oracle: the very bits in float32, rounded once in bfloat16."""

import dataclasses
from collections.abc import Collection

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.gpu.logit_changes import BANNED, IN_PROMPT, RECORD, RECORD_SIZE, change_logits, make_counts, settle_tokens
from kernels.gpu.step_rings import NONE_LEFT

VOCAB_SIZE = 5003  # three tiles, the last one ragged, and a last mask word of 11 bits
PROMPT = [3, 3, 4999, 70, 2047, 2048]
GENERATED = [70, 5, 5, 5, 5002, 0]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one sequence asks for."""

    prompt: list[int] = dataclasses.field(default_factory=lambda: PROMPT)
    generated: list[int] = dataclasses.field(default_factory=lambda: GENERATED)
    mask: set[int] | None = None  # as it comes with a plan
    allowed: frozenset[int] | set[int] = frozenset()
    banned: frozenset[int] | set[int] = frozenset()
    ends: frozenset[int] | set[int] = frozenset()
    min_total: int = 0
    biases: dict[int, float] = dataclasses.field(default_factory=dict)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def tokens(self) -> torch.Tensor:
        return torch.tensor(self.prompt + self.generated)


EVERYTHING = Wanted(
    mask=set(range(0, VOCAB_SIZE, 2)) | {5, 5001}, banned={4, 4998}, biases={5: -3.25, 70: 1.7, 2046: 9.0, 4: 50.0},
    repetition=1.3, frequency=0.3, presence=-0.7,
)  # fmt: skip
CASES = {
    "nothing": Wanted(),
    "allowed": Wanted(allowed={0, 31, 32, 2047, 2048, 4100, 5002}),
    "banned": Wanted(banned={0, 31, 32, 2047, 2048, 4100, 5002}),
    "allowed and banned": Wanted(allowed={1, 2, 4999}, banned={2}),
    "too short for an end": Wanted(ends={7, 4999}, min_total=13, banned={8}),
    "long enough for an end": Wanted(ends={7, 4999}, min_total=12, banned={8}),
    "a plan's mask": Wanted(mask={9, 1023, 5002}),
    "a plan's mask and a request's": Wanted(mask={9, 1023, 5002}, banned={9}, ends={5002}, min_total=99),
    "one bias": Wanted(biases={2048: -0.5}),
    "biases in one tile": Wanted(biases={token: token / 64 - 20 for token in range(2048, 4096, 3)}),
    "a thousand biases": Wanted(biases={token: 5 - token / 500 for token in range(0, VOCAB_SIZE, 5)}),
    "a bias on a banned token": Wanted(banned={5}, biases={5: 100.0}),
    "repetition": Wanted(repetition=1.37),
    "repetition below 1": Wanted(repetition=0.6),
    "frequency": Wanted(frequency=0.31),
    "presence": Wanted(presence=0.73),
    "rewards": Wanted(frequency=-0.31, presence=-1.9),
    "penalties of a prompt alone": Wanted(generated=[], repetition=2.0, frequency=1.0, presence=1.0),
    "everything": EVERYTHING,
}


def make_logits(num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows lie further apart than they are long, with NaN between them."""
    logits = torch.randn((num_rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(2)) * 6
    logits[:, ::11] = 0
    padded = torch.full((num_rows, VOCAB_SIZE + 13), torch.nan, dtype=dtype, device=device)
    padded[:, :VOCAB_SIZE] = logits.to(device)
    return padded[:, :VOCAB_SIZE]


def words(allowed: Collection[int]) -> np.ndarray:
    bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class Records:
    """Records of rows, and the tensors that they point to."""

    def __init__(self, rows: list[int], wanted: list[Wanted], device: torch.device) -> None:
        self._device = device
        self._tensors: list[torch.Tensor] = []
        self.counts: list[torch.Tensor | None] = []
        records = np.concatenate([self._record(row, one) for row, one in zip(rows, wanted, strict=True)])
        self.tensor = torch.from_numpy(records.view(np.int64).reshape(-1, RECORD_SIZE.value)).to(device)

    def _record(self, row: int, wanted: Wanted) -> np.ndarray:
        record = np.zeros(1, RECORD)
        everything = set(range(VOCAB_SIZE))
        possible = (wanted.allowed or everything) - wanted.banned
        counts = None
        if wanted.repetition != 1 or wanted.frequency or wanted.presence:
            counts = make_counts(wanted.tokens.to(self._device), len(wanted.prompt), VOCAB_SIZE)
            record["counts"] = counts.data_ptr()
        self.counts.append(counts)
        if possible != everything:
            record["mask"] = self._keep(words(possible))
        if wanted.min_total:
            record["early_mask"] = self._keep(words(possible - wanted.ends))
        if wanted.mask is not None:
            record["step_mask"] = self._keep(words(wanted.mask))
        if wanted.biases:
            ids = sorted(wanted.biases)
            values = np.array([wanted.biases[token] for token in ids], np.float32).view(np.int32)
            record["biases"] = self._keep(np.stack([np.array(ids, np.int32), values]))
        record["row"], record["min_total"], record["num_biases"] = row, wanted.min_total, len(wanted.biases)
        for name in ("repetition", "frequency", "presence"):
            record[f"{name}_penalty"] = getattr(wanted, name)
        return record

    def _keep(self, values: np.ndarray) -> int:
        self._tensors.append(torch.from_numpy(values).to(self._device))
        return self._tensors[-1].data_ptr()


def change(logits: torch.Tensor, rows: list[int], wanted: list[Wanted], row_slots: list[int]) -> torch.Tensor:
    """Of a copy of the logits; everything around them stays as it was."""
    device = logits.device
    storage = torch.full_like(logits[:, :1].expand(-1, logits.stride(0)), torch.nan)
    changed = storage[:, :VOCAB_SIZE].copy_(logits)
    lengths = torch.full((len(logits),), 99, dtype=torch.int32, device=device)
    for row, one in zip(rows, wanted, strict=True):
        lengths[row] = len(one.tokens)
    records = Records(rows, wanted, device)
    change_logits(changed, torch.tensor(row_slots, dtype=torch.int32, device=device), lengths, records.tensor)
    assert storage[:, VOCAB_SIZE:].isnan().all()
    return changed


def by_reference(logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """[vocab_size], with BANNED for minus infinity, in the dtype of logits."""
    mask = None if wanted.mask is None else torch.from_numpy(np.isin(np.arange(VOCAB_SIZE), list(wanted.mask)))
    processed = reference.process_logits(
        logits.cpu().float(), wanted.tokens, len(wanted.prompt), mask=mask, allowed_token_ids=wanted.allowed,
        banned_token_ids=wanted.banned, end_token_ids=wanted.ends, min_total_tokens=wanted.min_total,
        logit_bias=wanted.biases, repetition_penalty=wanted.repetition, frequency_penalty=wanted.frequency,
        presence_penalty=wanted.presence,
    )  # fmt: skip
    return processed.masked_fill(processed == -torch.inf, BANNED.value).to(logits.dtype)


def assert_changed(changed: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """The same bits; the interpreter cuts to bfloat16 where a GPU rounds."""
    rtol = 2**-7 if changed.device.type == "cpu" and changed.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(changed.cpu(), expected, rtol=rtol, atol=0, msg=lambda message: f"{name}: {message}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_changed_logits_are_the_oracles(dtype, device):
    wanted = list(CASES.values())
    logits = make_logits(len(wanted) + 2, dtype, device)
    rows = [len(wanted) - index for index in range(len(wanted))]  # the first and the last row are nobody's
    changed = change(logits, rows, wanted, [7] * len(logits))
    for row, (name, one) in zip(rows, CASES.items(), strict=True):
        assert_changed(changed[row], by_reference(logits[row], one), name)
    for row in (0, len(logits) - 1):
        assert torch.equal(changed[row], logits[row])
    assert not torch.equal(changed[rows[-1]], logits[rows[-1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_stays_so_that_its_row_fails(value, dtype, device):
    logits = make_logits(2, dtype, device)
    logits[0, 5], logits[1, 4] = value, value
    changed = change(logits, [0, 1], [EVERYTHING, EVERYTHING], [0, 1])
    for row, place in ((0, 5), (1, 4)):  # one of them is banned
        assert torch.equal(changed[row, place], logits[row, place]) or changed[row, place].isnan()
        assert not changed[row, place].isfinite()
        assert changed[row].isfinite().sum() == VOCAB_SIZE - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_finite_row_stays_finite(dtype, device):
    logits = torch.full((1, VOCAB_SIZE), torch.finfo(dtype).max, dtype=dtype, device=device)
    changed = change(logits, [0], [Wanted(repetition=0.01, biases={5: 100.0})], [0])
    assert changed.isfinite().all()


def test_a_row_without_a_slot_stays_as_it_is(device):
    logits = make_logits(3, torch.bfloat16, device)
    changed = change(logits, [0, 1, 2], [EVERYTHING] * 3, [4, -1, 0])
    assert torch.equal(changed[1], logits[1])
    for row in (0, 2):
        assert_changed(changed[row], by_reference(logits[row], EVERYTHING))


def test_counts_tell_the_prompt_from_what_was_generated(device):
    counts = make_counts(torch.tensor(PROMPT + GENERATED, device=device), len(PROMPT), VOCAB_SIZE).cpu()
    expected = dict.fromkeys(PROMPT, IN_PROMPT.value)
    for token in GENERATED:
        expected[token] = expected.get(token, 0) + 1
    assert {token: int(counts[token]) for token in counts.nonzero().flatten().tolist()} == expected


def test_sampled_tokens_are_counted_where_there_are_counts(device):
    """So the next change sees them, as the oracle does with a longer sequence."""
    wanted = [
        dataclasses.replace(EVERYTHING, generated=[]), EVERYTHING, Wanted(banned={3}), EVERYTHING, EVERYTHING,
    ]  # fmt: skip
    rows, sampled = [4, 0, 1, 5, 2], [5002, 5, -1, 7, 3, -2]
    records = Records(rows, wanted, device)
    token_ids = torch.tensor(sampled, dtype=torch.int32, device=device)
    for _ in range(2):
        settle_tokens(token_ids, make_logits(6, torch.bfloat16, device), records.tensor)
    assert token_ids.tolist() == sampled
    for row, one, counts in zip(rows, wanted, records.counts, strict=True):
        if counts is not None:
            longer = torch.cat([one.tokens, torch.tensor([sampled[row]] * 2)]) if sampled[row] >= 0 else one.tokens
            assert torch.equal(counts.cpu(), make_counts(longer, len(one.prompt), VOCAB_SIZE))
    assert records.counts[2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_which_nothing_is_left_has_no_token(dtype, device):
    wanted = [Wanted(mask={9}, banned={9}, presence=1.0), Wanted(mask={9}, banned={8}, biases={9: -100.0})]
    logits = change(make_logits(3, dtype, device), [2, 0], wanted, [0, 1, 2])
    records = Records([2, 0], wanted, device)
    token_ids = torch.tensor([9, 3, 9], dtype=torch.int32, device=device)
    settle_tokens(token_ids, logits, records.tensor)
    assert token_ids.tolist() == [9, 3, NONE_LEFT.value]
    counts = records.counts[0]
    assert counts is not None
    assert counts[9] == 0
