"""The rows of a step that differ from the others: their logits are changed before sampling, or reported after it.

Where the vocabulary is cut over ranks, every rank gathers the whole logits of these rows, and of no others.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from executor_service.plan import Column, Mask
from executor_service.runner.runner import StepLogprobs
from executor_service.runner.special_slots import SpecialSlot
from kernels.logits import keep_masked, log_probabilities
from kernels.sampling import SamplingColumns, VocabularyShard, gather_rows, sample


@dataclasses.dataclass(frozen=True)
class SpecialRow:
    """A row and what is special about it."""

    row: int
    slot: SpecialSlot | None  # None: the mask alone
    mask: Mask | None

    @property
    def changes_logits(self) -> bool:
        """Whether it is not sampled from the model's own logits."""
        return self.mask is not None or (self.slot is not None and self.slot.changes_logits)

    @property
    def num_logprobs(self) -> int:
        """Tokens that are reported of it."""
        return self.slot.num_logprobs if self.slot else 0

    def process(self, logits: Tensor) -> bool:
        """Change its logits in place, [vocab_size] float32; returns whether a token can be sampled from them."""
        if self.slot:
            self.slot.process(logits, self.mask)
        elif self.mask is not None:
            keep_masked(logits, self.mask)
        return bool(logits.amax().isfinite())


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was sampled."""

    token_ids: Tensor  # [num_rows] int64; of a failed row: any
    logprobs: StepLogprobs | None  # of the other rows; None: nobody asked
    failed_rows: list[int]  # no token could be sampled from what was left of their logits


def find_special_rows(slots: Column, special_slots: dict[int, SpecialSlot], masks: dict[int, Mask]) -> list[SpecialRow]:
    """Those of a step that samples for `slots`, [num_rows], in this order."""
    return [
        SpecialRow(row, special_slots.get(slot), masks.get(slot))
        for row, slot in enumerate(slots.tolist())
        if slot in special_slots or slot in masks
    ]


def sample_with_special_rows(
    special: list[SpecialRow], logits: Tensor, columns: SamplingColumns, positions: Tensor, shard: VocabularyShard
) -> Choice:
    """Choose one token a row as `kernels.sampling.sample` does, and report what was asked for; there is a special row.

    logits: [num_rows, size of the shard] float32, finite; some of it is overwritten.
    """
    rows = [row.row for row in special]
    places = rows if shard.is_whole else range(len(rows))  # of the special rows in `whole`
    whole = logits if shard.is_whole else gather_rows(logits[rows], shard)
    reported = [(row, place) for row, place in zip(special, places, strict=True) if row.num_logprobs]
    raw = whole[[place for _, place in reported]]

    failed_rows = []
    for row, place in zip(special, places, strict=True):
        if row.changes_logits and not row.process(whole[place]):
            failed_rows.append(row.row)
            whole[place] = 0  # whatever is sampled from it

    token_ids = sample(logits, columns, positions, shard)
    if not shard.is_whole:
        token_ids[rows] = sample(whole, columns.select(torch.tensor(rows)), positions[rows])
    return Choice(token_ids, _report(raw, [row for row, _ in reported], token_ids, failed_rows), failed_rows)


def _report(logits: Tensor, rows: list[SpecialRow], token_ids: Tensor, failed_rows: list[int]) -> StepLogprobs | None:
    """logits: [number of rows, vocab_size] float32, the model's own; token_ids: [num_rows] int64, of all rows."""
    if not rows:
        return None
    most = max(row.num_logprobs for row in rows)
    own = token_ids[[row.row for row in rows]]
    columns = log_probabilities(logits, own, most - 1)
    tokens, logprobs, ranks = (column.numpy() for column in columns)
    left = [index for index, row in enumerate(rows) if row.row not in failed_rows]
    is_wanted = np.arange(most) < np.array([rows[index].num_logprobs for index in left])[:, None]
    return StepLogprobs(
        token_ids=tokens[left][is_wanted].astype(np.int32),
        logprobs=logprobs[left][is_wanted],
        ranks=ranks[left].astype(np.int32),
    )
