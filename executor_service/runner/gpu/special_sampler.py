"""Sampling in a step with special rows: what stands between the model's logits and the end of the step, launch by
launch. The common step's graph is captured once more without its sampler, and leaves its logits in buffers here.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.special_rows import SpecialRows
from executor_service.runner.gpu.staging import to_host
from kernels.gpu.logit_changes import change_logits, settle_tokens
from kernels.gpu.logprobs import ENTRY_SIZE, LogprobWorkspace, log_probabilities
from kernels.gpu.sampler import Workspace, sample


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Of the logits."""

    size: int  # of all ranks
    own_size: int  # token ids whose logits this rank computes
    gather: Callable[[Tensor], Tensor]  # [n, own_size] on every rank -> [n, size]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What was sampled from each row of a step."""

    token_ids: Tensor  # [num_rows] int32, as `sample` says; NONE_LEFT where a changed row had no token left
    logprobs: Tensor  # [num_rows] float32, as `sample` says
    entries: Tensor | None  # [num_reported, ENTRY_SIZE] int32 in pinned memory, see log_probabilities


class SpecialSampler:
    """Buffers for the largest step, and what is launched over them. Every rank samples from all logits."""

    def __init__(self, max_rows: int, vocabulary: Vocabulary, workspace: Workspace, state: Tensor) -> None:
        """workspace: of logits of all tokens, for max_rows; state: of the slots, see `kernels.gpu.slot_state`."""

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=state.device)

        self._vocabulary = vocabulary
        self._workspace = workspace
        self._state = state
        dtype = workspace.candidates.dtype
        self._logits = empty(max_rows, vocabulary.size, dtype=dtype)
        self._raw_logits = empty(max_rows, vocabulary.size, dtype=dtype)
        is_whole = vocabulary.own_size == vocabulary.size
        self._own_logits = self._logits if is_whole else empty(max_rows, vocabulary.own_size, dtype=dtype)
        self.row_slots = empty(max_rows, dtype=torch.int32)
        self._context_lens = empty(max_rows, dtype=torch.int32)
        self._logprobs = LogprobWorkspace.empty(max_rows, vocabulary.size, state.device)

    def keep(self, logits: Tensor, row_slots: Tensor, context_lens: Tensor) -> None:
        """Leave what a step samples from to `sample`: [n, own_size], [n] int32 and [n] int32."""
        n = len(logits)
        self._own_logits[:n].copy_(logits)
        self.row_slots[:n].copy_(row_slots)
        self._context_lens[:n].copy_(context_lens)

    def sample(self, num_rows: int, special: SpecialRows) -> Chosen:
        """Choose a token for each of the rows that were kept last."""
        logits, row_slots = self._logits[:num_rows], self.row_slots[:num_rows]
        context_lens = self._context_lens[:num_rows]
        if self._own_logits is not self._logits:
            logits.copy_(self._vocabulary.gather(self._own_logits[:num_rows]))
        raw_logits = logits
        if special.records is not None:
            if special.reported:
                raw_logits = self._raw_logits[:num_rows].copy_(logits)
            change_logits(logits, row_slots, context_lens, special.records)
        token_ids, logprobs = sample(logits, row_slots, self._state, context_lens, self._workspace)
        if special.records is not None:
            settle_tokens(token_ids, logits, special.records)
        entries = None
        if special.reported:
            rows = special.reported.on_device
            written = torch.empty((rows.shape[1], ENTRY_SIZE), dtype=torch.int32, device=logits.device)
            log_probabilities(raw_logits, token_ids, rows, written, self._logprobs)
            entries = to_host(written)
        return Chosen(token_ids, logprobs, entries)

    def report_prompts(self, prompts: PromptRows, compute_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Log-probabilities of prompts' tokens, a slice at a time: [num_rows, ENTRY_SIZE] int32 in pinned memory.

        compute_logits: rows of the prefill, [n] int32, to this rank's logits, [n, own_size].
        """
        rows, places, widths, token_ids = prompts.on_device
        entries = torch.empty((len(rows), ENTRY_SIZE), dtype=torch.int32, device=rows.device)
        for begin in range(0, len(rows), prompts.rows_at_once):
            now = slice(begin, begin + prompts.rows_at_once)
            logits = self._vocabulary.gather(compute_logits(rows[now]))
            columns = torch.stack((places[now], widths[now]))
            log_probabilities(logits, token_ids[now], columns, entries[now], self._logprobs)
        return to_host(entries)
