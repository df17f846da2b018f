"""Thousands of requests against a cost model of a device: a plan takes a fixed time and a time for each token.

Time is simulated. Requests arrive at random, somewhat faster than they can be served, a third of them with one of a
few long system prompts, on a KV cache that is too small for all that run.
"""

import dataclasses
import random
from array import array

import pytest

from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.request import Request
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import StepPlan, decode_result
from tests.unit.core_harness import LENGTH, STOP, Core, continuation

LIMITS = ExecutorLimits(
    block_size=16, num_blocks=384, num_slots=64, max_tokens_per_step=512, max_model_len=512, max_inflight_plans=3
)
PLAN_S, TOKEN_S = 0.004, 0.00004
MAX_DECODE_STALL_S = 0.1
LONGEST_PLAN_S = PLAN_S + TOKEN_S * LIMITS.max_tokens_per_step
LONGEST_ANSWER_S = 100 * LONGEST_PLAN_S
SYSTEM_PROMPTS = [list(range(1000 * index, 1000 * index + 64)) for index in range(3)]


@dataclasses.dataclass
class Life:
    """What one stream saw."""

    request: Request
    prompt: list[int]
    expected: list[int]
    started_at: float = -1.0
    token_times: list[float] = dataclasses.field(default_factory=list)
    reason: int | None = None


class Simulation:
    """A core, a device that works plans off one after the other, and the clients."""

    def __init__(self, num_requests: int, order: str, seed: int) -> None:
        self.core = Core(
            LIMITS, inflight=2, order=order, max_waiting=num_requests, max_decode_stall_s=MAX_DECODE_STALL_S
        )
        self.rng = random.Random(seed)
        self.arrivals = self._arrivals(num_requests)
        self.lives: list[Life] = []
        self.start_order: list[int] = []
        self.plan_ends: list[float] = []  # of the plans in flight

    def _arrivals(self, num_requests: int) -> list[float]:
        times, now = list[float](), 0.0
        for _ in range(num_requests):
            now += self.rng.expovariate(100.0)
            times.append(now)
        return times[::-1]

    def run(self) -> None:
        core = self.core
        while self.arrivals or core.pool.requests:
            if not core.pool.requests:
                core.now = max(core.now, self.arrivals[-1])
            self._submit_what_has_arrived()
            while (plan := core.send()) is not None:
                began = max(core.now, self.plan_ends[-1] if self.plan_ends else 0.0)
                self.plan_ends.append(began + self._cost(plan))
            self._note_events()
            core.now = self.plan_ends.pop(0)
            for result in core.in_flight.popleft():
                apply_result(core.pool, decode_result(result))
            self._note_events()

    def _cost(self, plan: StepPlan) -> float:
        num_decoding = len(self.core.executor.decode_set) if plan.iterations else 0
        return PLAN_S + TOKEN_S * (sum(chunk.count for chunk in plan.chunks) + num_decoding)

    def _submit_what_has_arrived(self) -> None:
        while self.arrivals and self.arrivals[-1] <= self.core.now:
            self.arrivals.pop()
            prompt = [self.rng.randrange(1000) for _ in range(self.rng.randint(1, 150))]
            if self.rng.random() < 0.3:
                prompt = self.rng.choice(SYSTEM_PROMPTS) + prompt
            max_tokens = self.rng.randint(1, 100)
            expected, stop = continuation(prompt, max_tokens), list[int]()
            if self.rng.random() < 0.3:
                stop = [self.rng.choice(expected)]
                expected = expected[: expected.index(stop[0]) + 1]
            request = self.core.submit(prompt, max_tokens, stop=stop)
            self.lives.append(Life(request, prompt, expected))

    def _note_events(self) -> None:
        outputs = self.core.outbox.take()
        if outputs is None:
            return
        assert not outputs.failed
        for started in outputs.started:
            self.lives[started.stream - 1].started_at = self.core.now
            self.start_order.append(started.stream)
        for stream in array("i", outputs.streams):
            self.lives[stream - 1].token_times.append(self.core.now)
        for finished in outputs.finished:
            self.lives[finished.stream - 1].reason = finished.reason


def assert_all_served(simulation: Simulation, num_requests: int) -> None:
    assert len(simulation.lives) == num_requests
    for life in simulation.lives:
        assert list(life.request.token_ids) == life.prompt + life.expected
        assert len(life.token_times) == len(life.expected)
        assert life.reason == (STOP if life.expected[-1] in life.request.stop_token_ids else LENGTH)
    core = simulation.core
    while core.in_flight:
        core.settle()
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks
    assert not core.epoch.running
    assert sorted(core.epoch.free_slots) == list(range(LIMITS.num_slots))
    core.epoch.blocks.check()


def test_ten_thousand_requests_are_served_in_order_and_none_starves():
    simulation = Simulation(10_000, "fcfs", seed=1)
    simulation.run()
    assert_all_served(simulation, 10_000)
    counters = simulation.core.pool.counters
    assert counters.preemptions > 100, "the cache is too large to test anything"
    assert counters.cached_tokens > 10_000

    latest = 0
    for position, stream in enumerate(simulation.start_order):
        latest = max(latest, stream)
        assert latest - (position + 1) <= 8, "only twins of a prefill under way let a few others pass"

    head_since = 0.0
    for life in simulation.lives:
        head_since = max(head_since, life.request.arrival_time)
        assert life.started_at - head_since <= LONGEST_ANSWER_S, "the head of the queue waits for room, not for ever"
        head_since = max(head_since, life.started_at)
        times = [life.started_at, *life.token_times]
        longest_gap = max(after - before for before, after in zip(times, life.token_times, strict=False))
        if not life.request.preemptions:
            assert longest_gap <= MAX_DECODE_STALL_S + 4 * LONGEST_PLAN_S, "a running stream stands still"
        assert life.token_times[-1] - life.started_at <= 2 * LONGEST_ANSWER_S


@pytest.mark.parametrize("order", ["priority", "shortest-remaining"])
def test_a_thousand_requests_are_served_in_any_order(order: str):
    simulation = Simulation(1000, order, seed=2)
    simulation.run()
    assert_all_served(simulation, 1000)
