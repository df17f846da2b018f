"""The model check with the bugs put in that deaths, departures and trials are prone to, one by one."""

from collections.abc import Iterable

import msgspec
import pytest

from scheduler_service import ipc
from scheduler_service.core import frontends, resumption, settlement
from scheduler_service.core.epoch import Epoch
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.resumption import Told
from scheduler_service.core.retained import Retained
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import StepPlan, StepResult
from scheduler_service.errors import QueueFull
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.holding import Holding
from scheduler_service.frontend.streams import TokenStream
from tests.property.noticing import assert_noticed, full_of_poison, given_to

losing_cores = given_to("kill_core")
resuming = given_to("leave", "lose_touch", "kill_front_end")
merging = given_to("fail_network")
losing_executors = given_to("kill_executor")

# --- the death of the core ----------------------------------------------------------------------------------------


def test_notices_requests_that_are_not_told_to_the_next_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CoreClient, "_resubmit", lambda client, writer: None)
    assert_noticed(losing_cores)


def change_progress(monkeypatch: pytest.MonkeyPatch, **changes: object):
    original = Holding._progress

    def changed(holding: Holding, index: int, stream: TokenStream) -> ipc.Progress:
        return msgspec.structs.replace(original(holding, index, stream), **changes)

    monkeypatch.setattr(Holding, "_progress", changed)


def test_notices_a_resubmission_that_forgets_the_tokens(monkeypatch: pytest.MonkeyPatch):
    change_progress(monkeypatch, token_ids=b"")
    assert_noticed(losing_cores)


def test_notices_a_resubmission_that_forgets_that_the_stream_had_started(monkeypatch: pytest.MonkeyPatch):
    change_progress(monkeypatch, was_told_start=False)
    assert_noticed(losing_cores)


@pytest.mark.parametrize("error", [-1, 1])
def test_notices_a_count_of_told_tokens_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch, error: int):
    original = frontends.read_resubmission

    def miscount(message: ipc.Submit, outbox: Outbox) -> tuple[list[Request], list[Told]]:
        choices, told = original(message, outbox)
        return choices, [Told(one.start, max(0, one.num_tokens + error), one.prompt_logprobs) for one in told]

    monkeypatch.setattr(frontends, "read_resubmission", miscount)
    assert_noticed(given_to("break_connection"))


def test_notices_that_all_tokens_are_told_again(monkeypatch: pytest.MonkeyPatch):
    original = resumption._tell
    monkeypatch.setattr(resumption, "_tell", lambda request, told: original(request, Told(told.start)))
    assert_noticed(given_to("break_connection"))


def test_notices_a_merge_that_keeps_the_shorter_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumption, "_is_behind", lambda request, other: False)
    assert_noticed(given_to("fail_network", "break_connection"))


def test_notices_that_a_client_which_asked_before_takes_the_request_back(monkeypatch: pytest.MonkeyPatch):
    def forget_when(retained: Retained, now: float, asked_at: float) -> None:
        original(retained, now, asked_at)
        retained.asked_at = 0.0

    original = Retained.see_client_come
    monkeypatch.setattr(Retained, "see_client_come", forget_when)
    assert_noticed(merging)


def test_notices_two_requests_by_one_id_that_are_merged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumption, "_is_same", lambda request, other: True)
    assert_noticed()


def test_notices_resubmissions_that_the_limit_of_the_queue_refuses(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.adopt

    def refuse_too_many(pool: RequestPool, *choices: Request) -> None:
        if pool.num_waiting + len(choices) > pool._max_waiting:
            raise QueueFull("the queue is full")
        original(pool, *choices)

    monkeypatch.setattr(RequestPool, "adopt", refuse_too_many)
    assert_noticed(losing_cores)


def test_notices_a_resubmission_that_is_too_long_for_the_executor(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.adopt

    def adopt_blindly(pool: RequestPool, *choices: Request) -> None:
        epoch, pool.epoch = pool.epoch, None
        original(pool, *choices)
        pool.epoch = epoch

    monkeypatch.setattr(RequestPool, "adopt", adopt_blindly)
    assert_noticed(losing_cores)


# --- clients that leave and come back -----------------------------------------------------------------------------


def test_notices_that_detached_requests_are_never_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumption, "expire", lambda pool, now: None)
    assert_noticed(resuming)


def test_notices_that_the_departure_of_a_client_is_overlooked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Retained, "see_client_leave", lambda retained, now: None)
    assert_noticed(resuming)


def test_notices_a_request_that_expires_under_its_client(monkeypatch: pytest.MonkeyPatch):
    original = Retained.see_client_come

    def come_in_vain(retained: Retained, now: float, asked_at: float) -> None:
        expires_at = retained.expires_at
        original(retained, now, asked_at)
        retained.expires_at = expires_at

    monkeypatch.setattr(Retained, "see_client_come", come_in_vain)
    assert_noticed(resuming)


