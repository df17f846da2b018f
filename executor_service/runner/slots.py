"""The state of every running sequence, dense by slot, on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.plan import Column, Limits, NewSequence, Plan
from executor_service.runner.prompt_report import PromptReport
from executor_service.runner.runner import CONTINUES, LENGTH, STOPPED
from executor_service.runner.special_slots import SpecialSlot
from kernels.sampling import SamplingColumns

_NO_TOKEN = -1  # pads stop_token_ids


class SlotState:
    """Tensors over all slots; entries of empty slots mean nothing, but stay valid indices.

    Plans are checked by the Ledger first. Meant for use under torch.inference_mode.
    """

    def __init__(self, limits: Limits, max_blocks_per_sequence: int, device: torch.device) -> None:
        """Every slot is empty."""
        num_slots = limits.num_slots

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=device)

        self.device = device
        self.known_token_ids: list[Tensor | None] = [None] * num_slots  # each [num_known] int64
        self.last_token = zeros(torch.int64)  # [num_slots], the input of the next decode step
        self.context_len = zeros(torch.int64)  # [num_slots], positions with KV entries
        self.block_tables = torch.zeros((num_slots, max_blocks_per_sequence), dtype=torch.int32, device=device)
        self.max_total = zeros(torch.int64)  # [num_slots], tokens at which the sequence ends
        self.stop_token_ids = torch.full((num_slots, 1), _NO_TOKEN, dtype=torch.int64, device=device)  # [num_slots, k]
        self.sampling = SamplingColumns(
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int64),
            top_p=zeros(torch.float32),
            min_p=zeros(torch.float32),
            seed=zeros(torch.int64),
            choice_index=zeros(torch.int64),
        )
        self.special: dict[int, SpecialSlot] = {}  # of slots whose logits are changed or reported when they sample
        self.prompt_reports: dict[int, PromptReport] = {}  # of slots whose prompt's log-probabilities are reported
        self.done = zeros(torch.bool)  # [num_slots], samples nothing until it is released
        self.decoding = zeros(torch.bool)  # [num_slots], member of the decode set
        self.decode_slots = torch.empty(0, dtype=torch.int64, device=device)  # [batch], decoding and not done
        self.decode_sampling = self.sampling.select(self.decode_slots)  # [batch]
        self._decode_set_changed = False

    def apply(self, plan: Plan, append_columns: Column) -> None:
        """Apply all of the plan but its computations; append_columns: [num_appended], see Ledger.append_columns."""
        if len(plan.release_slots):
            self._release(plan.release_slots)
        if plan.new_sequences:
            self._admit(plan.new_sequences)
        if len(plan.append_slots):
            where = self._indices(plan.append_slots), self._indices(append_columns)
            self.block_tables[where] = self._tensor(plan.append_blocks, torch.int32)
        for slots, decodes in ((plan.join_slots, True), (plan.leave_slots, False)):
            if len(slots):
                self.decoding[self._indices(slots)] = decodes
                self._decode_set_changed = True

    def refresh_decode_slots(self) -> None:
        """Rebuild `decode_slots` and `decode_sampling`, where they changed."""
        if self._decode_set_changed:
            self.decode_slots = (self.decoding & ~self.done).nonzero().flatten()
            self.decode_sampling = self.sampling.select(self.decode_slots)
            self._decode_set_changed = False

    def prefilled(self, slots: Tensor, ends: Tensor) -> None:
        """Note that positions below `ends` have KV entries; both [num_chunks] int64."""
        self.context_len[slots] = ends

    def sampled(self, slots: Tensor, token_ids: Tensor) -> Tensor:
        """Append a token to each slot and return the finish reasons, CONTINUES, STOPPED or LENGTH: all [n] int64."""
        self.last_token[slots] = token_ids
        if self.special:
            self._note_sampled(slots.tolist(), token_ids.tolist())
        stops = (self.stop_token_ids[slots] == token_ids[:, None]).any(-1)
        is_full = self.context_len[slots] + 1 >= self.max_total[slots]
        reasons = torch.full_like(token_ids, CONTINUES).masked_fill_(is_full, LENGTH).masked_fill_(stops, STOPPED)
        self.end(slots[reasons != CONTINUES])
        return reasons

    def end(self, slots: Tensor) -> None:
        """Let `slots` ([n] int64) sample nothing until they are released."""
        if len(slots):
            self.done[slots] = True
            self._decode_set_changed = True

    def end_prompts(self, slots: list[int]) -> None:
        """Forget what was asked of the prompts of `slots`, which are computed to their end."""
        for slot in slots:
            self.prompt_reports.pop(slot, None)

    def _note_sampled(self, slots: list[int], token_ids: list[int]) -> None:
        for slot, token_id in zip(slots, token_ids, strict=True):
            special = self.special.get(slot)
            if special:
                special.append(token_id)
                if not special.is_special:
                    del self.special[slot]

    def _release(self, slots: Column) -> None:
        for slot in slots.tolist():
            self.known_token_ids[slot] = None
            self.special.pop(slot, None)
            self.prompt_reports.pop(slot, None)
        indices = self._indices(slots)
        self.decoding[indices] = False
        self.done[indices] = False
        self._decode_set_changed = True

    def _admit(self, sequences: Sequence[NewSequence]) -> None:
        slots = self._indices([sequence.slot for sequence in sequences])
        self.context_len[slots] = self._indices([sequence.num_cached_tokens for sequence in sequences])
        self.max_total[slots] = self._indices([sequence.max_total_tokens for sequence in sequences])
        for name in ("temperature", "top_k", "top_p", "min_p", "choice_index"):
            column = getattr(self.sampling, name)
            column[slots] = self._tensor([getattr(sequence.sampling, name) for sequence in sequences], column.dtype)
        seeds = np.array([sequence.sampling.seed for sequence in sequences], dtype=np.uint64).view(np.int64)
        self.sampling.seed[slots] = self._tensor(seeds, torch.int64)
        self._widen_stop_token_ids(max(len(sequence.stop_token_ids) for sequence in sequences))
        self.stop_token_ids[slots] = _NO_TOKEN
        for sequence in sequences:
            num_blocks, num_stops = len(sequence.block_ids), len(sequence.stop_token_ids)
            self.block_tables[sequence.slot, :num_blocks] = self._tensor(sequence.block_ids, torch.int32)
            self.stop_token_ids[sequence.slot, :num_stops] = self._indices(sequence.stop_token_ids)
            self.known_token_ids[sequence.slot] = self._indices(sequence.token_ids)
            self._note_special(sequence)

    def _note_special(self, sequence: NewSequence) -> None:
        sampling = sequence.sampling
        if sampling.changes_logits or sampling.num_logprobs:
            special = SpecialSlot(sequence)
            if special.is_special:
                self.special[sequence.slot] = special
        if sampling.num_prompt_logprobs:
            report = PromptReport(sampling.num_prompt_logprobs, sequence.num_prompt_tokens)
            self.prompt_reports[sequence.slot] = report

    def _widen_stop_token_ids(self, width: int) -> None:
        missing = width - self.stop_token_ids.shape[1]
        if missing > 0:
            self.stop_token_ids = torch.nn.functional.pad(self.stop_token_ids, (0, missing), value=_NO_TOKEN)

    def _indices(self, values: Column | Sequence[int]) -> Tensor:
        return self._tensor(values, torch.int64)

    def _tensor(self, values: NDArray[np.generic] | Sequence[float], dtype: torch.dtype) -> Tensor:
        if isinstance(values, np.ndarray):
            values = np.array(values)  # a plan's columns are read-only views of the message, which torch warns of
        return torch.as_tensor(values, dtype=dtype).to(self.device)
