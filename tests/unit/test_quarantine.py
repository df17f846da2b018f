"""Which request an executor died of: suspects, their acquittal, the trial alone, and the verdict."""

import dataclasses

import numpy as np
import pytest

from scheduler_service.core.load import load_of
from scheduler_service.core.masks import give_mask
from scheduler_service.core.request import Request, RequestState
from tests.unit.core_harness import CANCELLED, LENGTH, LIMITS, VOCAB_SIZE, Core, continuation

ALL_TOKENS = np.full(-(-VOCAB_SIZE // 32), -1, dtype=np.int32)


def prompt(start: int, length: int = 8) -> list[int]:
    return list(range(start, start + length))


def lose_executor(core: Core, *, in_order: bool = False) -> None:
    """The executor dies with every plan that was sent, and another one comes."""
    core.pool.end_epoch(in_order=in_order)
    core.begin_epoch()


def send_all(core: Core) -> None:
    while core.send() is not None:
        pass


def quarantined(core: Core) -> int:
    return load_of(core.pool, 0.0).quarantined_requests


def planned(core: Core) -> set[Request]:
    """For whom the newest plan computes."""
    return set(core.epoch.records[-1].requests)


def poisoned_core(num_others: int, inflight: int = 2) -> tuple[Core, Request, list[Request]]:
    """A core at whose executors one request was at fault twice, with others that were seen beside it."""
    core = Core(inflight=inflight)
    poison = core.submit(prompt(900), 5)
    others = [core.submit(prompt(100 * index), 5) for index in range(num_others)]
    for _ in range(2):
        send_all(core)
        lose_executor(core)
    return core, poison, others


def run_with_poison(core: Core, poison: Request) -> int:
    """Run to the end on executors that die of every plan that holds the request; returns how many died."""
    num_lost = 0
    while core.pool.requests or core.in_flight:
        assert num_lost < 20, "nobody finds out"
        if core.send() is not None:
            if poison in planned(core):
                lose_executor(core)
                num_lost += 1
        else:
            core.settle()
    return num_lost


@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("num_others", [0, 1, 5, 12])
def test_a_request_that_kills_every_executor_fails_alone_and_all_others_get_their_tokens(
    num_others: int, inflight: int
):
    core = Core(inflight=inflight)
    others = [core.submit(prompt(100 * index), 9) for index in range(num_others // 2)]
    poison = core.submit(prompt(900), 9)
    others += [core.submit(prompt(100 * index + 50), 9) for index in range(num_others // 2, num_others)]
    num_lost = run_with_poison(core, poison)
    assert core.reason(poison) == "INTERNAL"
    (failed,) = core.outbox.failed
    assert "the executor died each time it ran this request, the last time alone" in failed.message
    assert num_lost == 3, "twice among others, once alone"
    for request in others:
        assert core.reason(request) == LENGTH
        assert core.streamed(request) == continuation(request.token_ids[:8], 9), "none lost, none twice"
    core.pool.check_idle()
    core.epoch.check_idle()


def test_one_loss_is_no_reason_for_a_trial():
    core = Core(inflight=2)
    requests = [core.submit(prompt(100 * index), 5) for index in range(3)]
    send_all(core)
    lose_executor(core)
    assert quarantined(core) == 0
    core.send()
    assert len(planned(core)) > 1
    core.run()
    assert [core.reason(request) for request in requests] == [LENGTH] * 3


def test_a_step_that_brings_them_tokens_clears_all_that_were_in_it():
    core = Core()
    requests = [core.submit(prompt(100 * index), 8) for index in range(2)]
    for _ in range(5):
        core.send()
        lose_executor(core)
        core.step()  # both are in it
        core.step()
    assert quarantined(core) == 0
    core.run()
    assert [core.streamed(request) for request in requests] == [
        continuation(prompt(100 * index), 8) for index in range(2)
    ]


def test_a_chunk_without_a_token_clears_nobody_since_it_may_be_the_end_of_the_prompt_that_kills():
    core = Core()
    suspect = core.submit(prompt(0, 40), 5)
    for _ in range(2):
        core.step()
        core.step()
        core.send()
        assert planned(core) == {suspect}
        lose_executor(core)
    assert suspect.state is RequestState.QUARANTINED


def test_a_step_clears_nobody_who_was_not_in_it():
    core = Core(dataclasses.replace(LIMITS, num_slots=1), order="priority")
    suspect = core.submit(prompt(0), 9)
    core.send()
    lose_executor(core)
    other = core.submit(prompt(100), 3, priority=-1)
    while core.reason(other) is None:
        core.step()
    core.send()
    assert planned(core) == {suspect}
    lose_executor(core)
    assert suspect.state is RequestState.QUARANTINED


def test_who_was_in_no_unacknowledged_plan_is_no_suspect():
    core = Core(dataclasses.replace(LIMITS, num_slots=1))
    core.submit(prompt(0), 5)
    waiting = core.submit(prompt(100), 5)
    for _ in range(2):
        core.send()
        lose_executor(core)
    assert quarantined(core) == 1
    assert waiting.state is RequestState.WAITING


def test_an_executor_that_stops_in_order_makes_nobody_a_suspect():
    core = Core(inflight=2)
    requests = [core.submit(prompt(100 * index), 5) for index in range(3)]
    for _ in range(4):
        send_all(core)
        lose_executor(core, in_order=True)
    assert quarantined(core) == 0
    assert load_of(core.pool, 0.0).executor_losses_total == 4
    core.run()
    assert [core.reason(request) for request in requests] == [LENGTH] * 3


def test_an_executor_that_stops_in_order_during_a_trial_convicts_nobody():
    core, poison, _ = poisoned_core(num_others=1)
    core.send()
    lose_executor(core, in_order=True)
    assert core.reason(poison) is None
    core.run()
    assert core.streamed(poison) == continuation(prompt(900), 5)


def test_each_is_tried_alone_up_to_one_token_and_before_all_others():
    core, poison, others = poisoned_core(num_others=2)
    newcomer = core.submit(prompt(500), 5)
    assert quarantined(core) == 3
    for index, request in enumerate([poison, *others]):
        core.send()
        assert planned(core) == {request}
        assert core.send() is None, "one plan at a time, whatever may be in flight otherwise"
        assert quarantined(core) == 2 - index
        core.settle()
        assert core.streamed(request) == continuation(request.token_ids[:8], 1)
    assert not core.streamed(newcomer)
    core.send()
    assert len(planned(core)) > 1
    core.run()
    for request in (poison, *others, newcomer):
        assert core.streamed(request) == continuation(request.token_ids[:8], 5)
        assert (core.reason(request), request.preemptions) == (LENGTH, 0)


def test_a_trial_ends_with_the_last_token_where_that_is_the_next_one():
    core = Core()
    request = core.submit(prompt(0), 1)
    for _ in range(2):
        core.send()
        lose_executor(core)
    core.run()
    assert (core.streamed(request), core.reason(request)) == (continuation(prompt(0), 1), LENGTH)


def test_a_prompt_of_many_chunks_is_tried_to_its_first_token_and_convicted_at_any_chunk():
    core = Core()
    poison, other = core.submit(prompt(0, 60), 5), core.submit(prompt(100), 5)
    for _ in range(2):
        send_all(core)
        lose_executor(core)
    for _ in range(2):  # chunks that are acknowledged
        core.send()
        assert planned(core) == {poison}
        core.settle()
    core.send()
    assert planned(core) == {poison}
    lose_executor(core)
    assert core.reason(poison) == "INTERNAL"
    core.run()
    assert core.streamed(other) == continuation(prompt(100), 5)


def test_known_tokens_are_kept_over_a_trial():
    core = Core()
    request = core.submit(prompt(0), 9)
    for _ in range(4):
        core.step()
    for _ in range(2):
        core.send()
        lose_executor(core)
    core.run()
    assert core.streamed(request) == continuation(prompt(0), 9)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_request_that_is_cancelled_on_trial_ends_so_and_holds_nobody_up(when: str):
    core, poison, (other,) = poisoned_core(num_others=1)
    if when == "during":
        core.send()
    core.pool.cancel(poison, core.now)
    assert core.reason(poison) == CANCELLED
    core.run()
    assert core.streamed(other) == continuation(prompt(0), 5)
    core.pool.check_idle()
    core.epoch.check_idle()


def test_the_loss_of_an_executor_after_a_cancellation_on_trial_fails_nobody_else():
    core, poison, (other,) = poisoned_core(num_others=1)
    core.send()
    core.pool.cancel(poison, core.now)
    lose_executor(core)
    core.run()
    assert (core.reason(poison), core.reason(other)) == (CANCELLED, LENGTH)


@pytest.mark.parametrize("quarantined_too", [False, True])
def test_deadlines_hold_in_quarantine(quarantined_too: bool):
    core = Core(dataclasses.replace(LIMITS, num_slots=2))
    late = core.submit(prompt(0), 5, deadline=1.0)
    other = core.submit(prompt(100), 5)
    for _ in range(2 if quarantined_too else 1):
        core.send()
        lose_executor(core)
    core.pool.expire(1.0)
    assert core.reason(late) == "DEADLINE_EXCEEDED"
    core.run()
    assert core.reason(other) == LENGTH


def test_those_that_wait_for_a_trial_count_as_waiting():
    core, _, _ = poisoned_core(num_others=1)
    assert load_of(core.pool, 0.0).waiting_requests == 2


def test_the_choices_of_one_request_are_tried_and_convicted_each_by_itself():
    core = Core(inflight=2)
    first, second = core.submit_choices(2, prompt(0), 5)
    num_lost = run_with_poison(core, second)
    assert (core.reason(first), core.reason(second)) == (LENGTH, "INTERNAL")
    assert core.streamed(first) == continuation(prompt(0), 5)
    assert num_lost == 3


def test_a_constrained_request_is_tried_under_its_mask():
    core = Core()
    constrained, other = core.submit(prompt(0), 5), core.submit(prompt(100), 5)
    constrained.constraint = "a grammar"
    constrained.mask = ALL_TOKENS.copy()
    for _ in range(2):
        core.send()
        lose_executor(core)
    plan = core.send()
    assert plan is not None
    assert planned(core) == {constrained}
    assert plan.mask_slots == [constrained.slot]
    core.settle()
    assert len(core.streamed(constrained)) == 1
    while core.pool.requests or core.in_flight:
        if constrained.state is not RequestState.FINISHED and constrained.mask is None:
            give_mask(core.pool, constrained, ALL_TOKENS)
        core.step()
    assert len(core.streamed(constrained)) == 5
    assert core.streamed(other) == continuation(prompt(100), 5)


def test_a_constrained_request_without_its_mask_is_tried_once_it_has_one_and_others_wait_for_that():
    core = Core()
    constrained, other = core.submit(prompt(0), 5), core.submit(prompt(100), 5)
    constrained.constraint = "a grammar"
    constrained.mask = ALL_TOKENS.copy()
    for _ in range(2):
        core.send()
        lose_executor(core)
    constrained.mask = None
    core.send()
    assert planned(core) == {other}, "its own trial needs no mask"
    core.settle()
    assert core.send() is None
    give_mask(core.pool, constrained, ALL_TOKENS)
    core.send()
    assert planned(core) == {constrained}
