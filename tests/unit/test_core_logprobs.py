"""What the core tells of log-probabilities: they belong to their tokens, whatever happens on the way."""

import dataclasses
from array import array

import numpy as np
import pytest

from scheduler_service.core.request import Request, RequestState
from scheduler_service.ipc import PromptLogprobs, Sampling
from tests.unit.core_harness import LENGTH, LIMITS, STOP, Core, RowLogprobs, continuation, row_logprobs

PROMPT = list(range(8))


def asked(logprobs: int | None = None, prompt_logprobs: int | None = None) -> Sampling:
    return Sampling(temperature=0.0, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def expected_logprobs(request: Request, tokens: list[int]) -> list[RowLogprobs]:
    first = request.num_prompt_tokens
    return [row_logprobs(first + index, token, request.num_logprobs) for index, token in enumerate(tokens)]


def assert_told_in_full(core: Core, request: Request, prompt: list[int], num_tokens: int) -> None:
    tokens = continuation(prompt, num_tokens)
    assert core.streamed(request) == tokens
    assert core.streamed_logprobs(request) == expected_logprobs(request, tokens)


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_each_request_gets_as_many_as_it_asked_for_beside_others_that_asked_for_none(inflight: int):
    core = Core(inflight=inflight)
    prompts = [list(range(start, start + 8)) for start in (0, 100, 200, 300)]
    requests = [
        core.submit(prompt, 12, sampling=asked(count)) for prompt, count in zip(prompts, [3, None, 0, 20], strict=True)
    ]
    core.run()
    for prompt, request in zip(prompts, requests, strict=True):
        assert core.streamed(request) == continuation(prompt, 12)
    assert core.streamed_logprobs(requests[1]) == []
    for index, width in ((0, 4), (2, 1), (3, 21)):
        assert requests[index].num_logprobs == width
        assert_told_in_full(core, requests[index], prompts[index], 12)


def test_they_leave_in_the_frame_of_their_token():
    core = Core(inflight=2)
    request = core.submit(PROMPT, 6, sampling=asked(1))
    frames = 0
    while core.pool.requests:
        core.step()
        outputs = core.outbox.take()
        if outputs is not None and outputs.token_ids:
            frames += 1
            assert [array("i", row.token_ids)[0] for row in outputs.logprobs] == list(array("i", outputs.token_ids))
    assert (frames, core.pool.counters.output_tokens, request.num_output_tokens) == (6, 6, 6)


@pytest.mark.parametrize("inflight", [2, 3])
def test_those_of_tokens_that_are_dropped_are_dropped_too(inflight: int):
    core = Core(inflight=inflight)
    last = continuation(PROMPT, 4)[-1]
    stopped = core.submit(PROMPT, 30, stop=[last], sampling=asked(2))
    cancelled = core.submit(range(100, 108), 30, sampling=asked(5))
    other = core.submit(range(200, 208), 30, sampling=asked(1))
    while core.reason(stopped) is None:
        core.step()
    core.send()
    core.pool.cancel(cancelled, core.now)
    core.run()
    assert core.reason(stopped) == STOP
    assert_told_in_full(core, stopped, PROMPT, 4)
    assert_told_in_full(core, cancelled, list(range(100, 108)), len(core.streamed(cancelled)))
    assert_told_in_full(core, other, list(range(200, 208)), 30)


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_a_preempted_request_keeps_those_of_the_tokens_that_were_in_flight(inflight: int):
    core = Core(dataclasses.replace(LIMITS, num_blocks=8), inflight=inflight)
    first = core.submit(PROMPT, 20, sampling=asked(1))
    second = core.submit(range(100, 108), 20, sampling=asked(3))
    num_late = 0
    while core.pool.requests:
        while core.send() is not None:
            pass
        was_waiting, num_tokens = second.state is RequestState.WAITING, second.num_output_tokens
        core.settle()
        num_late += was_waiting * (second.num_output_tokens - num_tokens)
    assert second.preemptions > 0
    assert num_late == inflight - 1
    assert_told_in_full(core, first, PROMPT, 20)
    assert_told_in_full(core, second, list(range(100, 108)), 20)


def test_they_survive_the_loss_of_the_executor_none_lost_and_none_twice():
    core = Core(inflight=2)
    request = core.submit(PROMPT, 20, sampling=asked(2))
    for _ in range(7):
        core.step()
    core.pool.end_epoch()
    core.begin_epoch()
    core.run()
    assert request.recoveries == 1
    assert_told_in_full(core, request, PROMPT, 20)


def test_those_that_were_computed_from_a_failed_block_are_dropped():
    core = Core(inflight=3)
    source = core.submit(range(9), 20)
    core.send()
    assert source.slot is not None
    prompt = [*range(8), 300, 301]
    sharer = core.submit(prompt, 20, sampling=asked(2))
    core.send()
    assert sharer.num_cached_blocks == 2
    failed = core.in_flight[0][0]
    failed.ClearField("slots")
    failed.ClearField("token_ids")
    failed.ClearField("finish_reasons")
    failed.slot_errors.add(slot=source.slot, message="not a number")
    core.settle()
    core.settle()
    assert sharer.spoiled
    assert core.streamed_logprobs(sharer) == []
    core.run()
    assert_told_in_full(core, sharer, prompt, 20)


def test_columns_that_do_not_fit_the_rows_are_our_own_bug():
    core = Core()
    core.submit(PROMPT, 3, sampling=asked(1))
    core.send()
    core.in_flight[0][0].logprob_ranks += bytes(4)
    with pytest.raises(AssertionError, match="other rows than asked for"):
        core.settle()


# --- of the prompt ---------------------------------------------------------------------------------------------------


def assert_whole_prompt(told: PromptLogprobs, request: Request, prompt: list[int], width: int) -> None:
    rows = [row_logprobs(position, prompt[position], width) for position in range(1, len(prompt))]
    assert (told.stream, told.width) == (request.stream, width)
    assert np.frombuffer(told.token_ids, "<i4").reshape(-1, width).tolist() == [row.token_ids for row in rows]
    assert np.frombuffer(told.logprobs, "<f4").reshape(-1, width).tolist() == [row.logprobs for row in rows]
    assert np.frombuffer(told.ranks, "<i4").tolist() == [row.rank for row in rows]


@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 8, 16, 17, 50])
def test_a_prompts_are_gathered_over_its_chunks_and_sent_before_the_first_token(length: int, inflight: int):
    core = Core(inflight=inflight)
    prompt = list(range(length))
    core.submit(range(200, 210), 40)
    core.step()
    request = core.submit(prompt, 5, sampling=asked(1, prompt_logprobs=2))
    while not core.streamed(request):
        assert not core.outbox.prompt_logprobs
        core.step()
    core.run()
    (told,) = core.outbox.prompt_logprobs
    assert_whole_prompt(told, request, prompt, 3)
    assert_told_in_full(core, request, prompt, 5)


