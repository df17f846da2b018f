"""Rows of a prefill that tell log-probabilities of the prompt's own tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from executor_service.plan import Column, Plan
from executor_service.runner.gpu.staging import to_device
from executor_service.runner.prompt_report import PromptReport
from executor_service.runner.runner import PromptLogprobs
from kernels.gpu.logprobs import LogprobEntries


@dataclasses.dataclass(frozen=True)
class PromptPart:
    """Consecutive rows: positions of one prompt that have a next token of the prompt."""

    slot: int
    start: int  # position of the first of these next tokens
    count: int
    report: PromptReport


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Of one prefill."""

    parts: list[PromptPart]
    rows_at_once: int  # of which the logits are in memory
    on_device: Tensor  # [4, num_rows] int32: row in the prefill, place among the rows at once, width, next token

    @classmethod
    def nobody(cls, num_rows: int, rows_at_once: int, device: torch.device) -> "PromptRows":
        """Of a step without sequences: as much memory as any."""
        columns = torch.zeros((4, num_rows), dtype=torch.int32, device=device)
        columns[3] = -1
        return cls([], rows_at_once, columns)

    def read(self, entries: Tensor) -> list[PromptLogprobs]:
        """What log_probabilities wrote, by part; entries: [num_rows, ENTRY_SIZE].

        Called for each prefill in order. A prompt of which a logit was not finite is marked as failed, and nothing is
        told of it from there on.
        """
        results, end = [], 0
        for part in self.parts:
            begin, end = end, end + part.count
            columns, width = LogprobEntries.of(entries[begin:end].numpy()), part.report.num_logprobs
            part.report.has_failed |= not np.isfinite(columns.logprobs[:, 0]).all()
            if not part.report.has_failed:
                token_ids, logprobs = columns.token_ids[:, :width], columns.logprobs[:, :width]
                flat = token_ids.flatten(), logprobs.flatten(), columns.ranks.copy()
                results.append(PromptLogprobs(part.slot, part.start, *flat))
        return results


def find_prompt_rows(
    plan: Plan, reports: dict[int, PromptReport], known: Sequence[Column | None], max_rows: int, device: torch.device
) -> PromptRows | None:
    """Of the plan's chunks; None: there are none.

    reports: by slot; known: by slot, the tokens that each sequence came with; max_rows: of which logits fit in memory.
    """
    parts: list[PromptPart] = []
    columns: list[Column] = []
    first_rows = plan.prefill_counts.cumsum() - plan.prefill_counts
    chunks = plan.prefill_slots, plan.prefill_starts, plan.prefill_counts, first_rows
    for slot, start, count, first_row in zip(*(column.tolist() for column in chunks), strict=True):
        report, token_ids = reports.get(slot), known[slot]
        assert token_ids is not None, "the ledger admits chunks of occupied slots only"
        count = min(count, report.num_prompt_tokens - 1 - start) if report else 0
        if report and count > 0:
            parts.append(PromptPart(slot, start + 1, count, report))
            rows = np.arange(first_row, first_row + count, dtype=np.int32)
            next_tokens = token_ids[start + 1 : start + 1 + count]
            columns.append(np.stack((rows, rows, np.full_like(rows, report.num_logprobs), next_tokens)))
    if not parts:
        return None
    table = np.concatenate(columns, axis=1)
    table[1] = np.arange(table.shape[1]) % max_rows
    return PromptRows(parts, max_rows, to_device(table, device))
