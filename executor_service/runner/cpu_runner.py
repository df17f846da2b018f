"""Runs plans on the CPU: slots and step inputs, the model, the sampler, one step after the other."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.layers.attention import AttentionBackend
from executor_service.layers.cpu import CpuAttention, CpuOps
from executor_service.models import CausalLM
from executor_service.models.causal_lm import Hidden
from executor_service.plan import NO_COLUMN, Column, Mask, Plan
from executor_service.runner.build import load
from executor_service.runner.kv_cache import (
    allocate_on_cpu,
    available_memory_bytes,
    count_blocks,
)
from executor_service.runner.ledger import Ledger
from executor_service.runner.prompt_report import Chunk, report_chunk
from executor_service.runner.runner import CONTINUES, PromptLogprobs, RunnerInfo, StepLogprobs, StepOutput
from executor_service.runner.slots import SlotState
from executor_service.runner.special_rows import find_special_rows, sample_with_special_rows
from executor_service.runner.step_inputs import decode_inputs, prefill_inputs
from kernels.sampling import WHOLE_VOCABULARY, VocabularyShard, gather_rows, sample

_MAX_NUM_SEQS, _MAX_TOKENS_PER_STEP = 64, 512  # where the settings leave them open


def build_cpu_runner(config: ExecutorConfig, group: RankGroup) -> "CpuRunner":
    """Load this rank's part of the model and make its KV cache in main memory.

    Sets the number of threads of torch, for the whole process.
    Raises: ModelError, where the model, the settings and the machine do not fit.
    """
    local_ranks = group.placement.local_size
    num_cores = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(num_cores if config.num_threads is None else config.num_threads)
    loaded = load(config, group, CpuOps(group.tensor_parallel()), _MAX_NUM_SEQS, _MAX_TOKENS_PER_STEP)
    shape, num_blocks = loaded.cache_shape, config.num_blocks
    if num_blocks is None:
        memory_bytes = int(available_memory_bytes() * config.memory_utilization / local_ranks)
        num_blocks = group.least(
            count_blocks(shape, memory_bytes, loaded.max_num_seqs, loaded.max_model_len, "--memory-utilization")
        )
    info = loaded.info(num_blocks, f"CPU, {torch.get_num_threads()} threads")
    attention = CpuAttention(loaded.model.attention_config(config.block_size))
    shard = WHOLE_VOCABULARY
    if group.placement.size > 1:
        shard = VocabularyShard(loaded.model.vocab_span.start, group.tensor_parallel().all_gather)
    return CpuRunner(info, loaded.model, allocate_on_cpu(shape, num_blocks), attention, shard)


class CpuRunner:
    """See Runner. Every tensor lives on the device of `kv_caches`."""

    def __init__(
        self,
        info: RunnerInfo,
        model: CausalLM,
        kv_caches: list[Tensor],
        attention: AttentionBackend,
        shard: VocabularyShard,
    ) -> None:
        """kv_caches: one a layer, [num_blocks, num_kv_heads, 2, block_size, head_dim]; shard: what the model's logits
        are of."""
        self._info = info
        self._model = model
        self._kv_caches = kv_caches
        self._attention = attention
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
        inputs = prefill_inputs(plan, self._slots, self._info.limits.block_size)
        attend = self._attention.begin_prefill(inputs.metadata)
        hidden = self._model.forward(inputs.input_ids, self._kv_caches, attend)
        self._slots.prefilled(inputs.slots, inputs.ends)
        prompt_logprobs = self._report_prompts(plan, hidden) if self._slots.prompt_reports else []
        sampled = self._sample_next(inputs.sampling_slots, hidden.select(inputs.sampling_rows), masks)
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
        inputs = decode_inputs(self._slots, self._info.limits.block_size)
        attend = self._attention.begin_decode(inputs.metadata)
        hidden = self._model.forward(inputs.input_ids, self._kv_caches, attend)
        self._slots.prefilled(slots, inputs.metadata.positions + 1)
        return _output(step_id, False, self._sample_next(slots, hidden, masks), start_ns)

    def _report_prompts(self, plan: Plan, hidden: Hidden) -> list[PromptLogprobs]:
        """Of the plan's chunks; hidden: of all their tokens."""

        def compute_logits(rows: Tensor) -> Tensor:
            return gather_rows(self._model.compute_logits(hidden.select(rows)).float(), self._shard)

        parts = []
        counts = plan.prefill_counts
        columns = plan.prefill_slots, plan.prefill_starts, counts, counts.cumsum() - counts
        for chunk in map(Chunk, *(column.tolist() for column in columns)):
            report, known = self._slots.prompt_reports.get(chunk.slot), self._slots.known_token_ids[chunk.slot]
            if report:
                assert known is not None, "the ledger admits chunks of occupied slots only"
                part = report_chunk(report, chunk, known, self._info.limits.vocab_size, compute_logits)
                parts += [part] if part else []
        return parts

    def _sample_next(self, slots: Tensor, hidden: Hidden, masks: dict[int, Mask]) -> "_Sampled":
        """Choose the next token of each slot; slots: [n] int64, and a row of hidden for each."""
        if not len(slots):
            return _NOTHING
        logits = self._model.compute_logits(hidden).float()
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
        positions, columns = self._slots.context_len[slots], self._slots.sampling.select(slots)
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