def test_a_prompt_of_one_token_has_none_and_that_is_said():
    core = Core()
    request = core.submit([7], 3, sampling=asked(prompt_logprobs=4))
    core.run()
    assert core.outbox.prompt_logprobs == [PromptLogprobs(request.stream, b"", b"", b"", 5)]


def test_a_request_that_wants_them_takes_no_hits_and_leaves_its_blocks_to_others():
    core = Core()
    prompt = list(range(13))
    core.submit(prompt, 1)
    core.run()
    request = core.submit(prompt, 1, sampling=asked(prompt_logprobs=0))
    core.run()
    assert request.cached_tokens == 0
    assert len(core.outbox.prompt_logprobs) == 1
    fresh = list(range(100, 113))
    core.submit(fresh, 1, sampling=asked(prompt_logprobs=0))
    core.run()
    heir = core.submit(fresh, 1)
    core.run()
    assert heir.cached_tokens == 12


def test_two_alike_that_want_them_do_not_wait_for_each_other():
    core = Core()
    prompt = list(range(7))
    first, second = (core.submit(prompt, 2, sampling=asked(prompt_logprobs=1)) for _ in range(2))
    plan = core.send()
    assert plan is not None
    assert [chunk.request for chunk in plan.chunks] == [first, second]
    core.run()
    assert [told.stream for told in core.outbox.prompt_logprobs] == [first.stream, second.stream]


def half_computed(core: Core) -> tuple[Request, list[int]]:
    """A request of whose prompt one chunk is settled and one is in flight."""
    prompt = list(range(300, 340))
    request = core.submit(prompt, 6, sampling=asked(0, prompt_logprobs=1))
    core.send()
    core.send()
    core.settle()
    assert 0 < len(request.prompt_logprobs[0].ranks) < 4 * (len(prompt) - 1)
    return request, prompt


@pytest.mark.parametrize("preempted", [True, False])
def test_what_was_gathered_before_a_preemption_or_a_loss_is_gathered_anew_and_sent_once(preempted: bool):
    core = Core(inflight=2)
    request, prompt = half_computed(core)
    if preempted:
        core.pool.preempt(request)
    else:
        core.pool.end_epoch()
        core.begin_epoch()
    core.run()
    (told,) = core.outbox.prompt_logprobs
    assert_whole_prompt(told, request, prompt, 2)
    assert_told_in_full(core, request, prompt, 6)
    assert request.preemptions + request.recoveries == 1


def test_when_they_are_sent_a_preempted_request_may_take_hits():
    core = Core(inflight=2)
    prompt = list(range(40))
    request = core.submit(prompt, 9, sampling=asked(0, prompt_logprobs=1))
    while not core.outbox.prompt_logprobs:
        core.step()
    core.pool.preempt(request)
    core.run()
    resumed = [plan.new_sequences for plan in core.plans if plan.new_sequences][-1]
    assert resumed[0].num_cached_tokens >= 40
    assert resumed[0].sampling.num_prompt_logprobs == 0
    assert len(core.outbox.prompt_logprobs) == 1
    assert_told_in_full(core, request, prompt, 9)


def test_a_preempted_request_whose_whole_prompt_was_in_flight_sends_them_while_it_waits():
    core = Core(dataclasses.replace(LIMITS, max_tokens_per_step=64), inflight=2)
    prompt = list(range(40))
    request = core.submit(prompt, 9, sampling=asked(0, prompt_logprobs=1))
    core.send()
    core.pool.preempt(request)
    core.settle()
    assert request.state is RequestState.WAITING
    (told,) = core.outbox.prompt_logprobs
    assert_whole_prompt(told, request, prompt, 2)
    core.run()
    assert len(core.outbox.prompt_logprobs) == 1
    assert core.reason(request) == LENGTH


def test_a_part_that_is_missing_is_our_own_bug():
    core = Core()
    core.submit(range(40), 3, sampling=asked(prompt_logprobs=1))
    core.send()
    core.in_flight[0][0].ClearField("prompt_logprobs")
    core.settle()
    with pytest.raises(AssertionError, match="where 1 is due"):
        core.run()
