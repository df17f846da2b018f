"""What constrained requests cost the others, on a clock of the test's own: a device that runs its plans one after the
other, a core that hears of them a little later, and masks that take their time.
"""

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable

import pytest

from scheduler_service.core.masks import give_mask
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import decode_result
from tests.unit.core_harness import LIMITS, Core
from tests.unit.test_constrained import forced_token, mask_of, submit

HOP_S = 0.0002  # from the device to the core, and back
ROOMY = dataclasses.replace(LIMITS, num_slots=32, num_blocks=20_000, max_tokens_per_step=512, max_model_len=10_000)
NUM_TOKENS = 9_000
NUM_STEPS = 150  # that are measured
SMOOTHING = 0.2


class TimedCore:
    """A core whose plans take `step_s` a step, and whose masks take what `mask_s` says."""

    def __init__(self, step_s: float, mask_s: Callable[[], float], inflight: int) -> None:
        self.core = Core(ROOMY, inflight=inflight)
        self.core.executor.device_time_ns = int(step_s * 1e9)
        self._step_s = step_s
        self._mask_s = mask_s
        self._device_free_at = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._masks_wanted = False

    def run(self, until: float) -> None:
        """Let events happen, in their order, up to a time in seconds."""
        self._pump()
        while self._events and self._events[0][0] <= until:
            self.core.now, _, event = heapq.heappop(self._events)
            event()
            self._pump()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._ids), event))

    def _pump(self) -> None:
        self._ask_for_masks()
        while self.core.send() is not None:
            self._device_free_at = max(self._device_free_at, self.core.now + HOP_S)
            for result in self.core.in_flight.pop():
                self._device_free_at += self._step_s
                self._at(self._device_free_at + HOP_S, lambda result=result: self._settle(result))

    def _settle(self, result: object) -> None:
        apply_result(self.core.pool, decode_result(result))  # pyright: ignore[reportArgumentType]

    def _ask_for_masks(self) -> None:
        """One batch at a time, as MaskSource does."""
        if self._masks_wanted or not self.core.pool.unmasked:
            return
        self._masks_wanted, latency_s = True, self._mask_s()
        requests, self.core.pool.unmasked = self.core.pool.unmasked, []
        self._at(self.core.now + latency_s, lambda: self._give(requests, latency_s))

    def _give(self, requests: list[Request], latency_s: float) -> None:
        self._masks_wanted, pool = False, self.core.pool
        average = pool.mask_latency_ns or latency_s * 1e9
        pool.mask_latency_ns = average + SMOOTHING * (latency_s * 1e9 - average)
        for request in requests:
            if request.state is not RequestState.FINISHED:
                give_mask(pool, request, mask_of(forced_token(request)))


def tokens_per_second(
    step_s: float, mask_s: Callable[[], float], inflight: int, num_constrained: int
) -> tuple[float, float]:
    """Of an unconstrained stream and of a constrained one, once all of them run."""
    timed = TimedCore(step_s, mask_s, inflight)
    free = [timed.core.submit(range(100 * index, 100 * index + 4), NUM_TOKENS) for index in range(8)]
    constrained = [submit(timed.core, 10 * index, NUM_TOKENS) for index in range(num_constrained)]
    begin = 40 * step_s + 0.2
    timed.run(begin)
    before = [request.num_output_tokens for request in free + constrained]
    timed.run(begin + NUM_STEPS * step_s)
    counts = [request.num_output_tokens - count for request, count in zip(free + constrained, before, strict=True)]
    rates = [count / (NUM_STEPS * step_s) for count in counts]
    return min(rates[:8]), min(rates[8:], default=0.0)


@pytest.mark.parametrize("inflight", [2, 3])
@pytest.mark.parametrize("mask_ms", [0.3, 2.0, 30.0])
@pytest.mark.parametrize("step_ms", [1.0, 2.0, 6.0, 20.0])
def test_unconstrained_streams_lose_less_than_three_percent(step_ms: float, mask_ms: float, inflight: int):
    alone, _ = tokens_per_second(step_ms / 1000, lambda: mask_ms / 1000, inflight, 0)
    beside, constrained = tokens_per_second(step_ms / 1000, lambda: mask_ms / 1000, inflight, 8)
    assert alone == pytest.approx(1000 / step_ms, rel=0.02), "the device never waits"
    assert beside > 0.97 * alone
    steps_a_token = inflight + 1 + math.ceil(mask_ms / step_ms)  # the mask's own, and those that are in flight then
    assert constrained * NUM_STEPS * step_ms / 1000 >= NUM_STEPS // steps_a_token - 1


@pytest.mark.parametrize("inflight", [2, 3])
def test_unconstrained_streams_lose_less_than_three_percent_though_some_masks_are_late(inflight: int):
    rng = random.Random(0)
    beside, _ = tokens_per_second(0.002, lambda: 0.006 if rng.random() < 0.05 else 0.0003, inflight, 8)
    assert beside > 0.97 / 0.002


def test_constrained_streams_get_a_token_in_every_other_step_where_masks_are_quick():
    _, constrained = tokens_per_second(0.006, lambda: 0.0005, 2, 8)
    assert constrained == pytest.approx(0.5 / 0.006, rel=0.02)


def test_constrained_streams_alone_wait_for_their_masks_and_nothing_else():
    timed = TimedCore(0.006, lambda: 0.0005, 2)
    requests = [submit(timed.core, 10 * index, NUM_TOKENS) for index in range(8)]
    timed.run(1.0)
    before = requests[0].num_output_tokens
    timed.run(3.0)
    assert (requests[0].num_output_tokens - before) / 2 == pytest.approx(1 / (0.006 + 2 * HOP_S + 0.0005), rel=0.02)
