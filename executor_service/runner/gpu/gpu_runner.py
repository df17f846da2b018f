"""Runs plans on a GPU. The host keeps what it knows without the device: tokens that came with a plan, lengths, sets.

A common decode step costs the host a few small writes and one graph launch. A step with special rows, whose logits are
changed before sampling or reported after it, costs a graph launch and some ten more. The host waits only where it is
far ahead: for a ring's entry, or a staging buffer, that is still in use.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from executor_service.plan import NO_COLUMN, Column, InvalidPlan, NewSequence, Plan
from executor_service.runner.gpu.buffers import MAX_STOP_TOKEN_IDS, DeviceBuffers, split_columns
from executor_service.runner.gpu.graphs import StepGraphs
from executor_service.runner.gpu.launched_step import LaunchedStep, Reports
from executor_service.runner.gpu.prompt_rows import find_prompt_rows
from executor_service.runner.gpu.rings import RING_SIZE, StepRings
from executor_service.runner.gpu.special_rows import SpecialRows, SpecialSlots
from executor_service.runner.gpu.staging import StagingBuffers
from executor_service.runner.gpu.step_program import PrefillShape
from executor_service.runner.ledger import Ledger
from executor_service.runner.prompt_report import PromptReport
from executor_service.runner.runner import Pending, RunnerInfo, StepOutput
from kernels.gpu.slot_state import RECORD_SIZE, Admission, admit, pack

_NO_APPENDS = np.zeros((3, 0), dtype=np.int32)


class GpuRunner:
    """See Runner. Everything runs on the stream that is current in the one thread that uses it."""

    def __init__(self, info: RunnerInfo, graphs: StepGraphs, buffers: DeviceBuffers, rings: StepRings) -> None:
        self._info = info
        self._graphs = graphs
        self._buffers = buffers
        self.rings = rings
        self._events = [torch.cuda.Event() for _ in range(RING_SIZE)]  # the end of each step in flight
        self._prefill_staging = StagingBuffers(buffers.layout.size)
        num_slots, max_blocks = buffers.block_tables.shape
        self._admission_staging = StagingBuffers(num_slots * (RECORD_SIZE.value + max_blocks + MAX_STOP_TOKEN_IDS))
        self.reset()

    @property
    def info(self) -> RunnerInfo:
        """See Runner."""
        return self._info

    def reset(self) -> None:
        """See Runner. Waits until the device is idle."""
        torch.cuda.current_stream().synchronize()
        limits = self._info.limits
        self._ledger = Ledger.empty(limits)
        self._known: list[Column | None] = [None] * limits.num_slots  # tokens that each sequence came with
        self._special = SpecialSlots(limits.num_slots, limits.vocab_size, self._buffers.rows.device)
        self._prompt_reports: dict[int, PromptReport] = {}  # by slot, where the prompt is reported
        self._rows = NO_COLUMN  # [num_decoding], the slots of the decode set
        self._rows_changed = True  # since the last decode step
        self._appends = _NO_APPENDS  # [3, n]: slot, column and block that the device's tables still lack

    def execute(self, plan: Plan) -> Iterator[Pending]:
        """See Runner."""
        self._apply(plan)
        if len(plan.prefill_slots):
            yield self._prefill(plan)
        elif not plan.iterations:
            yield _nothing(plan.step_id)
        special = self._find_special_decode_rows(plan) if plan.iterations and self._special.may_be_in(plan) else None
        for step_id in range(plan.step_id, plan.step_id + plan.iterations):
            yield self._decode(step_id, special) if len(self._rows) else _nothing(step_id)

    def _apply(self, plan: Plan) -> None:
        for sequence in plan.new_sequences:
            if len(sequence.stop_token_ids) > MAX_STOP_TOKEN_IDS:
                raise InvalidPlan(f"slot {sequence.slot}: more than {MAX_STOP_TOKEN_IDS} stop tokens")
        self._ledger = self._ledger.after(plan)
        if len(plan.release_slots):
            self._special.release(plan.release_slots)
            for slot in plan.release_slots.tolist():
                self._known[slot] = None
                self._prompt_reports.pop(slot, None)
            self._appends = self._appends[:, ~np.isin(self._appends[0], plan.release_slots)]
        if plan.new_sequences:
            self._admit(plan.new_sequences)
        if len(plan.append_slots):
            columns = self._ledger.append_columns(plan)
            self._append(np.stack([plan.append_slots, columns, plan.append_blocks]))
        if len(plan.release_slots) or len(plan.join_slots) or len(plan.leave_slots):
            self._rows = np.flatnonzero(self._ledger.decoding).astype(np.int32)
            self._rows_changed = True

    def _admit(self, sequences: list[NewSequence]) -> None:
        for sequence in sequences:
            self._known[sequence.slot] = sequence.token_ids
            self._special.admit(sequence)
            if width := sequence.sampling.num_prompt_logprobs:
                self._prompt_reports[sequence.slot] = PromptReport(width, sequence.num_prompt_tokens)
        staging = self._admission_staging.take()
        pack([_admission(sequence) for sequence in sequences], staging.numpy())
        buffers = self._buffers
        admit(staging, len(sequences), buffers.state, buffers.stop_token_ids, buffers.block_tables)
        self._admission_staging.launched()

    def _append(self, appends: Column) -> None:
        """Leave the blocks to the next decode step's entry, where they fit."""
        self._appends = np.concatenate([self._appends, appends], axis=1)
        if self._appends.shape[1] > self.rings.layout.max_appends:
            slots, columns, blocks = torch.from_numpy(self._appends).to(self._buffers.rows.device).long()
            self._buffers.block_tables[slots, columns] = blocks.int()
            self._appends = _NO_APPENDS

    def _find_special_decode_rows(self, plan: Plan) -> SpecialRows | None:
        """Of all iterations of a plan that has been applied."""
        # A sequence that ends in this plan holds more.
        num_tokens = self._ledger.num_computed[self._rows] + 1 - plan.iterations
        return self._special.find(self._rows, num_tokens, plan)

    def _decode(self, step_id: int, special: SpecialRows | None) -> Pending:
        step = self.rings.claim()
        self.rings.write_plan(step, self._rows if self._rows_changed else None, self._appends)
        self._rows_changed, self._appends = False, _NO_APPENDS
        longest = int(self._ledger.num_computed[self._rows].max()) + 1
        entries = self._graphs.run_decode(len(self._rows), longest, special)
        reports = Reports(special.reported, entries) if special and special.reported else None
        return self._launched(step, step_id, self._rows, reports, partial=False)

    def _prefill(self, plan: Plan) -> Pending:
        samples = plan.prefill_samples.astype(np.bool_)
        shape = self._graphs.padded_prefill(
            PrefillShape(
                num_tokens=int(plan.prefill_counts.sum()),
                num_seqs=len(plan.prefill_slots),
                num_samples=max(int(samples.sum()), 1),
                longest_chunk=int(plan.prefill_counts.max()),
                has_cached=bool(plan.prefill_starts.any()),
            )
        )
        step = self.rings.claim()
        staging = self._prefill_staging.take()
        size = self._fill_columns(staging, plan, samples)
        self._buffers.prefill_array[:size].copy_(staging[:size], non_blocking=True)
        self._prefill_staging.launched()
        reports = self._run_prefill(shape, plan, samples)
        return self._launched(step, plan.step_id, plan.prefill_slots[samples], reports, partial=plan.iterations > 0)

    def _run_prefill(self, shape: PrefillShape, plan: Plan, samples: np.ndarray) -> Reports | None:
        slots = plan.prefill_slots[samples]
        special = prompts = None
        if self._special.may_be_in(plan):
            special = self._special.find(slots, self._ledger.num_computed[slots], plan)
        if self._prompt_reports:
            num_slots, device = len(self._known), self._buffers.rows.device
            prompts = find_prompt_rows(plan, self._prompt_reports, self._known, num_slots, device)
        if special is None and prompts is None:
            self._graphs.run_prefill(shape)
            return None
        entries, prompt_entries = self._graphs.run_special_prefill(shape, special, prompts)
        own_reports = {row: self._prompt_reports.get(slot) for row, slot in enumerate(slots.tolist())}
        return Reports(
            special.reported if special else None,
            entries,
            prompts,
            prompt_entries,
            {row: report for row, report in own_reports.items() if report},
        )

    def _fill_columns(self, staging: Tensor, plan: Plan, samples: np.ndarray) -> int:
        """Write the plan's chunks to the staging array, and padding behind them; returns the integers to copy."""
        columns = split_columns(staging, self._buffers.layout)
        chunks, sampled, starts = columns.chunks.numpy(), columns.samples.numpy(), columns.query_starts.numpy()
        num_chunks, num_samples = len(plan.prefill_slots), int(samples.sum())
        ends, row_ends = plan.prefill_starts + plan.prefill_counts, plan.prefill_counts.cumsum(dtype=np.int32)
        first_rows = row_ends - plan.prefill_counts
        chunks[:] = 0
        chunks[:, :num_chunks] = plan.prefill_slots, plan.prefill_starts, plan.prefill_counts, first_rows, ends
        sampled[:] = [[0], [-1], [0]]
        sampled[:, :num_samples] = (row_ends - 1)[samples], plan.prefill_slots[samples], ends[samples]
        starts[0] = 0
        starts[1:] = row_ends[-1]
        starts[1 : num_chunks + 1] = row_ends
        input_ids = columns.input_ids.numpy()
        for slot, start, count, row in chunks[:4, :num_chunks].T.tolist():
            known = self._known[slot]
            assert known is not None, "the ledger admits chunks of occupied slots only"
            input_ids[row : row + count] = known[start : start + count]
        return self._buffers.layout.header_size + int(row_ends[-1])

    def _launched(self, step: int, step_id: int, rows: Column, reports: Reports | None, *, partial: bool) -> Pending:
        event = self._events[step % RING_SIZE]
        event.record()
        return LaunchedStep(step_id, partial, rows, step, event, self.rings, reports)


def _nothing(step_id: int) -> StepOutput:
    return StepOutput(step_id, False, NO_COLUMN, NO_COLUMN, NO_COLUMN, [], 0)


def _admission(sequence: NewSequence) -> Admission:
    sampling = sequence.sampling
    return Admission(
        slot=sequence.slot,
        context_len=sequence.num_cached_tokens,
        max_total=sequence.max_total_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice_index=sampling.choice_index,
        block_ids=sequence.block_ids,
        stop_token_ids=sequence.stop_token_ids,
    )
