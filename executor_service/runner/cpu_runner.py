"""Runs plans on the CPU: slots and step inputs, the model, the sampler, one step after the other."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from executor_service.plan import NO_COLUMN, Column, Mask, Plan
from executor_service.runner.cpu_steps import ComputeLogits, CpuSteps
from executor_service.runner.ledger import Ledger
from executor_service.runner.prompt_report import Chunk, report_chunk
from executor_service.runner.runner import CONTINUES, PromptLogprobs, RunnerInfo, StepLogprobs, StepOutput
from executor_service.runner.slots import SlotState
from executor_service.runner.special_rows import find_special_rows, sample_with_special_rows
from executor_service.runner.step_inputs import decode_inputs, prefill_inputs
from kernels.sampling import VocabularyShard, gather_rows, sample


class CpuRunner:
    """See Runner. Every tensor lives on the device of `kv_caches`."""

    def __init__(self, info: RunnerInfo, steps: CpuSteps, kv_caches: list[Tensor], shard: VocabularyShard) -> None:
        """kv_caches: those of `steps`, one a layer, [num_blocks, num_kv_heads, 2, block_size, head_dim]; shard: what
        its logits are of."""
        self._info = info
        self._steps = steps
        self._kv_caches = kv_caches
        self._shard = shard
        self.reset()

    @property
    def info(self) -> RunnerInfo:
        """What the core needs to know; fixed from start to end."""
        return self._info

    def reset(self) -> None:
        """Empty every slot; the KV entries are forgotten."""
        self._ledger = Ledger.empty(self._info.limits)
        device = self._kv_caches[0].device
        self._slots = SlotState(self._info.limits, self._ledger.max_blocks_per_sequence, device)

    def execute(self, plan: Plan) -> Iterator[StepOutput]:
        """Run one plan, step by step, as the iterator is advanced; see Runner.

        Raises: InvalidPlan, with the first output asked for and before anything has changed.
        """
        self._apply(plan)
        masks = dict(zip(plan.mask_slots.tolist(), plan.masks, strict=True))
        if len(plan.prefill_slots):
            yield self._prefill(plan, masks)
        elif not plan.iterations:
            yield _output(plan.step_id, False, _NOTHING, time.perf_counter_ns())
        for step_id in range(plan.step_id, plan.step_id + plan.iterations):
            yield self._decode(step_id, masks)

    @torch.inference_mode()
    def _apply(self, plan: Plan) -> None:
        self._ledger = self._ledger.after(plan)
        self._slots.apply(plan, self._ledger.append_columns(plan))

    @torch.inference_mode()
    def _prefill(self, plan: Plan, masks: dict[int, Mask]) -> StepOutput:
        start_ns = time.perf_counter_ns()
        inputs = prefill_inputs(plan, self._slots)
        compute_logits = self._steps.prefill(inputs)
        self._slots.prefilled(inputs.slots, inputs.ends)
        prompt_logprobs = self._report_prompts(plan, compute_logits) if self._slots.prompt_reports else []
        sampled = _NOTHING
        if len(inputs.sampling_slots):
            sampled = self._sample_next(inputs.sampling_slots, compute_logits(inputs.sampling_rows), masks)
        if self._slots.prompt_reports:
            self._slots.end_prompts(inputs.sampling_slots.tolist())
        return _output(plan.step_id, plan.iterations > 0, sampled, start_ns, prompt_logprobs)

    @torch.inference_mode()
    def _decode(self, step_id: int, masks: dict[int, Mask]) -> StepOutput:
        start_ns = time.perf_counter_ns()
        self._slots.refresh_decode_slots()
        slots = self._slots.decode_slots
        if not len(slots):
            return _output(step_id, False, _NOTHING, start_ns)
        inputs = decode_inputs(self._slots)
        logits = self._steps.decode(inputs)
        self._slots.prefilled(slots, inputs.metadata.positions + 1)
        return _output(step_id, False, self._sample_next(slots, logits, masks), start_ns)

    def _report_prompts(self, plan: Plan, compute_logits: ComputeLogits) -> list[PromptLogprobs]:
        """Of the plan's chunks; compute_logits: of all their tokens."""

        def compute_whole_rows(rows: Tensor) -> Tensor:
            return gather_rows(compute_logits(rows), self._shard)

        parts = []
        counts = plan.prefill_counts
        columns = plan.prefill_slots, plan.prefill_starts, counts, counts.cumsum() - counts
        for chunk in map(Chunk, *(column.tolist() for column in columns)):
            report, known = self._slots.prompt_reports.get(chunk.slot), self._slots.known_token_ids[chunk.slot]
            if report:
                assert known is not None, "the ledger admits chunks of occupied slots only"
                part = report_chunk(report, chunk, known, self._info.limits.vocab_size, compute_whole_rows)
                parts += [part] if part else []
        return parts

    def _sample_next(self, slots: Tensor, logits: Tensor, masks: dict[int, Mask]) -> "_Sampled":
        """Choose the next token of each slot; slots: [n] int64; logits: [n, size of the shard] float32."""
        # A sum is finite only where every term is.
        is_finite = self._shard.gather(logits.sum(-1, keepdim=True)).isfinite().all(-1)
        for slot, report in self._slots.prompt_reports.items():
            if report.has_failed:
                is_finite &= slots != slot
        errors: list[tuple[int, str]] = []
        if not bool(is_finite.all()):
            errors = self._fail(slots[~is_finite], "non-finite logits")
            slots, logits = slots[is_finite], logits[is_finite]
        return self._choose(slots, logits, masks, errors)

    def _choose(
        self, slots: Tensor, logits: Tensor, masks: dict[int, Mask], errors: list[tuple[int, str]]
    ) -> "_Sampled":
        """See _sample_next; logits: [n, size of the shard] float32, finite; errors: of other slots."""
        state, positions = self._slots, self._slots.context_len[slots]
        columns = state.decode_sampling if slots is state.decode_slots else state.sampling.select(slots)
        logprobs = None
        special = find_special_rows(_column(slots), self._slots.special, masks) if self._slots.special or masks else []
        if special:
            choice = sample_with_special_rows(special, logits, columns, positions, self._shard)
            token_ids, logprobs = choice.token_ids, choice.logprobs
            if choice.failed_rows:
                is_left = torch.ones_like(slots, dtype=torch.bool)
                is_left[choice.failed_rows] = False
                errors = errors + self._fail(slots[~is_left], "no token can be sampled")
                slots, token_ids = slots[is_left], token_ids[is_left]
        else:
            token_ids = sample(logits, columns, positions, self._shard)
        reasons = self._slots.sampled(slots, token_ids)
        sampled = _Sampled(_column(slots), _column(token_ids), _column(reasons), errors, logprobs)
        self._ledger.end(sampled.slots[sampled.finish_reasons != CONTINUES])
        return sampled

    def _fail(self, slots: Tensor, message: str) -> list[tuple[int, str]]:
        """End the slots, [n] int64, and return the errors to report."""
        self._slots.end(slots)
        self._ledger.end(_column(slots))
        self._scrub(slots)
        return [(slot, message) for slot in slots.tolist()]

    def _scrub(self, slots: Tensor) -> None:
        """Make the slots' KV entries finite: a later holder of the blocks reads them behind a mask, and 0 * NaN is NaN.

        Entries that are finite, such as a shared prefix's, stay as they are.
        """
        blocks = self._slots.block_tables[slots].flatten().unique()
        for kv_cache in self._kv_caches:
            kv_cache[blocks] = kv_cache[blocks].nan_to_num_()


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """What one phase chose; fields as in StepOutput."""

    slots: Column
    token_ids: Column
    finish_reasons: Column
    slot_errors: list[tuple[int, str]]
    logprobs: StepLogprobs | None = None


_NOTHING = _Sampled(NO_COLUMN, NO_COLUMN, NO_COLUMN, [])


def _column(values: Tensor) -> Column:
    return values.to(device="cpu", dtype=torch.int32).numpy()


def _output(
    step_id: int, partial: bool, sampled: _Sampled, start_ns: int, prompt_logprobs: Sequence[PromptLogprobs] = ()
) -> StepOutput:
    return StepOutput(
        step_id,
        partial,
        sampled.slots,
        sampled.token_ids,
        sampled.finish_reasons,
        sampled.slot_errors,
        time.perf_counter_ns() - start_ns,
        sampled.logprobs,
        list(prompt_logprobs),
    )
