"""Constrained requests in the core: when they run, beside whom, and how they end. Masks come when the test says so."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from scheduler_service.core.load import load_of
from scheduler_service.core.masks import give_mask, refuse
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.resumption import leave_all
from scheduler_service.core.step_plan import StepPlan
from scheduler_service.errors import QueueFull
from scheduler_service.ipc import Sampling
from tests.unit.core_harness import (
    CANCELLED,
    LENGTH,
    LIMITS,
    STOP,
    VOCAB_SIZE,
    Core,
    continuation,
    new_request,
    small_cache,
)

NUM_WORDS = -(-VOCAB_SIZE // 32)


def prompt(start: int, length: int = 4) -> list[int]:
    return list(range(start, start + length))


def mask_of(*token_ids: int) -> NDArray[np.int32]:
    flags = np.zeros(NUM_WORDS * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view("<i4")


def submit(core: Core, start: int, max_tokens: int, length: int = 4, **changes: object) -> Request:
    """A constrained request, whose grammar is not compiled yet."""
    core.num_submitted += 1
    stream = core.num_submitted
    request = new_request(f"request-{stream}", prompt(start, length), max_tokens, outbox=core.outbox, stream=stream)
    request = dataclasses.replace(request, constraint="a grammar", arrival_time=core.now, **changes)
    core.pool.submit(request)
    return request


def forced_token(request: Request) -> int:
    """What the masks of these tests allow: a token for each length, and nothing else."""
    return (7 * len(request.token_ids)) % VOCAB_SIZE


def answer(core: Core, *requests: Request) -> None:
    """Give these of the requests that lack a mask one; all of them unless named."""
    wanted, core.pool.unmasked = core.pool.unmasked, []
    for request in wanted:
        if request.state is RequestState.FINISHED:
            continue
        if requests and request not in requests:
            core.pool.unmasked.append(request)
        else:
            give_mask(core.pool, request, mask_of(forced_token(request)))


def expected(start: int, count: int, length: int = 4) -> list[int]:
    return [(7 * position) % VOCAB_SIZE for position in range(length, length + count)]


def run(core: Core) -> None:
    """Until nothing lives, with masks that come after each settled plan."""
    while core.pool.requests or core.in_flight:
        answer(core)
        while core.send() is not None:
            pass
        if core.in_flight:
            core.settle()


def slots(plan: StepPlan | None) -> tuple[list[int], list[int], list[int]]:
    """Slots that join, leave and have masks."""
    assert plan is not None
    return plan.join_slots, plan.leave_slots, plan.mask_slots


# --- compiling -------------------------------------------------------------------------------------------------------


def test_a_constrained_request_waits_for_its_grammar_and_others_pass_it():
    core = Core()
    first, second = submit(core, 0, 3), core.submit(prompt(100), 3)
    assert first.state is RequestState.COMPILING
    assert load_of(core.pool, 0.0).waiting_requests == 2
    core.step()
    assert (core.streamed(second), core.streamed(first)) == (continuation(prompt(100), 1), [])
    answer(core)
    assert first.state is RequestState.WAITING
    run(core)
    assert core.streamed(first) == expected(0, 3)
    assert core.streamed(second) == continuation(prompt(100), 3)


def test_a_compiled_request_has_the_place_in_the_queue_that_its_arrival_gave_it():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    running = core.submit(prompt(0), 3)
    core.step()
    early, late = submit(core, 100, 2), core.submit(prompt(200), 2)
    answer(core)
    run(core)
    assert [event.stream for event in core.outbox.started] == [running.stream, early.stream, late.stream]


def test_requests_that_compile_count_as_waiting():
    core = Core(max_waiting=2)
    submit(core, 0, 3)
    submit(core, 100, 3)
    with pytest.raises(QueueFull):
        submit(core, 200, 3)
    with pytest.raises(QueueFull):
        core.submit(prompt(300), 3)


@pytest.mark.parametrize("how", ["cancel", "deadline", "drop", "front end", "loss"])
def test_a_request_may_end_while_it_compiles(how: str):
    core = Core()
    request = submit(core, 0, 3, deadline=5.0)
    match how:
        case "cancel":
            core.pool.cancel(request, core.now)
        case "deadline":
            core.pool.expire(6.0)
        case "drop":
            core.pool.drop(request)
        case "front end":
            leave_all(core.pool, core.outbox)
        case "loss":
            core.pool.end_epoch()
            core.begin_epoch()
            answer(core)
            run(core)
            assert (core.streamed(request), request.recoveries) == (expected(0, 3), 0)
    assert core.reason(request) == {"cancel": CANCELLED, "deadline": "DEADLINE_EXCEEDED", "loss": LENGTH}.get(how)
    answer(core)
    run(core)
    assert (core.pool.num_waiting, len(core.pool.requests)) == (0, 0)


def test_a_grammar_that_does_not_compile_fails_its_request_alone_and_names_the_field():
    core = Core()
    wrong, right = submit(core, 0, 3), submit(core, 100, 3)
    refuse(core.pool, wrong, "unclosed group")
    run(core)
    (failed,) = core.outbox.failed
    assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
    assert (failed.message, failed.field) == ("unclosed group", "constraint")
    assert core.streamed(right) == expected(100, 3)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_every_token_is_sampled_under_the_mask_of_those_before_it(inflight: int):
    core = Core(inflight=inflight)
    requests = [submit(core, 100 * index, 5 + index, length=3 + 5 * index) for index in range(4)]
    run(core)
    for index, request in enumerate(requests):
        assert core.streamed(request) == expected(0, 5 + index, 3 + 5 * index)
        assert core.reason(request) == LENGTH
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks
    assert all(plan.iterations <= 1 for plan in core.plans)


def test_the_mask_of_the_first_token_comes_with_the_last_chunk_of_the_prompt():
    core = Core()
    request = submit(core, 0, 2, length=40)
    answer(core)
    for _ in range(3):
        core.step()
    assert [plan.mask_slots for plan in core.plans] == [[], [], [request.slot]]


def test_a_slot_joins_with_its_mask_and_leaves_with_the_next_plan_in_which_it_does_not_decode():
    core = Core(inflight=2)
    request, other = submit(core, 0, 9), core.submit(prompt(100), 90)
    answer(core)
    first = core.send()  # both prompts
    a, b = request.slot, other.slot
    assert slots(first) == ([], [], [a])
    assert slots(core.send()) == ([b], [], []), "the first token of the constrained one is in flight"
    core.settle()
    answer(core)
    assert slots(core.send()) == ([a], [], [a])
    core.settle()
    assert slots(core.send()) == ([], [a], [])
    core.settle()
    answer(core)
    assert slots(core.send()) == ([a], [], [a])
    run(core)
    assert core.streamed(request) == expected(0, 9)
    assert core.streamed(other) == continuation(prompt(100), 90)


def test_a_slot_that_decodes_in_consecutive_plans_stays():
    core = Core()
    request = submit(core, 0, 4)
    answer(core)
    core.step()
    for joins in ([request.slot], []):
        answer(core)
        core.step()
        assert slots(core.plans[-1]) == (joins, [], [request.slot])


def test_others_go_on_without_those_whose_masks_are_late():
    core = Core(inflight=2)
    request, other = submit(core, 0, 3), core.submit(prompt(100), 30)
    answer(core)
    for _ in range(20):
        core.step()
    assert len(core.streamed(other)) == 20, "a token a step, although no second mask came"
    assert len(core.streamed(request)) == 1
    run(core)
    assert core.streamed(request) == expected(0, 3)


def test_plans_stand_for_one_step_while_a_constrained_request_runs_and_for_several_before_and_after():
    core = Core()
    core.executor.device_time_ns = 500_000
    other = core.submit(prompt(100), 120)
    for _ in range(4):
        core.step()
    assert core.plans[-1].iterations == 8
    request = submit(core, 0, 5)
    core.step()
    assert core.plans[-1].iterations == 8, "it compiles, and holds up nobody"
    while core.reason(request) is None:
        answer(core)
        core.step()
        assert core.plans[-1].iterations <= 1
    core.step()
    assert core.plans[-1].iterations == 8
    run(core)
    assert core.streamed(other) == continuation(prompt(100), 120)


def test_constrained_requests_that_are_alone_decode_together_whenever_they_began():
    core = Core(inflight=2)
    first = submit(core, 0, 30)
    answer(core)
    for _ in range(3):
        core.step()
        answer(core)
    second = submit(core, 100, 30)
    answer(core)
    for _ in range(6):
        core.step()
        answer(core)
    assert core.send() is not None
    assert core.send() is None, "their tokens are in flight"
    core.settle()
    assert core.send() is None, "their masks are being computed"
    answer(core, first)
    assert core.send() is None, "the other one's is"
    answer(core)
    plan = core.send()
    assert plan is not None
    assert sorted(plan.mask_slots) == sorted([first.slot or 0, second.slot or 0])
    run(core)
    assert core.streamed(first) == expected(0, 30)
    assert core.streamed(second) == expected(0, 30)


def test_a_constrained_stream_never_stalls_longer_than_the_policy_allows_while_prompts_keep_coming():
    limits = dataclasses.replace(LIMITS, num_slots=300, num_blocks=40_000, max_tokens_per_step=320, max_model_len=1_000)
    core = Core(limits, inflight=2, max_decode_stall_s=0.3)
    stream = submit(core, 0, 40)
    answer(core)
    core.step()
    last_token_at, longest_gap, seen = core.now, 0.0, 0
    while core.reason(stream) is None:
        core.now += 0.05
        for _ in range(2):
            submit(core, core.num_submitted, 100, length=300)
        answer(core)
        core.step()
        if len(core.streamed(stream)) > seen:
            longest_gap = max(longest_gap, core.now - last_token_at)
            last_token_at, seen = core.now, len(core.streamed(stream))
    assert len(core.epoch.running) < limits.num_slots, "prompts came all the time"
    assert longest_gap <= 0.3 + 5 * 0.05, "the stall, the plans in flight around it, and the step of the mask"


@pytest.mark.parametrize(("latency_ns", "held_back"), [(0.0, True), (1e6, True), (2e6, False), (float("inf"), False)])
def test_a_plan_waits_for_masks_that_come_sooner_than_the_device_needs_it(latency_ns: float, held_back: bool):
    core = Core(inflight=2)
    core.executor.device_time_ns = 3_000_000
    core.submit(prompt(100), 60)
    for _ in range(3):
        core.step()
    request = submit(core, 0, 20)
    answer(core)
    while request.num_output_tokens < 2:
        answer(core)
        core.step()
    core.pool.mask_latency_ns = latency_ns
    while request.mask is not None:
        while core.send() is not None:
            pass
        core.settle()
    assert len(core.in_flight) == 1
    plan = core.send()
    assert (plan is None) == held_back
    if plan is not None:
        assert plan.mask_slots == []
    answer(core)
    core.settle()
    later = core.send()
    assert later is not None
    assert later.mask_slots == [request.slot]
    run(core)


def test_no_plan_waits_for_masks_where_the_device_would_rest():
    core = Core(inflight=2)
    core.executor.device_time_ns = 3_000_000
    request, _ = submit(core, 0, 20), core.submit(prompt(100), 60)
    answer(core)
    while request.num_output_tokens < 2 or request.mask is not None:
        core.step()
        if request.num_output_tokens < 2:
            answer(core)
    while core.in_flight:
        core.settle()
    assert core.send() is not None


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_stop_token_under_a_mask_ends_the_request():
    core = Core()
    request = submit(core, 0, 9, stop_token_ids=[7 * 6])
    run(core)
    assert core.streamed(request) == expected(0, 3)
    assert (core.reason(request), core.outbox.finished[0].stop_token_id) == (STOP, 42)


def test_a_mask_of_nothing_ends_the_request_without_a_token():
    core = Core()
    request, other = submit(core, 0, 9), core.submit(prompt(100), 9)
    answer(core)
    core.step()
    core.pool.unmasked.clear()
    give_mask(core.pool, request, mask_of())
    run(core)
    assert core.streamed(request) == expected(0, 1)
    assert (core.reason(request), core.outbox.finished[0].stop_token_id) == (STOP, None)
    assert core.streamed(other) == continuation(prompt(100), 9)


def test_a_text_that_may_only_be_empty_starts_and_ends():
    core = Core()
    request = submit(core, 0, 9)
    core.pool.unmasked.clear()
    give_mask(core.pool, request, mask_of())
    assert [event.stream for event in core.outbox.started] == [request.stream]
    assert (core.reason(request), core.streamed(request)) == (STOP, [])
    assert core.pool.num_waiting == 0


def test_a_token_that_the_mask_forbids_is_our_own_bug_and_ends_the_request_alone(caplog: pytest.LogCaptureFixture):
    core = Core()
    request, other = submit(core, 0, 9), core.submit(prompt(100), 9)
    answer(core)
    core.send()
    request.mask = mask_of(999)  # as if the executor had not heeded the one that was sent
    run(core)
    assert core.reason(request) == "INTERNAL"
    assert "which the mask forbids" in caplog.text
    assert core.streamed(other) == continuation(prompt(100), 9)


# --- preemption and loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_a_preempted_constrained_request_goes_on_under_the_mask_of_its_last_token(inflight: int):
    core = Core(small_cache(8), inflight=inflight)
    first, second = core.submit(prompt(100), 24), submit(core, 0, 24)
    run(core)
    assert second.preemptions > 0
    assert core.streamed(first) == continuation(prompt(100), 24)
    assert core.streamed(second) == expected(0, 24)


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_loss_of_the_executor_keeps_masks_and_tokens_together(steps: int):
    core = Core(inflight=2)
    request, other = submit(core, 0, 12), core.submit(prompt(100), 12)
    for _ in range(steps):
        answer(core)
        core.step()
    core.send()
    core.pool.end_epoch()
    core.begin_epoch()
    run(core)
    assert core.streamed(request) == expected(0, 12)
    assert core.streamed(other) == continuation(prompt(100), 12)


def test_bans_and_minima_are_left_to_the_mask():
    core = Core()
    sampling = Sampling(temperature=0.0, banned_token_ids=[1, 2], min_tokens=2)
    submit(core, 0, 3, sampling=sampling, end_token_ids=[9], stop_token_ids=[9])
    answer(core)
    plan = core.send()
    assert plan is not None
    params = plan.new_sequences[0].sampling
    assert (params.banned_token_ids, params.min_total_tokens, params.end_token_ids) == (b"", 0, b"")
