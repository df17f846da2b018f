"""The scheduler core without gRPC: real queues, blocks and settlement, a fake executor, and a clock of its own.

The fake's next token is a checksum of every token before it, so that `continuation` tells what a request must get,
whatever happened to it on the way. It asserts what an executor may rely on: free slots, room in the block tables,
chunks without gaps, the token budget, and that nothing decodes past its length.
"""

import dataclasses
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.epoch import Epoch, ExecutorLimits
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import StepPlan, decode_result
from scheduler_service.core.waiting_queue import ORDERS
from scheduler_service.ipc import Sampling

VOCAB_SIZE = 1000
CONTINUES, STOP, LENGTH, CANCELLED = 0, 1, 2, 3
LIMITS = ExecutorLimits(
    block_size=4, num_blocks=64, num_slots=8, max_tokens_per_step=16, max_model_len=256, max_inflight_plans=3
)


def small_cache(num_blocks: int) -> ExecutorLimits:
    """An executor on which few requests fit."""
    return dataclasses.replace(LIMITS, num_blocks=num_blocks)


def continuation(prompt: Iterable[int], num_tokens: int) -> list[int]:
    """The `num_tokens` tokens that follow a prompt: each is the checksum of all before it."""
    checksum, token_ids = zlib.crc32(array("i", prompt).tobytes()), list[int]()
    for _ in range(num_tokens):
        token_ids.append(checksum % VOCAB_SIZE)
        checksum = zlib.crc32(array("i", token_ids[-1:]).tobytes(), checksum)
    return token_ids


def new_request(
    request_id: str,
    prompt: Iterable[int],
    max_tokens: int,
    *,
    outbox: Outbox | None = None,
    stream: int = 0,
    stop: Sequence[int] = (),
    priority: int = 0,
    salt: str = "",
    arrival_time: float = 0.0,
    deadline: float | None = None,
) -> Request:
    token_ids = array("i", prompt)
    return Request(
        request_id=request_id,
        outbox=outbox or Outbox(),
        stream=stream,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        max_total_tokens=len(token_ids) + max_tokens,
        sampling=Sampling(temperature=0.0),
        stop_token_ids=list(stop),
        priority=priority,
        cache_salt=salt,
        arrival_time=arrival_time,
        deadline=deadline,
    )


@dataclasses.dataclass
class Slot:
    """A sequence on the fake device."""

    num_tokens: int
    num_computed: int
    num_blocks: int
    max_total_tokens: int
    stops: frozenset[int]
    checksum: int
    reason: int = CONTINUES


