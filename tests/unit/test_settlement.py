"""What results change: late stops, tokens of requests that are gone, failed slots."""

import dataclasses

import pytest

from scheduler_service.core.load import load_of
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import decode_result
from tests.unit.core_harness import CANCELLED, LENGTH, LIMITS, STOP, Core, continuation


def prompt(start: int, length: int = 8) -> list[int]:
    return list(range(start, start + length))


def assert_idle(core: Core) -> None:
    """Nothing is alive and every block is back."""
    core.run()
    load = load_of(core.pool, 0.0)
    assert (load.waiting_requests, load.running_requests, load.used_blocks) == (0, 0, 0)


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_a_late_stop_token_ends_the_stream_and_what_comes_after_it_is_dropped(inflight: int):
    core = Core(inflight=inflight)
    expected = continuation(prompt(0), 5)
    request, other = core.submit(prompt(0), 30, stop=[expected[-1]]), core.submit(prompt(100), 30)
    core.run()
    assert core.streamed(request) == expected
    assert core.reason(request) == STOP
    assert core.outbox.finished[0].stop_token_id == expected[-1]
    assert core.outbox.finished[0].output_tokens == 5
    assert core.streamed(other) == continuation(prompt(100), 30)
    assert_idle(core)


def test_a_length_stop_names_no_stop_token():
    core = Core()
    core.submit(prompt(0), 2)
    core.run()
    assert [(event.reason, event.stop_token_id) for event in core.outbox.finished] == [(LENGTH, None)]


def test_blocks_of_a_stopped_request_may_be_taken_while_its_plans_are_in_flight():
    core = Core(dataclasses.replace(LIMITS, num_blocks=4), inflight=3)
    expected = continuation(prompt(0), 3)
    first, second = core.submit(prompt(0), 8, stop=[expected[-1]]), core.submit(prompt(100), 8)
    core.run()
    assert core.streamed(first) == expected
    assert core.streamed(second) == continuation(prompt(100), 8)
    admission = next(plan for plan in core.plans if plan.chunks and plan.chunks[0].request is second)
    assert admission.release_slots == [admission.new_sequences[0].slot], "slot and blocks change hands in one plan"


def test_first_tokens_leave_before_the_decode_step_of_the_same_plan_is_done():
    core = Core(max_decode_stall_s=0.0)
    core.submit(prompt(0), 20)
    core.step()
    core.submit(prompt(100, 20), 20)
    core.step()
    newcomer = core.submit(prompt(200, 4), 20)
    plan = core.send()
    assert plan is not None
    assert plan.iterations == 1
    first_part, second_part = core.in_flight.popleft()
    apply_result(core.pool, decode_result(first_part))
    assert core.streamed(newcomer) == continuation(prompt(200, 4), 1)
    assert core.epoch.num_plans_in_flight == 1, "the step is not over"
    apply_result(core.pool, decode_result(second_part))
    assert core.epoch.num_plans_in_flight == 0
    core.run()


def test_a_result_out_of_order_is_our_own_bug():
    core = Core(inflight=2)
    core.submit(prompt(0), 9)
    core.send()
    core.send()
    with pytest.raises(AssertionError, match="where 1 is due"):
        apply_result(core.pool, decode_result(core.in_flight[1][0]))


# --- cancellation ----------------------------------------------------------------------------------------------------


def waiting_request(core: Core) -> Request:
    core.submit(prompt(0), 20)
    core.submit(prompt(100), 20)
    core.step()
    return core.submit(prompt(200), 20)


def prefilling_request(core: Core) -> Request:
    request = core.submit(prompt(0, 20), 12)
    core.send()
    assert core.epoch.prefilling == [request]
    return request


def decoding_request(core: Core) -> Request:
    core.submit(prompt(0), 20)
    request = core.submit(prompt(100), 20)
    for _ in range(5):
        core.step()
    assert request.num_output_tokens > 1
    return request


def preempted_request(core: Core) -> Request:
    core.submit(prompt(0), 24)
    request = core.submit(prompt(100), 24)
    while not request.preemptions:
        core.step()
    return request


def last_token_in_flight(core: Core) -> Request:
    request = core.submit(prompt(0), 2)
    core.send()
    core.send()
    return request


@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("state", [waiting_request, prefilling_request, decoding_request, preempted_request])
def test_a_cancelled_request_ends_at_once_whatever_it_was_doing(state, inflight: int):
    core = Core(dataclasses.replace(LIMITS, num_blocks=8, num_slots=2), inflight=inflight)
    request = state(core)
    core.pool.cancel(request, core.now)
    told = core.streamed(request)
    core.send()
    heir = core.submit(prompt(300), 6)
    assert_idle(core)
    assert (core.reason(request), core.streamed(request)) == (CANCELLED, told), "tokens in flight are dropped"
    assert told == continuation(request.token_ids[: request.num_prompt_tokens], len(told))
    assert core.streamed(heir) == continuation(prompt(300), 6)
    assert all(len(core.streamed(r)) == r.max_total_tokens - r.num_prompt_tokens for r in others(core, request))


def others(core: Core, request: Request) -> list[Request]:
    seen = {chunk.request.stream: chunk.request for plan in core.plans for chunk in plan.chunks}
    return [other for other in seen.values() if other is not request]


