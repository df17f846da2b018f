"""What the plans hold: chunks, decode steps, preemptions, and how many are in flight."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_service.core.step_plan import StepPlan
from tests.unit.core_harness import LENGTH, LIMITS, Core, continuation, small_cache


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def chunks(plan: StepPlan | None) -> list[tuple[int, int]]:
    assert plan is not None
    return [(chunk.start, chunk.count) for chunk in plan.chunks]


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget_and_samples_after_the_last():
    core = Core()
    request = core.submit(prompt(0, 40), 3)
    core.run()
    assert [chunks(plan) for plan in core.plans[:3]] == [[(0, 16)], [(16, 16)], [(32, 8)]]
    assert [chunk.samples for plan in core.plans for chunk in plan.chunks] == [False, False, True]
    assert core.streamed(request) == continuation(prompt(0, 40), 3)


def test_a_plan_fills_its_token_budget_with_the_chunks_of_several_prompts():
    core = Core(inflight=3)
    for start in (0, 100, 200):
        core.submit(prompt(start, 10), 1)
    assert [chunks(core.send()), chunks(core.send())] == [[(0, 10), (0, 6)], [(6, 4), (0, 10)]]


def test_plans_hold_prefill_only_while_prompts_wait_and_decode_beside_it_after_the_longest_stall():
    core = Core(max_decode_stall_s=0.25)
    core.submit(prompt(0, 4), 100)
    core.step()
    core.submit(prompt(100, 120), 50)
    shapes: list[tuple[int, int]] = []
    for _ in range(12):
        core.step()
        plan = core.plans[-1]
        shapes.append((sum(chunk.count for chunk in plan.chunks), plan.iterations))
        core.now += 0.1
    assert shapes[:3] == [(16, 0), (16, 0), (16, 0)], "the stream stalls for 0.25 s"
    assert shapes[3:7] == [(15, 1), (15, 1), (15, 1), (15, 1)], "then it takes its token of the budget"
    assert shapes[7:] == [(12, 1), (0, 1), (0, 1), (0, 1), (0, 1)]
    core.submit(prompt(300, 40), 50)
    core.step()
    assert (sum(chunk.count for chunk in core.plans[-1].chunks), core.plans[-1].iterations) == (16, 0)


def test_a_stream_never_stalls_longer_than_the_policy_allows_while_prompts_keep_coming():
    core = Core(inflight=2, max_decode_stall_s=0.3)
    stream = core.submit(prompt(0, 4), 40)
    core.step()
    last_token_at, longest_gap, seen = core.now, 0.0, 0
    for index in range(200):
        core.now += 0.05
        core.submit(prompt(1000 + 50 * index, 12), 1)
        core.step()
        if len(core.streamed(stream)) > seen:
            longest_gap = max(longest_gap, core.now - last_token_at)
            last_token_at, seen = core.now, len(core.streamed(stream))
    assert core.reason(stream) == LENGTH
    assert longest_gap <= 0.3 + 3 * 0.05, "the stall, and the plans in flight around it"


def test_prefill_in_flight_counts_as_stall_before_it_has_run():
    core = Core(inflight=3, max_decode_stall_s=0.4)
    core.executor.device_time_ns = 160_000_000  # ten milliseconds a token: a full plan takes 0.16 s
    core.submit(prompt(0, 16), 100)
    core.send()
    core.settle()
    core.send()
    core.settle()
    core.submit(prompt(100, 120), 50)
    while core.send() is not None:
        pass
    chunks_beside_decode = [plan.iterations for plan in core.plans[-3:]]
    assert chunks_beside_decode == [0, 0, 1], "the third would make it 0.48 s, though no time has passed"


def test_the_running_set_never_exceeds_the_token_budget():
    core = Core(dataclasses.replace(LIMITS, num_slots=64, num_blocks=400, max_tokens_per_step=8), inflight=2)
    requests = [core.submit(prompt(100 * index, 5), 20) for index in range(50)]
    most_running = 0
    while core.pool.requests:
        core.step()
        most_running = max(most_running, len(core.epoch.running))
    assert most_running == 8
    assert all(core.streamed(request) == continuation(request.token_ids[:5], 20) for request in requests)


@pytest.mark.parametrize(("inflight", "executor_limit", "expected"), [(1, 3, 1), (2, 3, 2), (3, 3, 3), (4, 2, 2)])
def test_plans_go_out_without_waiting_for_tokens_up_to_the_limit(inflight: int, executor_limit: int, expected: int):
    core = Core(dataclasses.replace(LIMITS, max_inflight_plans=executor_limit), inflight=inflight)
    request = core.submit(prompt(0, 4), 30)
    while core.send() is not None:
        pass
    assert (len(core.plans), request.num_output_tokens) == (expected, 0)
    for _ in range(5):
        core.settle()
        assert core.send() is not None
        assert core.send() is None
    assert len(core.in_flight) == expected


@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_length_stop_is_predicted_so_that_no_plan_decodes_past_max_tokens(inflight: int, max_tokens: int):
    core = Core(inflight=inflight)
    request = core.submit(prompt(0, 4), max_tokens)
    core.run()
    assert core.streamed(request) == continuation(prompt(0, 4), max_tokens)
    assert core.reason(request) == LENGTH
    assert sum(plan.iterations for plan in core.plans) == max_tokens - 1
    assert len(core.plans) == max_tokens


def test_a_steady_decode_plan_names_no_slot():
    core = Core()
    for start in (0, 100, 200):
        core.submit(prompt(start, 4), 6)
    core.run()
    message = core.plans[3].encode(epoch=1)
    assert {field.name for field, _ in message.ListFields()} == {"epoch", "step_id", "iterations"}


# --- plans of several steps ------------------------------------------------------------------------------------------


def decoding(*, device_time_ns: int, requests: int = 1, max_tokens: int = 40, **options: Any) -> Core:
    """A core whose requests have decoded a few steps, each of which took the device `device_time_ns`."""
    core = Core(**options)
    core.executor.device_time_ns = device_time_ns
    for index in range(requests):
        core.submit(prompt(100 * index, 4), max_tokens)
    for _ in range(3):
        core.step()
    return core


def test_a_plan_stands_for_as_many_decode_steps_as_fit_in_four_milliseconds():
    assert [plan.iterations for plan in decoding(device_time_ns=1_000_000).plans] == [0, 1, 4]
    assert [plan.iterations for plan in decoding(device_time_ns=1_900_000).plans] == [0, 1, 2]
    assert [plan.iterations for plan in decoding(device_time_ns=2_100_000).plans] == [0, 1, 1]


def test_no_plan_stands_for_several_steps_while_a_request_waits():
    core = decoding(device_time_ns=500_000, limits=dataclasses.replace(LIMITS, num_slots=1))
    core.step()
    assert core.plans[-1].iterations == 8
    core.submit(prompt(500, 4), 40)
    core.step()
    assert core.plans[-1].iterations == 1


def test_no_plan_stands_for_several_steps_where_their_blocks_would_preempt():
    core = decoding(device_time_ns=100_000, requests=2, limits=small_cache(7), max_tokens=20)
    preemptions = 0
    while core.pool.requests:
        core.step()
        if core.plans[-1].iterations > 1:
            assert core.pool.counters.preemptions == preemptions
        preemptions = core.pool.counters.preemptions
    assert preemptions > 0


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    inflight=st.integers(1, 3),
    num_blocks=st.integers(10, 64),
    time_ns=st.integers(200_000, 3_000_000),
)
def test_plans_of_several_steps_change_no_token_and_return_their_unused_blocks(
    lengths: list[int], inflight: int, num_blocks: int, time_ns: int
):
    core = Core(small_cache(num_blocks), inflight=inflight)
    core.executor.device_time_ns = time_ns
    requests = []
    for index, length in enumerate(lengths):
        expected = continuation(prompt(100 * index, 5), length)
        stop = expected[length // 2]
        expected = expected[: expected.index(stop) + 1]
        requests.append((core.submit(prompt(100 * index, 5), length, stop=[stop]), expected))
    core.run()
    assert all(core.streamed(request) == expected for request, expected in requests)
    assert all(plan.iterations * time_ns <= 4e6 for plan in core.plans if plan.iterations > 1)
    assert core.epoch.blocks.num_free_blocks == num_blocks


def test_step_ids_count_every_step_of_a_plan():
    core = decoding(device_time_ns=1_000_000)
    core.run()
    steps = Counter(plan.step_id + index for plan in core.plans for index in range(max(1, plan.iterations)))
    assert sorted(steps.elements()) == list(range(1, len(steps) + 1))


# --- order of admission ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [("fcfs", [1, 2, 3, 4]), ("priority", [1, 3, 4, 2]), ("shortest-remaining", [1, 4, 2, 3])],
)
def test_waiting_requests_are_admitted_in_the_order_chosen(order: str, expected: list[int]):
    core = Core(dataclasses.replace(LIMITS, num_slots=1), order=order)
    core.submit(prompt(0, 4), 3)
    core.step()
    core.submit(prompt(100, 8), 8, priority=5)
    core.submit(prompt(200, 4), 16, priority=-1)
    core.submit(prompt(300, 8), 2, priority=0)
    core.run()
    assert [event.stream for event in core.outbox.started] == expected