class FakeExecutor:
    """Runs one plan after the other, at once."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.slots: dict[int, Slot] = {}
        self.decode_set: dict[int, None] = {}
        self.failing: set[int] = set()  # slots that fail the next time they are computed
        self.device_time_ns = 0

    def run(self, plan: pb.StepPlan) -> list[pb.StepResult]:
        for slot in _ints(plan.release_slots):
            del self.slots[slot]
            self.decode_set.pop(slot, None)
        for sequence in plan.new_sequences:
            self._seat(sequence)
        for slot in _ints(plan.append_slots):
            self.slots[slot].num_blocks += 1
        counts = _ints(plan.prefill_counts)
        chunks = zip(
            _ints(plan.prefill_slots), _ints(plan.prefill_starts), counts, _ints(plan.prefill_samples), strict=True
        )
        sampled = [slot for slot, start, count, samples in chunks if self._prefill(slot, start, count, samples)]
        for slot in _ints(plan.leave_slots):
            del self.decode_set[slot]
        self.decode_set.update(dict.fromkeys(_ints(plan.join_slots)))
        num_decoding = len(self.decode_set) if plan.iterations else 0
        assert 0 < sum(counts) + num_decoding <= self.limits.max_tokens_per_step
        if not plan.iterations:
            return [self._sample(plan, 0, sampled)]
        results = [self._sample(plan, 0, sampled, partial=True)] if sampled else []
        return results + [self._decode(plan, index) for index in range(plan.iterations)]

    def _seat(self, sequence: pb.NewSequence) -> None:
        token_ids, num_blocks = _ints(sequence.token_ids), len(_ints(sequence.block_ids))
        assert sequence.slot not in self.slots, "the slot is taken"
        assert sequence.num_cached_tokens < len(token_ids) <= num_blocks * self.limits.block_size
        self.slots[sequence.slot] = Slot(
            num_tokens=len(token_ids),
            num_computed=sequence.num_cached_tokens,
            num_blocks=num_blocks,
            max_total_tokens=sequence.max_total_tokens,
            stops=frozenset(_ints(sequence.stop_token_ids)),
            checksum=zlib.crc32(sequence.token_ids),
        )

    def _prefill(self, slot: int, start: int, count: int, samples: int) -> bool:
        sequence = self.slots[slot]
        assert start == sequence.num_computed, "a chunk leaves a gap"
        sequence.num_computed += count
        assert bool(samples) == (sequence.num_computed == sequence.num_tokens)
        return bool(samples) or slot in self.failing

    def _decode(self, plan: pb.StepPlan, index: int) -> pb.StepResult:
        assert all(self.slots[slot].reason != LENGTH for slot in self.decode_set), "decodes past max_tokens"
        living = [slot for slot in self.decode_set if not self.slots[slot].reason]
        for slot in living:
            sequence = self.slots[slot]
            sequence.num_computed += 1
            assert sequence.num_computed == sequence.num_tokens <= sequence.num_blocks * self.limits.block_size
        return self._sample(plan, index, living)

    def _sample(self, plan: pb.StepPlan, index: int, slots: list[int], *, partial: bool = False) -> pb.StepResult:
        failed = [slot for slot in slots if slot in self.failing]
        self.failing.difference_update(failed)
        rows: list[tuple[int, int, int]] = []
        for slot in slots:
            sequence = self.slots[slot]
            if slot in failed:
                sequence.reason = STOP
                continue
            token = sequence.checksum % VOCAB_SIZE
            sequence.checksum = zlib.crc32(array("i", [token]).tobytes(), sequence.checksum)
            sequence.num_tokens += 1
            if token in sequence.stops:
                sequence.reason = STOP
            elif sequence.num_tokens == sequence.max_total_tokens:
                sequence.reason = LENGTH
            rows.append((slot, token, sequence.reason))
        columns = np.array(rows, dtype="<i4").reshape(-1, 3)
        return pb.StepResult(
            epoch=plan.epoch,
            step_id=plan.step_id + index,
            partial=partial,
            slots=columns[:, 0].tobytes(),
            token_ids=columns[:, 1].tobytes(),
            finish_reasons=columns[:, 2].tobytes(),
            slot_errors=[pb.SlotError(slot=slot, message="out of range") for slot in failed],
            device_time_ns=self.device_time_ns,
        )


class Core:
    """Pool and scheduler in front of a fake executor."""

    def __init__(
        self,
        limits: ExecutorLimits = LIMITS,
        *,
        inflight: int = 1,
        order: str = "fcfs",
        max_waiting: int = 1000,
        max_decode_stall_s: float = 0.4,
    ) -> None:
        self.limits = limits
        self.pool = RequestPool(ORDERS[order], max_waiting)
        self.scheduler = Scheduler(self.pool, Policy(inflight, max_decode_stall_s))
        self.outbox = Outbox()
        self.now = 0.0
        self.num_submitted = 0
        self.plans: list[StepPlan] = []
        self.begin_epoch()

    @property
    def epoch(self) -> Epoch:
        assert self.pool.epoch is not None
        return self.pool.epoch

    def begin_epoch(self, limits: ExecutorLimits | None = None) -> None:
        self.executor = FakeExecutor(limits or self.limits)
        self.in_flight: deque[list[pb.StepResult]] = deque()
        self.pool.begin_epoch(self.executor.limits)

    def submit(
        self,
        prompt: Iterable[int],
        max_tokens: int,
        *,
        request_id: str | None = None,
        stop: Sequence[int] = (),
        priority: int = 0,
        salt: str = "",
        deadline: float | None = None,
    ) -> Request:
        self.num_submitted += 1
        request = new_request(
            request_id or f"request-{self.num_submitted}",
            prompt,
            max_tokens,
            outbox=self.outbox,
            stream=self.num_submitted,
            stop=stop,
            priority=priority,
            salt=salt,
            arrival_time=self.now,
            deadline=deadline,
        )
        self.pool.submit(request)
        return request

    def send(self) -> StepPlan | None:
        """Schedule one plan and give it to the executor; its results wait for `settle`."""
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append(self.executor.run(plan.encode(epoch=1)))
        return plan

    def settle(self) -> None:
        """Apply the results of the oldest plan in flight."""
        for result in self.in_flight.popleft():
            apply_result(self.pool, decode_result(result))
        self.epoch.blocks.check()

    def step(self) -> None:
        """Send all plans that may be in flight, then settle the oldest."""
        while self.send() is not None:
            pass
        assert self.in_flight, "requests are alive and nothing can run"
        self.settle()

    def run(self) -> None:
        """Step until every request has ended and every plan is settled."""
        while self.pool.requests or self.in_flight:
            self.step()

    def streamed(self, request: Request) -> list[int]:
        """The tokens that the request's front end was told."""
        pairs = zip(self.outbox.streams, self.outbox.token_ids, strict=True)
        return [token for stream, token in pairs if stream == request.stream]

    def reason(self, request: Request) -> int | str | None:
        """The finish reason or the error code that the front end was told, None while there is none."""
        ends = [event.reason for event in self.outbox.finished if event.stream == request.stream]
        ends += [event.code for event in self.outbox.failed if event.stream == request.stream]
        assert len(ends) <= 1, "a stream ended twice"
        return ends[0] if ends else None


def _ints(column: bytes) -> list[int]:
    return np.frombuffer(column, dtype="<i4").tolist()
