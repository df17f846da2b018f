"""A step that the device works on, and what is read of it when it has ended."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.plan import Column
from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.rings import StepRings
from executor_service.runner.gpu.special_rows import ReportedRows
from executor_service.runner.prompt_report import PromptReport
from executor_service.runner.runner import PromptLogprobs, StepLogprobs, StepOutput
from kernels.gpu.logprobs import LogprobEntries
from kernels.gpu.step_rings import NONE_LEFT, REASON_CONTINUES, REASON_FAILED


@dataclasses.dataclass(frozen=True)
class Reports:
    """Log-probabilities on their way to pinned memory."""

    reported: ReportedRows | None
    entries: Tensor | None  # [num_reported, ENTRY_SIZE] int32
    prompts: PromptRows | None = None
    prompt_entries: Tensor | None = None  # [number of the prompts' rows, ENTRY_SIZE] int32
    prompt_reports: Mapping[int, PromptReport] = dataclasses.field(default_factory=dict)  # by row that samples

    def fail(self, is_failed: NDArray[np.bool_]) -> None:
        """Mark the rows of failed prompts; is_failed: [num_rows]. Called behind read_prompts."""
        for row, report in self.prompt_reports.items():
            is_failed[row] |= report.has_failed

    def read_prompts(self) -> list[PromptLogprobs]:
        """Called once for each prefill, in order."""
        if self.prompts is None or self.prompt_entries is None:
            return []
        return self.prompts.read(self.prompt_entries)

    def read(self, is_sampled: NDArray[np.bool_]) -> StepLogprobs | None:
        """Of the rows that sampled a token and asked; is_sampled: [num_rows]."""
        if self.reported is None or self.entries is None:
            return None
        is_there = is_sampled[self.reported.rows]
        columns, widths = LogprobEntries.of(self.entries.numpy()[is_there]), self.reported.widths[is_there]
        is_wanted = np.arange(columns.token_ids.shape[1]) < widths[:, None]
        return StepLogprobs(columns.token_ids[is_wanted], columns.logprobs[is_wanted], columns.ranks.copy())


@dataclasses.dataclass(frozen=True)
class LaunchedStep:
    """See Pending."""

    step_id: int
    partial: bool
    rows: Column  # [num_rows], their slots
    step: int  # as the rings count
    event: torch.cuda.Event
    rings: StepRings
    reports: Reports | None  # None: of a step without special rows

    def wait(self) -> StepOutput:
        """See Pending."""
        try:
            self.event.synchronize()
            result = self.rings.read_result(self.step, len(self.rows))
        finally:  # or the runner would wait for the entry for ever
            self.rings.release()
        prompt_logprobs = self.reports.read_prompts() if self.reports else []
        is_failed = result.reasons == REASON_FAILED
        if self.reports:
            self.reports.fail(is_failed)
        sampled = (result.reasons >= REASON_CONTINUES) & ~is_failed
        return StepOutput(
            step_id=self.step_id,
            partial=self.partial,
            slots=self.rows[sampled],
            token_ids=result.token_ids[sampled],
            finish_reasons=result.reasons[sampled],
            slot_errors=[(slot, _error(token)) for slot, token in _pairs(self.rows, result.token_ids, is_failed)],
            device_time_ns=result.device_time_ns,
            logprobs=self.reports.read(sampled) if self.reports else None,
            prompt_logprobs=prompt_logprobs,
        )


def _pairs(slots: Column, token_ids: Column, is_failed: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return list(zip(slots[is_failed].tolist(), token_ids[is_failed].tolist(), strict=True))


def _error(token_id: int) -> str:
    return "no token can be sampled" if token_id == NONE_LEFT.value else "non-finite logits"