def test_notices_a_kept_end_that_is_lost(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool._keep_end

    def lose_end(pool: RequestPool, request: Request, end: ipc.Finished | ipc.Failed) -> None:
        original(pool, request, end)
        if request.kept is not None:
            request.kept.end = None

    monkeypatch.setattr(RequestPool, "_keep_end", lose_end)
    assert_noticed(resuming)


def test_notices_a_resumption_that_tells_only_what_is_new(monkeypatch: pytest.MonkeyPatch):
    original = resumption.take_over

    def tell_nothing_old(request: Request, outbox: Outbox, stream: int, told: Told) -> None:
        original(request, outbox, stream, Told(told.start, request.num_output_tokens, told.prompt_logprobs))

    monkeypatch.setattr(resumption, "take_over", tell_nothing_old)
    assert_noticed(resuming)


def test_notices_log_probabilities_that_another_core_had_and_nobody_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumption, "_can_tell", lambda request, told: True)
    assert_noticed(given_to("kill_core", "leave"))


def test_notices_that_the_former_client_is_not_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumption, "_dismiss_client", lambda request: None)
    assert_noticed(resuming)


def test_notices_requests_that_end_with_their_front_end_although_they_may_be_resumed(monkeypatch: pytest.MonkeyPatch):
    def drop_all(pool: RequestPool, outbox: Outbox) -> None:
        for request in [request for request in pool.requests.values() if request.outbox is outbox]:
            pool.drop(request)

    monkeypatch.setattr(resumption, "leave_all", drop_all)
    assert_noticed(resuming)


# --- requests that executors die of -------------------------------------------------------------------------------


def test_notices_a_culprit_that_is_not_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RequestPool, "_convict", lambda pool, request: None)
    assert_noticed(full_of_poison)


def test_notices_a_culprit_that_is_never_suspected(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.end_epoch
    monkeypatch.setattr(RequestPool, "end_epoch", lambda pool, *, in_order: original(pool, in_order=True))
    assert_noticed(full_of_poison)


def test_notices_suspects_of_an_executor_that_stopped_as_it_was_told(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.end_epoch
    monkeypatch.setattr(RequestPool, "end_epoch", lambda pool, *, in_order: original(pool))
    assert_noticed(given_to("stop_executor"))


def test_notices_suspects_that_are_never_acquitted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RequestPool, "acquit", lambda pool, requests: None)
    assert_noticed(losing_executors)


def test_notices_suspects_that_are_acquitted_by_a_part_of_their_prompt(monkeypatch: pytest.MonkeyPatch):
    """Then one whose prompt kills at its end goes free each time, and executors die of it for ever."""
    original = settlement.apply_result

    def acquit_all_of_the_step(pool: RequestPool, result: StepResult) -> None:
        assert pool.epoch is not None
        record = pool.epoch.records[0]
        original(pool, result)
        if not result.partial:
            pool.acquit(record.requests)

    monkeypatch.setattr(settlement, "apply_result", acquit_all_of_the_step)
    assert_noticed(full_of_poison)


def test_notices_a_trial_in_company(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._add_chunk

    def bring_a_friend(self: Scheduler, epoch: Epoch, plan: StepPlan, request: Request, budget: int) -> int:
        count = original(self, epoch, plan, request, budget)
        if request is epoch.on_trial and count < budget:
            self._prefill(epoch, plan, budget - count, 0.0, admit=True)
        return count

    monkeypatch.setattr(Scheduler, "_add_chunk", bring_a_friend)
    assert_noticed(full_of_poison)


def test_notices_a_trial_beside_plans_in_flight(monkeypatch: pytest.MonkeyPatch):
    """A trial ends with its token; here the next one begins while that is still to come."""

    def end_at_once(self: Scheduler, epoch: Epoch) -> None:
        if epoch.on_trial is not None and epoch.on_trial not in epoch.prefilling:
            request, epoch.on_trial = epoch.on_trial, None
            if request.slot is not None:
                self._pool.put_back(request)

    monkeypatch.setattr(Scheduler, "_end_trial", end_at_once)
    assert_noticed(full_of_poison)


def test_notices_a_request_that_is_put_back_without_its_flights(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.put_back

    def forget_flights(pool: RequestPool, request: Request) -> None:
        original(pool, request)
        request.in_flight_until = 0

    monkeypatch.setattr(RequestPool, "put_back", forget_flights)
    assert_noticed()


def test_notices_requests_that_never_leave_the_quarantine(monkeypatch: pytest.MonkeyPatch):
    def keep_it(pool: RequestPool, requests: Iterable[Request]) -> None:
        original(pool, [request for request in requests if request is not (pool.epoch and pool.epoch.on_trial)])

    original = RequestPool.acquit
    monkeypatch.setattr(RequestPool, "acquit", keep_it)
    assert_noticed(losing_executors)
