"""Requests for several continuations of one prompt."""

import dataclasses

import pytest

from scheduler_service.core.load import load_of
from scheduler_service.core.request import Request, RequestState
from scheduler_service.errors import DuplicateRequest, InvalidRequest, QueueFull
from scheduler_service.ipc import Sampling
from tests.unit.core_harness import CANCELLED, LENGTH, LIMITS, Core, continuation

PROMPT = list(range(10, 23))  # three full blocks of four, and one token


def tables(core: Core, choices: list[Request]) -> list[list[int]]:
    return [core.epoch.blocks.table(request.slot).tolist() for request in choices if request.slot is not None]


@pytest.mark.parametrize("inflight", [1, 2])
def test_choices_share_the_full_blocks_of_their_prompt(inflight: int):
    core = Core(inflight=inflight)
    choices = core.submit_choices(3, PROMPT, 10)
    for _ in range(4):
        core.step()
    held = tables(core, choices)
    assert len(held) == 3
    assert held[0][:3] == held[1][:3] == held[2][:3]
    assert len({table[3] for table in held}) == 3, "the block that is being written is each one's own"
    assert load_of(core.pool, 0.0).used_blocks == 3 + 3
    assert [request.cached_tokens for request in choices] == [0, 12, 12]
    assert core.pool.counters.prefill_tokens == 13 + 1 + 1
    core.run()
    for index, request in enumerate(choices):
        assert core.streamed(request) == continuation(PROMPT, 10, choice_index=index)
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks


def test_a_prompt_of_several_chunks_is_computed_once_for_all_its_choices():
    core = Core()
    prompt = list(range(45))
    core.submit_choices(5, prompt, 2)
    core.run()
    assert core.pool.counters.prefill_tokens == 45 + 4 * 1


def test_more_choices_than_slots_run_one_after_the_other():
    core = Core(dataclasses.replace(LIMITS, num_slots=2), inflight=2)
    choices = core.submit_choices(5, PROMPT, 6)
    core.run()
    for index, request in enumerate(choices):
        assert core.streamed(request) == continuation(PROMPT, 6, choice_index=index)
        assert core.reason(request) == LENGTH


def test_choices_survive_preemption_and_the_loss_of_the_executor_each_with_its_own_noise():
    core = Core(dataclasses.replace(LIMITS, num_blocks=9), inflight=2)
    choices = core.submit_choices(3, PROMPT, 16)
    while not core.pool.counters.preemptions:
        core.step()
    core.step()
    core.pool.end_epoch()
    core.begin_epoch()
    core.run()
    for index, request in enumerate(choices):
        assert core.streamed(request) == continuation(PROMPT, 16, choice_index=index)
    assert core.pool.counters.preemptions > 0
    assert sum(request.recoveries for request in choices) > 0


def test_an_id_is_taken_until_its_last_choice_has_ended():
    core = Core()
    choices = core.submit_choices(3, PROMPT, 30, request_id="mine")
    for index in (0, 2, 1):
        with pytest.raises(DuplicateRequest):
            core.submit(PROMPT, 3, request_id="mine")
        core.pool.drop(choices[index])
    core.submit(PROMPT, 3, request_id="mine")
    core.run()


def test_cancelling_an_id_ends_the_choices_that_live_whatever_they_are_doing():
    core = Core(dataclasses.replace(LIMITS, num_slots=2), inflight=2)
    choices = core.submit_choices(4, PROMPT, 30, request_id="mine")
    other = core.submit(range(100, 108), 6)
    for _ in range(4):
        core.step()
    states = {request.state for request in choices}
    assert states == {RequestState.RUNNING, RequestState.WAITING}
    core.pool.drop(choices[0])
    living = core.pool.choices_of(("", "mine"))
    assert living == choices[1:]
    for request in living:
        core.pool.cancel(request, core.now)
    assert not core.pool.choices_of(("", "mine"))
    assert core.pool.choices_of(("", "nobody")) == []
    core.run()
    assert [core.reason(request) for request in choices] == [None, CANCELLED, CANCELLED, CANCELLED]
    assert core.streamed(other) == continuation(range(100, 108), 6)
    assert core.epoch.blocks.num_free_blocks == LIMITS.num_blocks


def test_every_choice_counts_in_the_queue():
    core = Core(max_waiting=4)
    core.submit_choices(3, PROMPT, 3)
    with pytest.raises(QueueFull) as full:
        core.submit_choices(2, PROMPT, 3, request_id="two")
    assert full.value.retry_after_s is not None
    assert len(core.pool.waiting) == len(core.pool.requests) == 3, "none of them is queued"
    core.submit_choices(1, PROMPT, 3, request_id="two")


def test_more_choices_than_may_wait_are_refused_for_good():
    core = Core(max_waiting=4)
    with pytest.raises(InvalidRequest, match="n is 5, and no more than 4 may wait") as refusal:
        core.submit_choices(5, PROMPT, 3)
    assert refusal.value.field == "sampling.n"
    assert not core.pool.requests


def test_a_choice_whose_slot_fails_fails_alone():
    core = Core()
    choices = core.submit_choices(3, PROMPT, 10)
    for _ in range(4):
        core.step()
    assert choices[1].slot is not None
    core.executor.failing = {choices[1].slot}
    core.run()
    assert [core.reason(request) for request in choices] == [LENGTH, "INTERNAL", LENGTH]


# --- prompt log-probabilities ----------------------------------------------------------------------------------------


def test_the_prompts_log_probabilities_come_once_and_before_the_tokens_of_any_choice():
    core = Core(inflight=2)
    core.submit(PROMPT, 1)
    core.run()  # the prompt is cached, so that the other choices could be ahead of the one that computes it
    core.outbox.take()
    prompt = [*PROMPT, *range(100, 130)]
    choices = core.submit_choices(3, prompt, 4, sampling=Sampling(prompt_logprobs=2))
    while not core.outbox.prompt_logprobs:
        assert not core.outbox.streams
        core.step()
    core.run()
    assert [told.stream for told in core.outbox.prompt_logprobs] == [choices[0].stream]
    assert [request.cached_tokens for request in choices] == [0, 40, 40]
    for index, request in enumerate(choices):
        assert core.streamed(request) == continuation(prompt, 4, choice_index=index)


def test_choices_wait_for_the_prompts_log_probabilities_whatever_holds_up_the_one_that_computes_them():
    core = Core()
    core.submit(PROMPT, 1)
    core.run()
    choices = core.submit_choices(3, PROMPT, 4, sampling=Sampling(prompt_logprobs=2))
    core.pool.waiting.remove(choices[0])
    assert core.send() is None
    assert core.pool.waiting.peek() is choices[1]
    core.pool.waiting.push(choices[0])
    core.run()
    assert [core.reason(request) for request in choices] == [LENGTH] * 3


@pytest.mark.parametrize("end", ["drop", "fail"])
def test_choices_do_not_wait_for_one_that_has_ended_without_the_prompts_log_probabilities(end: str):
    core = Core(inflight=2)
    choices = core.submit_choices(3, list(range(40)), 4, sampling=Sampling(prompt_logprobs=0))
    core.send()
    if end == "drop":
        core.pool.drop(choices[0])
    else:
        assert choices[0].slot is not None
        core.executor.failing = {choices[0].slot}
    core.run()
    assert not core.outbox.prompt_logprobs
    assert [core.reason(request) for request in choices[1:]] == [LENGTH, LENGTH]
