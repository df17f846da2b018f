"""Who is preempted where blocks run out, what it keeps, and when it comes back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_service.core.request import Request, RequestState
from tests.unit.core_harness import LENGTH, LIMITS, STOP, Core, continuation, small_cache


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def watch_preemptions(core: Core) -> list[tuple[Request, list[Request]]]:
    """Each preempted request, and those that ran when it was chosen."""
    seen: list[tuple[Request, list[Request]]] = []
    preempt = core.pool.preempt

    def spy(request: Request) -> None:
        seen.append((request, list(core.epoch.running.values())))
        preempt(request)

    core.pool.preempt = spy
    return seen


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_preemption_takes_the_last_come_first_and_keeps_generated_tokens(inflight: int):
    core = Core(small_cache(12), inflight=inflight)
    preempted = watch_preemptions(core)
    requests = [core.submit(prompt(100 * index, 8), 24) for index in range(3)]
    core.run()
    known = [(len(new.token_ids) // 4, new.num_prompt_tokens) for plan in core.plans for new in plan.new_sequences]
    first, second, third = requests
    assert [request for request, _ in preempted][:2] == [third, second]
    assert all(request is not first for request, _ in preempted)
    assert any(num_known > num_prompt for num_known, num_prompt in known), "it comes back with the tokens it had"
    assert all(core.streamed(request) == continuation(request.token_ids[:8], 24) for request in requests)
    assert core.pool.counters.preemptions == len(preempted)


@settings(max_examples=40)
@given(
    inflight=st.integers(1, 3),
    num_blocks=st.integers(8, 20),
    order=st.sampled_from(["fcfs", "priority", "shortest-remaining"]),
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.booleans()), min_size=2, max_size=12
    ),
)
def test_every_request_gets_its_own_continuation_and_the_oldest_running_is_never_preempted(
    inflight: int, num_blocks: int, order: str, requests: list[tuple[int, int, int, bool]]
):
    core = Core(small_cache(num_blocks), inflight=inflight, order=order)
    preempted = watch_preemptions(core)
    submitted: list[tuple[Request, list[int], int]] = []
    for length, max_tokens, priority, stops in requests:
        text = prompt(length % 3, length)
        expected = continuation(text, max_tokens)
        stop = expected[max_tokens // 2] if stops else None
        if stop is not None:
            expected = expected[: expected.index(stop) + 1]
        request = core.submit(text, max_tokens, stop=() if stop is None else (stop,), priority=priority)
        submitted.append((request, expected, STOP if stops else LENGTH))
    core.run()
    for request, expected, reason in submitted:
        assert core.streamed(request) == list(request.token_ids[request.num_prompt_tokens :]) == expected
        assert core.reason(request) == reason
    for victim, running in preempted:
        assert victim.arrival == max(request.arrival for request in running)
        assert len(running) > 1
    assert core.epoch.blocks.num_free_blocks == num_blocks
    assert not core.executor.slots or set(core.executor.slots) == set(core.epoch.released_slots)


def preempt_with_three_plans_in_flight() -> tuple[Core, Request, Request]:
    """Two requests decode until the second is preempted by the newest of three plans."""
    core = Core(small_cache(8), inflight=3)
    first, second = core.submit(prompt(0, 8), 24), core.submit(prompt(100, 8), 24)
    while not second.preemptions:
        if core.send() is None:
            core.settle()
    assert len(core.in_flight) == 3
    return core, first, second


def test_a_preempted_request_is_not_admitted_again_while_a_plan_in_flight_holds_it():
    core, first, second = preempt_with_three_plans_in_flight()
    core.pool.finish(first, STOP)
    assert core.epoch.blocks.num_free_blocks == 8
    core.settle()
    assert core.send() is None, "one more plan holds it"
    core.settle()
    plan = core.send()
    assert plan is not None
    assert [len(sequence.token_ids) // 4 for sequence in plan.new_sequences] == [len(second.token_ids)]
    assert len(core.in_flight) == 2, "the plan that preempted it does not hold it"
    core.run()
    assert core.streamed(second) == continuation(prompt(100, 8), 24)


def test_tokens_in_flight_at_a_preemption_are_kept():
    core, _, second = preempt_with_three_plans_in_flight()
    known = second.num_output_tokens
    core.settle()
    core.settle()
    assert second.state is RequestState.WAITING
    assert second.num_output_tokens == known + 2
    assert core.streamed(second) == continuation(prompt(100, 8), known + 2)


def test_a_preempted_request_may_end_by_a_token_in_flight_while_it_waits():
    core = Core(small_cache(8), inflight=3)
    stop = continuation(prompt(100, 8), 9)[8]
    core.submit(prompt(0, 8), 24)
    second = core.submit(prompt(100, 8), 24, stop=[stop])
    while not second.preemptions:
        if core.send() is None:
            core.settle()
    assert second.num_output_tokens < 9
    core.settle()
    core.settle()
    assert (core.reason(second), second.preemptions) == (STOP, 1)
    assert second not in core.pool.waiting
    core.run()


def test_nothing_is_admitted_by_the_plan_that_preempts():
    core = Core(dataclasses.replace(LIMITS, num_blocks=8, num_slots=2), order="priority")
    core.submit(prompt(0, 8), 24)
    second = core.submit(prompt(100, 8), 24)
    core.step()
    core.submit(prompt(200, 4), 4, priority=-1)
    while not second.preemptions:
        core.step()
    assert not core.plans[-1].new_sequences, "there is room, and taking it at once would preempt again"
    core.step()
    assert [chunk.request.priority for chunk in core.plans[-1].chunks] == [-1]
    core.run()
