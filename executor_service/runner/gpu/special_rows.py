"""The rows of a step that differ from the others, as the device reads them: their logits are changed before sampling,
or reported after it.

What a sequence asks for is put on the device when it takes its slot: token masks, biases and, only where it has
penalties, counts of its tokens. A step then names rows and addresses. What a slot had is freed when it is released,
and may be: whatever PyTorch puts there is written behind the launches that read it, on the same stream.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.plan import Column, Mask, NewSequence, Plan, Sampling
from executor_service.runner.gpu.staging import to_device
from kernels.gpu.logit_changes import RECORD, RECORD_SIZE, make_counts


@dataclasses.dataclass(frozen=True)
class ReportedRows:
    """Rows whose log-probabilities are wanted."""

    rows: Column  # [num_reported]
    widths: Column  # [num_reported], tokens wanted, the sampled one included
    on_device: Tensor  # [2, num_reported] int32: the same


@dataclasses.dataclass(frozen=True)
class SpecialRows:
    """Of a step, or of all steps of a plan. They are launched before the next plan changes the slots."""

    records: Tensor | None  # [num_changed, RECORD_SIZE] int64, see change_logits; None: no row is changed
    reported: ReportedRows | None
    masks: Tensor | None = None  # [num_masked, ceil(vocab_size / 32)] int32, which records point to

    @classmethod
    def nobody(cls, device: torch.device) -> "SpecialRows":
        """Of a step without sequences, for launches that change and report nothing."""
        records = torch.zeros((1, RECORD_SIZE.value), dtype=torch.int64, device=device)
        rows = np.zeros(1, dtype=np.int32)
        return cls(records, ReportedRows(rows, rows, torch.zeros((2, 1), dtype=torch.int32, device=device)))


NOTHING_SPECIAL = SpecialRows(records=None, reported=None)


class SpecialSlots:
    """What the sequence of each slot asks for."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Every slot is empty."""
        self._vocab_size = vocab_size
        self._device = device
        self._records = np.zeros(num_slots, dtype=RECORD)
        self._always_changes = np.zeros(num_slots, dtype=np.bool_)  # beyond min_total_tokens
        self._num_logprobs = np.zeros(num_slots, dtype=np.int32)
        self._is_special = np.zeros(num_slots, dtype=np.bool_)
        self._tensors: list[tuple[Tensor, ...]] = [()] * num_slots  # which the records point to

    @staticmethod
    def most_bytes(num_slots: int, vocab_size: int) -> int:
        """What sequences may take on the device, if every one of them asks for everything but many biases."""
        return num_slots * (4 * vocab_size + 2 * 4 * _num_words(vocab_size))

    def admit(self, sequence: NewSequence) -> None:
        """Note what a sequence asks for; its slot is empty."""
        slot, sampling = sequence.slot, sequence.sampling
        self._num_logprobs[slot] = sampling.num_logprobs
        self._is_special[slot] = sampling.changes_logits or sampling.num_logprobs > 0
        if sampling.changes_logits:
            self._always_changes[slot] = dataclasses.replace(sampling, min_total_tokens=0).changes_logits
            self._tensors[slot] = self._fill_record(sequence)

    def release(self, slots: Column) -> None:
        """Forget what the sequences of `slots` asked for."""
        for slot in slots[self._is_special[slots]].tolist():
            self._records[slot] = np.zeros((), dtype=RECORD)
            self._always_changes[slot] = self._is_special[slot] = False
            self._num_logprobs[slot] = 0
            self._tensors[slot] = ()

    def may_be_in(self, plan: Plan) -> bool:
        """Whether any step of the plan may have special rows."""
        return len(plan.mask_slots) > 0 or bool(self._is_special.any())

    def find(self, slots: Column, num_tokens: NDArray[np.int64], plan: Plan) -> SpecialRows | None:
        """The special ones of the rows that a step samples from; None: there are none.

        slots: [num_rows]; num_tokens: [num_rows], what each sequence holds, or less.
        """
        masks = np.full(len(self._records), -1)
        masks[plan.mask_slots] = np.arange(len(plan.mask_slots))
        masks = masks[slots]  # [num_rows], of the plan's; -1: none
        is_changed = self._always_changes[slots] | (num_tokens < self._records["min_total"][slots]) | (masks >= 0)
        reported = self._reported(slots)
        if not is_changed.any():
            return None if reported is None else SpecialRows(None, reported)
        rows = np.flatnonzero(is_changed)
        records = self._records[slots[rows]]
        records["row"] = rows
        is_masked = masks[rows] >= 0
        step_masks = to_device(plan.masks[masks[rows][is_masked]], self._device) if is_masked.any() else None
        if step_masks is not None:
            offsets = 4 * step_masks.shape[1] * np.arange(len(step_masks))
            records["step_mask"][is_masked] = step_masks.data_ptr() + offsets
        words = records.view(np.int64).reshape(-1, RECORD_SIZE.value)
        return SpecialRows(to_device(words, self._device), reported, step_masks)

    def _reported(self, slots: Column) -> ReportedRows | None:
        widths = self._num_logprobs[slots]
        rows = np.flatnonzero(widths).astype(np.int32)
        if not len(rows):
            return None
        return ReportedRows(rows, widths[rows], to_device(np.stack((rows, widths[rows])), self._device))

    def _fill_record(self, sequence: NewSequence) -> tuple[Tensor, ...]:
        """Returns the tensors that the record of the sequence's slot points to."""
        sampling, record = sequence.sampling, self._records[sequence.slot : sequence.slot + 1]
        parts: dict[str, Column] = {}
        possible = _possible_tokens(sampling, self._vocab_size)
        if not possible.all():
            parts["mask"] = _to_words(possible)
        if sampling.min_total_tokens:
            possible[sequence.stop_token_ids] = possible[sampling.end_token_ids] = False
            parts["early_mask"] = _to_words(possible)
        if len(sampling.bias_token_ids):
            order = np.argsort(sampling.bias_token_ids)
            biases = sampling.bias_values.astype(np.float32)[order].view(np.int32)
            parts["biases"] = np.concatenate((sampling.bias_token_ids[order], biases))
        tensors = []
        if parts:
            tensors.append(to_device(np.concatenate(list(parts.values())), self._device))
            begin = 0
            for name, words in parts.items():
                record[name] = tensors[0][begin:].data_ptr()
                begin += len(words)
        if sampling.has_penalties:
            token_ids = to_device(sequence.token_ids.astype(np.int64), self._device)
            tensors.append(make_counts(token_ids, sequence.num_prompt_tokens, self._vocab_size))
            record["counts"] = tensors[-1].data_ptr()
        record["min_total"], record["num_biases"] = sampling.min_total_tokens, len(sampling.bias_token_ids)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
            record[name] = np.float32(getattr(sampling, name))
        return tuple(tensors)


def _num_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def _possible_tokens(sampling: Sampling, vocab_size: int) -> NDArray[np.bool_]:
    """[vocab_size]."""
    possible = np.full(vocab_size, not len(sampling.allowed_token_ids))
    possible[sampling.allowed_token_ids] = True
    possible[sampling.banned_token_ids] = False
    return possible


def _to_words(is_allowed: NDArray[np.bool_]) -> Mask:
    """[ceil(vocab_size / 32)]."""
    bits = np.zeros(_num_words(len(is_allowed)) * 32, dtype=np.bool_)
    bits[: len(is_allowed)] = is_allowed
    return np.packbits(bits, bitorder="little").view("<i4")
