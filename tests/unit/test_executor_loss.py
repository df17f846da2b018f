"""What an epoch takes with it when the executor is lost, and what it does not."""

import dataclasses

import pytest

from scheduler_service.core.request import RequestState
from tests.unit.core_harness import LIMITS, Core, continuation


def prompt(start: int, length: int = 8) -> list[int]:
    return list(range(start, start + length))


@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13])
def test_the_loss_of_the_executor_keeps_every_known_token_and_streams_go_on(inflight: int, steps: int):
    core = Core(dataclasses.replace(LIMITS, num_blocks=16, num_slots=3), inflight=inflight)
    requests = [core.submit(prompt(100 * index, 6 + index), 16) for index in range(5)]
    for _ in range(steps):
        core.step()
    core.send()
    told = {request.stream: core.streamed(request) for request in requests}
    running = [request for request in requests if request.state is RequestState.RUNNING]
    core.pool.end_epoch()
    assert core.scheduler.schedule(core.now) is None
    core.begin_epoch()
    core.run()
    assert core.epoch.blocks.num_free_blocks == 16
    for index, request in enumerate(requests):
        streamed = core.streamed(request)
        assert streamed[: len(told[request.stream])] == told[request.stream]
        assert streamed == continuation(prompt(100 * index, 6 + index), 16), "none lost, none twice"
        assert request.recoveries == (request in running)
    assert len(core.outbox.started) == len(requests)


def test_a_loss_while_a_preempted_request_waits_for_plans_in_flight_does_not_hold_it_back():
    core = Core(dataclasses.replace(LIMITS, num_blocks=8), inflight=3)
    first, second = core.submit(prompt(0), 24), core.submit(prompt(100), 24)
    while not second.preemptions:
        if core.send() is None:
            core.settle()
    core.pool.end_epoch()
    core.begin_epoch()
    core.pool.cancel(first, core.now)
    plan = core.send()
    assert plan is not None
    assert [chunk.request for chunk in plan.chunks] == [second]
    core.run()
    assert core.streamed(second) == continuation(prompt(100), 24)


def test_a_new_executor_too_small_for_a_request_fails_it_with_a_clear_status():
    core = Core()
    big, small = core.submit(prompt(0, 30), 20), core.submit(prompt(100), 10)
    core.step()
    core.pool.end_epoch()
    core.begin_epoch(dataclasses.replace(LIMITS, num_blocks=8))
    core.run()
    assert core.reason(big) == "UNAVAILABLE"
    assert "32 tokens" in core.outbox.failed[0].message
    assert core.streamed(small) == continuation(prompt(100), 10)
