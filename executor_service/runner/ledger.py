"""What the host knows of every slot, and the checks of a plan against it.

The ledger counts as if no sequence ever met a stop token until it is told, so no check waits for the device. That
only makes it demand blocks for slots that are done, and the core, which learns of a stop later still, appends those.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from executor_service.plan import NO_COLUMN, Column, InvalidPlan, Limits, Plan


@dataclasses.dataclass(frozen=True)
class Ledger:
    """One entry a slot; an empty slot has no known tokens."""

    limits: Limits
    num_known: NDArray[np.int64]  # [num_slots], tokens it came with
    num_computed: NDArray[np.int64]  # [num_slots], positions with KV entries
    num_blocks: NDArray[np.int64]  # [num_slots], length of the block table
    max_total: NDArray[np.int64]  # [num_slots], tokens at which the sequence ends
    decoding: NDArray[np.bool_]  # [num_slots], member of the decode set

    @classmethod
    def empty(cls, limits: Limits) -> "Ledger":
        """Every slot is empty."""
        zeros = np.zeros(limits.num_slots, dtype=np.int64)
        return cls(limits, zeros, zeros, zeros, zeros, zeros.astype(np.bool_))

    @property
    def max_blocks_per_sequence(self) -> int:
        """Length of a block table that holds the longest sequence."""
        return -(-self.limits.max_model_len // self.limits.block_size)

    def after(self, plan: Plan) -> "Ledger":
        """The ledger when `plan` has run; this one stays as it is.

        Raises: InvalidPlan, where the plan does not fit the slots.
        """
        ledger = Ledger(
            self.limits,
            self.num_known.copy(),
            self.num_computed.copy(),
            self.num_blocks.copy(),
            self.max_total.copy(),
            self.decoding.copy(),
        )
        if len(plan.release_slots):
            ledger._release(plan)
        ledger._admit(plan)
        if len(plan.append_slots):
            ledger._append(plan)
        if len(plan.prefill_slots):
            ledger._prefill(plan)
        if len(plan.join_slots) or len(plan.leave_slots):
            ledger._join_and_leave(plan)
        if len(plan.mask_slots):
            ledger._mask(plan)
        if plan.iterations:
            ledger._decode(plan.iterations)
        return ledger

    def end(self, slots: Column) -> None:
        """Note that the sequences of `slots` hold their last token: they need no further block."""
        self.max_total[slots] = self.num_computed[slots] + 1

    def append_columns(self, plan: Plan) -> Column:
        """Where in the block tables the appended blocks stand, by the ledger after `plan`: [num_appended]."""
        if not len(plan.append_slots):
            return NO_COLUMN
        slots = plan.append_slots[::-1]  # the last append of a slot is the last of its table
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        later = np.empty(len(slots), dtype=np.int64)
        later[order] = np.arange(len(slots)) - np.searchsorted(ordered, ordered)
        return (self.num_blocks[slots] - 1 - later)[::-1].astype(np.int32)

    def _release(self, plan: Plan) -> None:
        slots = plan.release_slots
        self._require_distinct("release_slots", slots)
        self._require("release of an empty slot", slots, self.num_known[slots] > 0)
        for column in (self.num_known, self.num_computed, self.num_blocks, self.max_total, self.decoding):
            column[slots] = 0

    def _admit(self, plan: Plan) -> None:
        for sequence in plan.new_sequences:
            slot = sequence.slot
            if self.num_known[slot]:
                raise InvalidPlan(f"slot {slot} is occupied")
            if len(sequence.block_ids) > self.max_blocks_per_sequence:
                raise InvalidPlan(f"slot {slot}: {len(sequence.block_ids)} blocks are more than a sequence can use")
            self.num_known[slot] = len(sequence.token_ids)
            self.num_computed[slot] = sequence.num_cached_tokens
            self.num_blocks[slot] = len(sequence.block_ids)
            self.max_total[slot] = sequence.max_total_tokens

    def _append(self, plan: Plan) -> None:
        slots = plan.append_slots
        self._require("append to an empty slot", slots, self.num_known[slots] > 0)
        np.add.at(self.num_blocks, slots, 1)
        fits = self.num_blocks[slots] <= self.max_blocks_per_sequence
        self._require("append beyond the longest block table", slots, fits)

    def _prefill(self, plan: Plan) -> None:
        slots, ends = plan.prefill_slots, plan.prefill_starts + plan.prefill_counts
        self._require_distinct("prefill_slots", slots)
        self._require("empty prefill chunk", slots, plan.prefill_counts > 0)
        self._require("prefill does not start at the first position without KV entries", slots,
                      plan.prefill_starts == self.num_computed[slots])  # fmt: skip
        self._require("prefill beyond the known tokens", slots, ends <= self.num_known[slots])
        is_last = ends == self.num_known[slots]
        self._require("prefill samples elsewhere than at the last known token", slots, is_last == plan.prefill_samples)
        self.num_computed[slots] = ends

    def _join_and_leave(self, plan: Plan) -> None:
        slots = plan.join_slots
        self._require_distinct("join_slots", slots)
        self._require("join of an empty slot", slots, self.num_known[slots] > 0)
        self._require("join before the prefill has ended", slots, self.num_computed[slots] >= self.num_known[slots])
        self._require("join in the plan that ends the prefill", slots, ~np.isin(slots, plan.prefill_slots))
        self._require("join of a decoding slot", slots, ~self.decoding[slots])
        self.decoding[slots] = True
        self._require_distinct("leave_slots", plan.leave_slots)
        self._require("leave of a slot that does not decode", plan.leave_slots, self.decoding[plan.leave_slots])
        self.decoding[plan.leave_slots] = False

    def _mask(self, plan: Plan) -> None:
        slots = plan.mask_slots
        self._require_distinct("mask_slots", slots)
        samples = np.isin(slots, plan.prefill_slots[plan.prefill_samples > 0])
        if plan.iterations:
            samples |= self.decoding[slots]
        self._require("mask of a slot that does not sample", slots, samples)

    def _decode(self, iterations: int) -> None:
        slots = self.decoding.nonzero()[0]
        ends = np.minimum(self.num_computed[slots] + iterations, self.max_total[slots] - 1)
        self._require("no block for a position", slots, ends <= self.num_blocks[slots] * self.limits.block_size)
        self.num_computed[slots] = ends

    def _require(self, violation: str, slots: NDArray[np.integer], holds: NDArray[np.bool_]) -> None:
        if not holds.all():
            raise InvalidPlan(f"{violation}: slot {slots[~holds][0]}")

    def _require_distinct(self, name: str, slots: Column) -> None:
        if len(slots) > 1 and len(np.unique(slots)) < len(slots):
            raise InvalidPlan(f"{name}: a slot stands twice")
