"""What holds between two losses of the executor: its slots, its blocks, and the plans in flight to it."""

import dataclasses
from collections import deque

import numpy as np

from scheduler_service.core.block_manager import BlockManager
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.step_plan import NO_ROWS, Column, StepPlan, StepRecord

TIMEOUT_FACTOR = 20  # of the time that a plan should take by what was measured, before it is taken to hang
TIMEOUT_SLACK_S = 5.0  # for an executor that ends itself at the timeout, before the core gives it up


@dataclasses.dataclass(frozen=True)
class ExecutorLimits:
    """The executor's capacity: see ExecutorInfo in executor.proto."""

    block_size: int
    num_blocks: int
    num_slots: int
    max_tokens_per_step: int
    max_model_len: int
    max_inflight_plans: int

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of one sequence, by the model and by the whole KV cache."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


class DecodeSet:
    """The requests that decode in every step, with their lengths in columns so that a steady step has no loop."""

    def __init__(self, num_slots: int) -> None:
        self._members: dict[int, Request] = {}  # slot -> request
        self._columns: tuple[Column, list[Request]] | None = None
        self._num_scheduled = np.zeros(num_slots, dtype=np.int32)  # [num_slots] positions that sent plans write
        self._max_total = np.zeros(num_slots, dtype=np.int32)  # [num_slots] tokens

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, slot: int) -> bool:
        return slot in self._members

    def columns(self) -> tuple[Column, list[Request]]:
        """Slots  # [num_decoding] int32, and their requests. Never changed in place, so a record may keep them."""
        if self._columns is None:
            slots = sorted(self._members)  # as the executor answers them
            self._columns = (np.array(slots, dtype=np.int32), [self._members[slot] for slot in slots])
        return self._columns

    def join(self, request: Request, num_scheduled: int) -> None:
        """Add a running request of which the plans sent write `num_scheduled` positions: all but the last token's."""
        assert request.slot is not None
        self._members[request.slot] = request
        self._num_scheduled[request.slot] = num_scheduled
        self._max_total[request.slot] = request.max_total_tokens
        self._columns = None

    def discard(self, slot: int) -> None:
        """Take the slot out, where it is in."""
        if self._members.pop(slot, None) is not None:
            self._columns = None

    def blocks_short(self, table_lens: Column, block_size: int, iterations: int) -> tuple[Column, Column]:
        """Slots whose table does not cover `iterations` more positions, and the blocks each lacks."""
        slots, _ = self.columns()
        lacking = -(-(self._num_scheduled[slots] + iterations) // block_size) - table_lens[slots]
        short = lacking > 0
        return slots[short], lacking[short]

    def min_remaining(self) -> int:
        """Fewest tokens that any member may still generate."""
        slots, _ = self.columns()
        return int((self._max_total[slots] - self._num_scheduled[slots]).min()) - 1

    def advance(self, iterations: int) -> list[Request]:
        """Count `iterations` steps as sent; returns, and takes out, the requests that end with them by length."""
        slots, requests = self.columns()
        self._num_scheduled[slots] += iterations
        ended = np.flatnonzero(self._num_scheduled[slots] + 1 >= self._max_total[slots])
        for index in ended:
            self.discard(int(slots[index]))
        return [requests[index] for index in ended]


class Epoch:
    """All state that dies with the executor."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size, limits.num_slots, limits.max_model_len)
        self.running: dict[int, Request] = {}  # by slot
        self.prefilling: list[Request] = []  # running, with known tokens left to compute, in order of admission
        self.joining: list[Request] = []  # sampled their first token in the last plan
        self.leaving: list[Request] = []  # decoded in the last plan, and need not in the next
        self.constrained: dict[Request, int] = {}  # those that go on after a token -> tokens known when it was planned
        self.decode_set = DecodeSet(limits.num_slots)
        self.free_slots = list(range(limits.num_slots - 1, -1, -1))
        self.released_slots: list[int] = []  # emptied since the last plan; the next one tells the executor
        self.records: deque[StepRecord] = deque()  # steps in flight, oldest first
        self.num_plans_in_flight = 0
        self.next_step_id = 1
        self.settled_step_id = 0
        self.decode_step_ns = 0.0  # moving average of the device time of a decode-only step; 0: none yet
        self.prefill_token_ns = 0.0  # the same for each token of a prefill phase
        self.stalled_since: float | None = None  # when waiting prompts began to hold up decoding, monotonic seconds
        self.on_trial: Request | None = None  # the one that runs alone, since executors may have died of it
        self.oldest_since = 0.0  # when the oldest plan in flight was sent, or began to be the oldest, monotonic seconds

    def seat(self, request: Request, hits: list[int]) -> int:
        """Give a request a slot, and a block table for its known tokens that begins with the cached blocks `hits`."""
        slot = self.free_slots.pop()
        self.blocks.allocate(slot, hits, len(request.token_ids))
        self.running[slot] = request
        self.prefilling.append(request)
        request.state, request.slot, request.spoiled = RequestState.RUNNING, slot, False
        request.num_cached_blocks = len(hits)
        request.num_prefilled = len(hits) * self.limits.block_size
        return slot

    @property
    def is_decoding(self) -> bool:
        """Whether any request is past its first token, be it that its mask is still to come."""
        return bool(self.decode_set) or bool(self.constrained)

    def unseat(self, request: Request) -> None:
        """Take slot and blocks from a running request; the blocks may be given to others at once."""
        slot = request.slot
        assert slot is not None
        self.blocks.free(slot)
        del self.running[slot]
        self.decode_set.discard(slot)
        self.constrained.pop(request, None)
        for members in (self.prefilling, self.joining, self.leaving):
            if request in members:
                members.remove(request)
        self.free_slots.append(slot)
        self.released_slots.append(slot)
        request.slot = None

    def take_released_slots(self) -> list[int]:
        """Slots that the plan being built must release; it may give them out again, since releases come first."""
        released, self.released_slots = self.released_slots, []
        return released

    def prefill_s(self, num_more_tokens: int) -> float:
        """Seconds that the prefill in flight and `num_more_tokens` more will take, as far as it was measured."""
        num_tokens = sum(record.num_prefill_tokens for record in self.records) + num_more_tokens
        return num_tokens * self.prefill_token_ns / 1e9

    def is_in_flight(self, request: Request) -> bool:
        """Whether a step that is not settled may still bring a token of this waiting request."""
        return request.in_flight_until > self.settled_step_id

    def timeout_ms(self, plan: StepPlan, least_s: float) -> int:
        """What the plan may take before it is taken to hang; 0 where nothing of the kind was measured yet."""
        num_prefill_tokens = sum(chunk.count for chunk in plan.chunks)
        if (num_prefill_tokens and not self.prefill_token_ns) or (plan.iterations and not self.decode_step_ns):
            return 0
        expected_ns = num_prefill_tokens * self.prefill_token_ns + plan.iterations * self.decode_step_ns
        return int(least_s * 1e3 + TIMEOUT_FACTOR * expected_ns / 1e6)

    def is_overdue(self, now: float) -> bool:
        """Whether the oldest plan in flight takes so long that the executor hangs; `now` in monotonic seconds."""
        timeout_s = self.records[0].timeout_s if self.records else 0.0
        return timeout_s > 0 and now - self.oldest_since > timeout_s + TIMEOUT_SLACK_S

    def remember(self, plan: StepPlan, now: float) -> None:
        """The plan is sent at `now`: keep what its results are read against, and let later plans hit its blocks."""
        prefilled = {chunk.slot: chunk.request for chunk in plan.chunks}
        num_prefill_tokens = sum(chunk.count for chunk in plan.chunks)
        decode_slots, decode_requests = self.decode_set.columns() if plan.iterations else NO_ROWS
        num_steps = max(1, plan.iterations)
        for index in range(num_steps):
            record = StepRecord(
                step_id=plan.step_id + index,
                ends_plan=index == num_steps - 1,
                prefilled=prefilled,
                num_prefill_tokens=num_prefill_tokens,
                decode_slots=decode_slots,
                decode_requests=decode_requests,
                timeout_s=plan.timeout_ms / 1e3,
            )
            self.records.append(record)
        if not self.num_plans_in_flight:
            self.oldest_since = now
        self.next_step_id += num_steps
        self.num_plans_in_flight += 1
        for chunk in plan.chunks:
            block_size, end = self.blocks.block_size, chunk.start + chunk.count
            request, first, last = chunk.request, chunk.start // block_size, end // block_size
            self.blocks.publish(chunk.slot, request.block_digests, request.token_ids, first, last)
        if plan.iterations:
            self._pass_over(plan)

    def _pass_over(self, plan: StepPlan) -> None:
        """Those that end with the plan leave the decode set, and so do those whose next mask is still to come."""
        self.leaving += self.decode_set.advance(plan.iterations)
        for slot in plan.mask_slots:
            if slot in self.decode_set:
                self.decode_set.discard(slot)
                self.leaving.append(self.running[slot])

    def unacknowledged(self) -> set[Request]:
        """The requests of all steps in flight."""
        return {request for record in self.records for request in record.requests}

    def settle(self, now: float) -> None:
        """End the flight of the oldest step; `now` in monotonic seconds."""
        record = self.records.popleft()
        self.oldest_since = now
        self.settled_step_id = record.step_id
        self.num_plans_in_flight -= record.ends_plan

    def check_idle(self) -> None:
        """Assert what holds when no request is alive: every slot and every block is free, and nothing is in flight."""
        assert not self.records, "a step is in flight"
        assert not self.num_plans_in_flight, "plans in flight are counted wrong"
        members = (self.running, self.prefilling, self.joining, self.leaving, self.constrained, self.decode_set)
        assert not any(members), "a request that has ended is still planned"
        assert sorted(self.free_slots) == list(range(self.limits.num_slots)), "slots leaked"
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "blocks leaked"
        assert not self.blocks.table_lens.any(), "a block table is left"
        self.blocks.check()
