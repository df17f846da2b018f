"""An executor whose KV rows hold the hash of the prefix that was written there, and whose tokens follow from it.

It knows nothing of requests: what it checks is the protocol, and that every read sees the reader's own prefix.
"""

import itertools
import random
from collections import Counter, deque

from executor_service.plan import InvalidPlan, Limits, NewSequence, Plan, decode_plan
from executor_service.runner.runner import CONTINUES
from protos.duet.executor.v1 import executor_pb2 as pb
from tests.property.fake_model import (
    CONSTRAINED_TOP_K,
    Sequence,
    choose,
    finish_reason,
    mask_for,
    name_of,
    next_value,
)
from tests.property.fake_results import (
    Crashed,
    ProtocolViolation,
    Result,
    SampledRow,
    add_logprobs,
    check,
    column,
    prompt_logprobs,
)

DAMAGED = -1  # written by a step that failed, or by one that read such a row; no hash is -1


class FakeExecutor:
    """One epoch of an executor. Plans are received, run and answered whenever the driver says so, in order."""

    def __init__(self, limits: Limits, max_inflight_plans: int, epoch: int, rng: random.Random) -> None:
        self.limits = limits
        self.slots: dict[int, Sequence] = {}
        self.decode_set: dict[int, None] = {}
        self.queued: deque[Plan] = deque()
        self.results: deque[Result] = deque()
        self.failure_rate = 0.0  # of a row, in each step
        self.device_time_ns = 0
        self.poison: dict[int, int] = {}  # name -> a position of the sequence of which the executor dies
        self.is_dead = False  # it runs no more plans; what it answered before may still come
        self.culprit: int | None = None  # the seating of which it died
        self.failed_names: set[int] = set()  # of sequences that failed by no fault of another
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._epoch = epoch
        self._max_inflight_plans = max_inflight_plans
        self._next_step_id = 1
        self._last_step_ids: deque[int] = deque()  # of each plan whose last result was not taken
        self._kv: list[int | None] = [None] * (limits.num_blocks * limits.block_size)
        self._holders: Counter[int] = Counter()  # block -> slots whose table has it
        self._num_seated = 0
        self._masks: dict[int, int] = {}  # by slot, of the plan that runs

    @property
    def num_plans_in_flight(self) -> int:
        """Plans received whose last result was not taken."""
        return len(self._last_step_ids)

    def receive(self, data: bytes) -> None:
        """Queue an encoded plan."""
        message = pb.StepPlan.FromString(data)
        check(message.epoch == self._epoch, "a plan of another epoch")
        check(message.step_id == self._next_step_id, "a gap in the step ids")
        try:
            plan = decode_plan(message, self.limits)
        except InvalidPlan as error:
            raise ProtocolViolation(f"an invalid plan: {error}") from error
        self._next_step_id += max(1, plan.iterations)
        self._last_step_ids.append(self._next_step_id - 1)
        check(self.num_plans_in_flight <= self._max_inflight_plans, "too many plans in flight")
        self.queued.append(plan)

    def take_result(self) -> Result:
        """The oldest result that was not taken."""
        result = self.results.popleft()
        message = pb.StepResult.FromString(result.message)
        if message.step_id == self._last_step_ids[0] and not message.partial:
            self._last_step_ids.popleft()
        return result

    def run_plan(self) -> None:
        """Run the oldest queued plan, and maybe die of it, after some of its steps."""
        try:
            self._run(self.queued.popleft())
        except Crashed as crash:
            (self.culprit,) = crash.args
            self.is_dead = True

    def _run(self, plan: Plan) -> None:
        self._masks = dict(zip(plan.mask_slots.tolist(), plan.masks[:, 0].tolist(), strict=True))
        check(len(self._masks) == len(plan.mask_slots), "two masks of one slot")
        self._change_slots(plan)
        first_rows, failed, parts = self._prefill(plan)
        for slot in plan.join_slots.tolist():
            self._join(slot, plan)
        for slot in plan.leave_slots.tolist():
            check(slot in self.decode_set, "a slot leaves the decode set that is not in it")
            del self.decode_set[slot]
        num_rows = int(plan.prefill_counts.sum()) + (len(self.decode_set) if plan.iterations else 0)
        check(0 < num_rows <= self.limits.max_tokens_per_step, f"{num_rows} tokens in a step")
        self.counts["plans of several steps"] += plan.iterations > 1
        num_masked = sum(slot in self._masks for slot in self.decode_set)
        self.counts["decode steps of constrained and other rows"] += 0 < num_masked < len(self.decode_set)
        if plan.iterations == 0 or first_rows or failed or parts:
            self._answer(plan.step_id, plan.iterations > 0, first_rows, failed, parts)
        for index in range(plan.iterations):
            self._answer(plan.step_id + index, False, *self._decode(), [])
        check(all(self.slots[slot].done for slot in self._masks), "a mask of a slot that samples nothing")

    # --- slots and block tables ----------------------------------------------------------------------------------

    def _change_slots(self, plan: Plan) -> None:
        for slot in plan.release_slots.tolist():
            check(slot in self.slots, "an empty slot is released")
            self._holders.subtract(self.slots.pop(slot).blocks)
            self.decode_set.pop(slot, None)
        for sequence in plan.new_sequences:
            self._seat(sequence)
        for slot, block in zip(plan.append_slots.tolist(), plan.append_blocks.tolist(), strict=True):
            check(slot in self.slots, "an empty slot gets a block")
            self._give(self.slots[slot], block)
            self.counts["appended blocks"] += 1

    def _seat(self, new: NewSequence) -> None:
        limits = self.limits
        check(new.slot not in self.slots, "a new sequence in an occupied slot")
        check(new.num_cached_tokens % limits.block_size == 0, "half a block is cached")
        check(len(new.block_ids) == -(-len(new.token_ids) // limits.block_size), "more blocks than tokens need")
        sequence = Sequence(
            name=name_of(new.sampling.seed, new.sampling.choice_index),
            seating=self._num_seated,
            is_constrained=new.sampling.top_k == CONSTRAINED_TOP_K,
            num_prompt_tokens=new.num_prompt_tokens,
            tokens=[],
            hashes=[],
            num_known=len(new.token_ids),
            max_total_tokens=new.max_total_tokens,
            stop_token_ids=set(new.stop_token_ids.tolist()),
            blocks=[],
            rows=[],
            num_planned=new.num_cached_tokens,
            num_logprobs=new.sampling.num_logprobs,
            num_prompt_logprobs=new.sampling.num_prompt_logprobs,
        )
        self._num_seated += 1
        for token in new.token_ids.tolist():
            sequence.append(token)
        num_hits = new.num_cached_tokens // limits.block_size
        for index, block in enumerate(new.block_ids.tolist()):
            self._give(sequence, block, shared=index < num_hits)
        self.slots[new.slot] = sequence
        self.counts["hits"] += num_hits > 0
        is_resumed = len(new.token_ids) > new.num_prompt_tokens
        self.counts["resumed sequences"] += is_resumed
        self.counts["resumed constrained sequences"] += is_resumed and sequence.is_constrained

    def _give(self, sequence: Sequence, block: int, *, shared: bool = False) -> None:
        check(block not in sequence.blocks, "a block twice in one table")
        check(shared or self._holders[block] <= 0, f"block {block} is in two tables and was no hit")
        self._holders[block] += 1
        sequence.blocks.append(block)
        size = self.limits.block_size
        check(len(sequence.blocks) <= -(-self.limits.max_model_len // size), "a table longer than a sequence")
        sequence.rows += range(block * size, (block + 1) * size)

    def _join(self, slot: int, plan: Plan) -> None:
        check(slot in self.slots and slot not in self.decode_set, "a slot joins that is empty or joined before")
        check(slot not in plan.prefill_slots, "a slot joins in the plan of its chunk")
        sequence = self.slots[slot]
        check(sequence.num_planned == sequence.num_known, "a slot joins before its sampling chunk")
        self.decode_set[slot] = None

    # --- computing -----------------------------------------------------------------------------------------------

    def _prefill(self, plan: Plan) -> tuple[list[tuple[int, SampledRow]], list[int], list[pb.PromptLogprobs]]:
        """All chunks read, then all write: a plan sees nothing that it writes itself but through its own chunk."""
        columns = (plan.prefill_slots, plan.prefill_starts, plan.prefill_counts, plan.prefill_samples)
        chunks = list(zip(*(column.tolist() for column in columns), strict=True))
        check(len({chunk[0] for chunk in chunks}) == len(chunks), "two chunks of one slot")
        spans: dict[int, tuple[int, int]] = {}
        sampling: set[int] = set()
        for slot, start, count, samples in chunks:
            check(slot in self.slots and slot not in self.decode_set, "a chunk of an empty or decoding slot")
            sequence, end = self.slots[slot], start + count
            check(count > 0 and start == sequence.num_planned, "chunks are not contiguous")
            check(bool(samples) == (end == sequence.num_known), "samples before the last known token, or not there")
            sequence.num_planned = end
            if sequence.done:  # its last chunk failed
                self._write(sequence, start, end, damaged=True)
            else:
                spans[slot] = (start, end)
                sampling.update([slot] if samples else [])
        failed = self._compute(spans)
        parts = [prompt_logprobs(slot, self.slots[slot], *span) for slot, span in spans.items() if slot not in failed]
        first_rows = [(slot, self._sample(slot)) for slot in spans if slot in sampling and slot not in failed]
        return first_rows, failed, list(itertools.chain(*parts))

    def _decode(self) -> tuple[list[tuple[int, SampledRow]], list[int]]:
        """One step of every slot in the decode set that is not done."""
        decoding = [self.slots[slot] for slot in self.decode_set]
        is_full = any(len(sequence.tokens) == sequence.max_total_tokens for sequence in decoding)
        check(not is_full, "a slot decodes past its length, which can be foreseen")
        slots = [slot for slot in self.decode_set if not self.slots[slot].done]
        lengths = {slot: len(self.slots[slot].tokens) for slot in slots}
        failed = self._compute({slot: (length - 1, length) for slot, length in lengths.items()})
        return [(slot, self._sample(slot)) for slot in slots if slot not in failed], failed

    def _compute(self, spans: dict[int, tuple[int, int]]) -> list[int]:
        """Read the context of each slot's positions [start, end), then write them; returns the slots that failed."""
        failed: list[int] = []
        for slot, (start, end) in spans.items():
            sequence = self.slots[slot]
            check(end <= len(sequence.rows), "positions beyond the block table")
            if start <= self.poison.get(sequence.name, -1) < end:
                raise Crashed(sequence.seating)
            self._read(sequence, start)
            if self._fails(sequence):
                failed.append(slot)
        for slot, (start, end) in spans.items():
            sequence = self.slots[slot]
            self._write(sequence, start, end, damaged=sequence.damaged or slot in failed)
            sequence.done |= slot in failed
        return failed

    def _write(self, sequence: Sequence, start: int, end: int, *, damaged: bool) -> None:
        for position in range(start, end):
            row = sequence.rows[position]
            check(self._holders[row // self.limits.block_size] == 1, "a write to a block that another slot holds")
            self._kv[row] = DAMAGED if damaged else sequence.hashes[position]

    def _read(self, sequence: Sequence, length: int) -> None:
        seen = [self._kv[row] for row in sequence.rows[:length]]
        if seen == sequence.hashes[:length]:
            return
        for position, (value, own) in enumerate(zip(seen, sequence.hashes, strict=False)):
            check(value in (own, DAMAGED), f"position {position} of {length} reads another prefix")
        sequence.damaged = True

    def _fails(self, sequence: Sequence) -> bool:
        """A damaged context gives an error or, worse, a token; any other step fails now and then."""
        if sequence.damaged:
            return self._rng.random() < 0.5
        if self._rng.random() >= self.failure_rate:
            return False
        self.failed_names.add(sequence.name)
        return True

    def _sample(self, slot: int) -> SampledRow:
        sequence = self.slots[slot]
        mask = self._mask_of(slot)
        value = next_value(sequence.hashes[-1], sequence.name) + sequence.damaged
        token = choose(value, mask, self.limits.vocab_size)
        sequence.append(token)
        reason = finish_reason(token, len(sequence.tokens), sequence.stop_token_ids, sequence.max_total_tokens)
        sequence.done = reason != CONTINUES
        return SampledRow(sequence.seating, token, reason, not sequence.damaged)

    def _mask_of(self, slot: int) -> int | None:
        """The mask under which the slot samples: the one that belongs to its tokens, or none."""
        sequence, mask = self.slots[slot], self._masks.pop(slot, None)
        check((mask is not None) == sequence.is_constrained, "a mask too many or too few")
        if mask is not None:
            generated = tuple(sequence.tokens[sequence.num_prompt_tokens :])
            expected = mask_for(sequence.name, generated, self.limits.vocab_size)
            check(mask == expected, f"a mask of other tokens than the {len(generated)} generated")
            self.counts["tokens under a mask"] += 1
        return mask

    def _answer(
        self,
        step_id: int,
        partial: bool,
        rows: list[tuple[int, SampledRow]],
        failed: list[int],
        parts: list[pb.PromptLogprobs],
    ) -> None:
        message = pb.StepResult(
            epoch=self._epoch,
            step_id=step_id,
            partial=partial,
            slots=column([slot for slot, _ in rows]),
            token_ids=column([row.token for _, row in rows]),
            finish_reasons=column([row.reason for _, row in rows]),
            slot_errors=[pb.SlotError(slot=slot, message="not finite") for slot in failed],
            device_time_ns=self.device_time_ns,
            prompt_logprobs=parts,
        )
        add_logprobs(message, [self.slots[slot] for slot, _ in rows])
        self.results.append(Result(message.SerializeToString(), [row for _, row in rows], bool(failed)))
