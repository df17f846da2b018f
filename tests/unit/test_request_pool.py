"""How requests enter and leave: ids, the queue's limit, deadlines, and the counters."""

import dataclasses

import pytest

from scheduler_service.core.load import load_of
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import RequestState
from scheduler_service.core.resumption import leave_all
from scheduler_service.errors import DuplicateRequest, QueueFull
from tests.unit.core_harness import LENGTH, LIMITS, Core, continuation, new_request


def test_an_id_in_use_is_refused_and_free_again_after_its_request():
    core = Core()
    core.submit(range(4), 3, request_id="mine")
    with pytest.raises(DuplicateRequest) as refusal:
        core.submit(range(4), 3, request_id="mine")
    assert refusal.value.field == "request_id"
    core.run()
    again = core.submit(range(4), 3, request_id="mine")
    core.run()
    assert core.streamed(again) == continuation(range(4), 3)


def test_a_full_queue_refuses_with_a_delay_and_takes_the_next_once_there_is_room():
    core = Core(dataclasses.replace(LIMITS, num_slots=1), max_waiting=2)
    first = core.submit(range(4), 3)
    core.step()
    for _ in range(2):
        core.submit(range(4), 3)
    with pytest.raises(QueueFull) as refusal:
        core.submit(range(4), 3, request_id="refused")
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s > 0
    assert not core.pool.choices_of(("", "refused"))
    while core.reason(first) is None:
        core.step()
    core.send()
    core.submit(range(4), 3, request_id="refused")
    core.run()
    assert core.pool.counters.finished_requests == 4


def test_a_deadline_holds_in_the_queue():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    running = core.submit(range(8), 20)
    core.step()
    hurried = core.submit(range(100, 108), 4, deadline=1.0)
    core.pool.expire(0.99)
    assert core.reason(hurried) is None
    core.pool.expire(1.0)
    assert core.reason(hurried) == "DEADLINE_EXCEEDED"
    core.run()
    assert (core.reason(running), core.streamed(hurried)) == (LENGTH, [])


@pytest.mark.parametrize("inflight", [1, 3])
def test_a_deadline_holds_while_running_and_frees_what_the_request_held(inflight: int):
    core = Core(inflight=inflight)
    hurried, other = core.submit(range(8), 50, deadline=1.0), core.submit(range(100, 108), 20)
    for _ in range(6):
        core.step()
    told = core.streamed(hurried)
    assert told
    core.pool.expire(2.0)
    core.run()
    assert core.reason(hurried) == "DEADLINE_EXCEEDED"
    assert core.streamed(hurried) == told == continuation(range(8), len(told))
    assert core.streamed(other) == continuation(range(100, 108), 20)
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks


def test_deadlines_of_requests_that_have_ended_pass_unnoticed():
    core = Core()
    request = core.submit(range(4), 2, deadline=5.0)
    core.run()
    core.pool.expire(9.0)
    assert core.reason(request) == LENGTH


def test_requests_expire_each_at_its_own_deadline():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    requests = [core.submit(range(4), 2, deadline=deadline) for deadline in (3.0, 1.0, 2.0, 1.0)]
    core.pool.expire(1.5)
    assert [core.reason(request) for request in requests] == [None, "DEADLINE_EXCEEDED", None, "DEADLINE_EXCEEDED"]


def test_dropping_a_front_end_ends_its_requests_and_no_others():
    core = Core(dataclasses.replace(LIMITS, num_slots=2), inflight=2)
    gone = Outbox()
    lost = [new_request(f"lost-{index}", range(10 * index, 10 * index + 4), 9, outbox=gone) for index in range(3)]
    kept = core.submit(range(100, 108), 9)
    for request in lost:
        core.pool.submit(request)
    core.step()
    leave_all(core.pool, gone)
    assert all(request.state is RequestState.FINISHED for request in lost)
    core.run()
    assert core.streamed(kept) == continuation(range(100, 108), 9)
    assert not gone.finished
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks


def test_only_requests_that_have_waited_too_long_for_an_executor_are_unavailable():
    core = Core()
    old = core.submit(range(4), 4)
    core.step()
    core.now = 50.0
    young = core.submit(range(4), 4)
    core.pool.end_epoch()
    core.pool.fail_older_than(10.0, "no executor for 60 seconds")
    assert (core.reason(old), core.reason(young)) == ("UNAVAILABLE", None)
    core.begin_epoch()
    core.run()
    assert core.streamed(young) == continuation(range(4), 4)


def test_the_counters_add_up():
    core = Core(dataclasses.replace(LIMITS, max_tokens_per_step=64))
    for _ in range(2):
        core.submit(range(10), 5)
        core.run()
    load = load_of(core.pool, 1.0)
    assert (load.prompt_tokens_total, load.cached_tokens_total, load.prefill_tokens_total) == (20, 8, 12)
    assert (load.output_tokens_total, load.finished_requests_total, load.steps_total) == (10, 2, 10)
    assert (load.used_blocks, load.total_blocks, load.block_size) == (0, 64, 4)


# --- times -----------------------------------------------------------------------------------------------------------


def times_s(core: Core) -> list[tuple[float, float]]:
    """Queue time and time to first token of each request that finished."""
    return [(event.queue_time_ns / 1e9, event.time_to_first_token_ns / 1e9) for event in core.outbox.finished]


def test_usage_tells_when_a_request_left_the_queue_and_when_its_first_token_came():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    core.now = 100.0
    core.submit(range(40), 3)  # three chunks, then two tokens more: five plans
    core.now = 101.0
    core.submit(range(100, 108), 3)
    while core.pool.requests:
        core.now += 1.0  # plans are sent at 102, 103.25, ...
        core.send()
        core.now += 0.25
        core.settle()
    sixth = 102.0 + 5 * 1.25
    assert times_s(core) == [(2.0, 2 + 2 * 1.25 + 0.25), (sixth - 101, sixth + 0.25 - 101)]


def test_the_times_are_those_of_the_first_admission_and_the_first_token_of_all():
    core = Core()
    request = core.submit(range(8), 6)
    core.now = 3.0
    core.step()
    core.now = 50.0
    core.pool.preempt(request)
    core.step()
    core.pool.end_epoch()
    core.now = 90.0
    core.begin_epoch()
    core.run()
    assert (request.preemptions, request.recoveries) == (1, 1)
    assert times_s(core) == [(3.0, 3.0)]


def test_a_request_that_was_preempted_before_its_first_token_waits_for_it_still():
    core = Core()
    request = core.submit(range(40), 2)
    core.step()
    core.pool.preempt(request)
    core.now = 7.0
    core.run()
    assert times_s(core) == [(0.0, 7.0)]


def test_a_request_cancelled_in_the_queue_has_a_queue_time_and_no_first_token():
    core = Core()
    request = core.submit(range(8), 6)
    core.now = 2.5
    core.pool.cancel(request, core.now)
    assert times_s(core) == [(2.5, 0.0)]


def test_choices_have_times_of_their_own():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    core.submit_choices(3, range(8), 2)
    while core.pool.requests:
        core.now += 1.0
        core.step()
    assert times_s(core) == [(1.0, 1.0), (3.0, 3.0), (5.0, 5.0)]


def test_a_clock_that_the_front_end_read_later_makes_no_time_negative():
    core = Core()
    core.now = 5.0
    core.submit(range(8), 1)
    core.now = 4.0
    core.run()
    assert times_s(core) == [(0.0, 0.0)]