def test_a_request_whose_last_token_is_in_flight_can_be_cancelled():
    core = Core(inflight=3)
    request = last_token_in_flight(core)
    core.pool.cancel(request, core.now)
    assert_idle(core)
    assert (core.reason(request), core.streamed(request)) == (CANCELLED, [])


def test_tokens_that_nobody_gets_are_not_counted_as_generated():
    core = Core(inflight=3)
    request = core.submit(prompt(0), 20)
    core.send()
    core.send()
    core.settle()
    core.pool.cancel(request, core.now)
    core.run()
    assert core.pool.counters.output_tokens == len(core.streamed(request)) == 1


# --- failed slots ----------------------------------------------------------------------------------------------------


def test_a_failed_slot_fails_its_request_alone(caplog: pytest.LogCaptureFixture):
    core = Core(inflight=2)
    failing, healthy = core.submit(prompt(0), 20), core.submit(prompt(100), 20)
    for _ in range(4):
        core.step()
    assert failing.slot is not None
    core.executor.failing = {failing.slot}
    assert_idle(core)
    assert core.reason(failing) == "INTERNAL"
    message = core.outbox.failed[0].message
    assert "out of range" in message
    assert message.split()[2].strip(",") in caplog.text, "the id is found in the log"
    assert core.streamed(failing) == continuation(prompt(0), len(core.streamed(failing)))
    assert core.streamed(healthy) == continuation(prompt(100), 20)
    assert healthy.preemptions == 0


def test_blocks_of_a_failed_request_are_hit_by_nobody():
    core = Core()
    failing = core.submit(prompt(0, 20), 20)
    core.step()
    core.step()
    assert failing.slot is not None
    core.executor.failing = {failing.slot}
    core.run()
    assert core.reason(failing) == "INTERNAL"
    again = core.submit(prompt(0, 20), 2)
    core.run()
    assert again.cached_tokens == 0
    assert core.streamed(again) == continuation(prompt(0, 20), 2)


def test_a_prefix_that_the_failed_request_only_hit_stays_cached():
    core = Core()
    core.submit(prompt(0, 9), 1)
    core.run()
    failing = core.submit([*prompt(0), 500, 501, 502, 503, 504], 9)
    core.step()
    assert (failing.cached_tokens, failing.slot is None) == (8, False)
    core.executor.failing = {failing.slot or 0}
    core.run()
    again = core.submit([*prompt(0), 500, 501, 502, 503, 504], 1)
    core.run()
    assert again.cached_tokens == 8


def sharers_of_a_failing_request(core: Core) -> tuple[Request, Request, Request]:
    """A request that fails in its first step, one that hit its blocks, and one that hit the blocks of that one."""
    source = core.submit(prompt(0, 9), 20)
    core.send()
    assert source.slot is not None
    sharer = core.submit([*prompt(0), 300, 301, 302, 303, 304], 20)
    core.send()
    last = core.submit([*prompt(0), 300, 301, 302, 303, 400], 20)
    core.send()
    assert (sharer.num_cached_blocks, last.num_cached_blocks) == (2, 3)
    failed = core.in_flight[0][0]
    slot = int.from_bytes(failed.slots[:4], "little")
    failed.Clear()
    failed.step_id = 1
    failed.slot_errors.add(slot=slot, message="not a number")
    return source, sharer, last


def test_whoever_hit_a_block_of_a_failed_request_computes_it_again():
    core = Core(inflight=3)
    source, sharer, last = sharers_of_a_failing_request(core)
    core.settle()
    assert core.reason(source) == "INTERNAL"
    assert (sharer.state, last.state) == (RequestState.WAITING, RequestState.WAITING)
    assert len(core.epoch.blocks.prefix_cache) == 0
    before = len(core.plans)
    core.run()
    first_chunk = {}
    for plan in core.plans[before:]:
        for chunk in plan.chunks:
            first_chunk.setdefault(chunk.request.request_id, chunk.start)
    assert first_chunk[sharer.request_id] == 0
    assert core.streamed(sharer) == continuation([*prompt(0), 300, 301, 302, 303, 304], 20)
    assert core.streamed(last) == continuation([*prompt(0), 300, 301, 302, 303, 400], 20)


def test_tokens_in_flight_that_were_computed_from_a_failed_block_are_dropped():
    core = Core(inflight=3)
    _, sharer, last = sharers_of_a_failing_request(core)
    for results in list(core.in_flight)[1:]:
        for result in results:
            result.token_ids = bytes(len(result.token_ids))  # what a device makes of garbage
    core.settle()
    core.settle()
    core.settle()
    assert core.streamed(sharer) == core.streamed(last) == []
    core.run()
    assert core.streamed(sharer) == continuation([*prompt(0), 300, 301, 302, 303, 304], 20)
    assert core.streamed(last) == continuation([*prompt(0), 300, 301, 302, 303, 400], 20)
    assert_idle(core)


# --- measured times --------------------------------------------------------------------------------------------------


def test_a_step_whose_rows_were_all_done_says_nothing_of_the_time_of_a_step():
    core = Core(inflight=2)
    core.executor.device_time_ns = 3_000_000
    core.submit(prompt(0), 1 << 6, stop=tuple(range(1 << 20)))
    core.step()
    before = core.epoch.decode_step_ns
    core.executor.device_time_ns = 1_000
    core.run()
    assert core.epoch.decode_step_ns == before == 0.0
