"""The model check with the bugs put in that constrained requests are prone to, one by one."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scheduler_service.core import masks, settlement
from scheduler_service.core.epoch import DecodeSet, Epoch
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import StepPlan
from tests.property.noticing import assert_noticed


def test_notices_a_mask_that_outlives_its_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settlement, "forget_mask", lambda pool, request: pool.unmasked.append(request))
    assert_noticed()


def test_notices_a_constrained_request_that_decodes_before_its_last_token_is_known(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._sample_under_mask

    def forget_what_is_in_flight(self: Scheduler, epoch: Epoch, plan: StepPlan, request: Request) -> None:
        original(self, epoch, plan, request)
        if request in epoch.constrained:
            epoch.constrained[request] = 0

    monkeypatch.setattr(Scheduler, "_sample_under_mask", forget_what_is_in_flight)
    assert_noticed()


def test_notices_a_constrained_request_that_stays_in_the_decode_set_without_a_mask(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._change_decode_set

    def let_them_stay(
        self: Scheduler, epoch: Epoch, plan: StepPlan, leaving: list[Request], joined: list[Request]
    ) -> None:
        original(self, epoch, plan, leaving, joined)
        plan.leave_slots = [slot for slot in plan.leave_slots if epoch.running[slot].constraint is None]

    monkeypatch.setattr(Scheduler, "_change_decode_set", let_them_stay)
    assert_noticed()


def test_notices_a_slot_that_joins_although_it_stayed(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._change_decode_set

    def join_all(self: Scheduler, epoch: Epoch, plan: StepPlan, leaving: list[Request], joined: list[Request]) -> None:
        original(self, epoch, plan, leaving, joined)
        plan.join_slots = sorted({*plan.join_slots, *(slot for slot in plan.mask_slots if slot in epoch.decode_set)})

    monkeypatch.setattr(Scheduler, "_change_decode_set", join_all)
    assert_noticed()


def test_notices_several_steps_in_a_plan_with_masks(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._iterations

    def overlook_them(self: Scheduler, epoch: Epoch) -> int:
        constrained, epoch.constrained = epoch.constrained, {}
        iterations = original(self, epoch) if epoch.decode_set else 1
        epoch.constrained = constrained
        return iterations

    monkeypatch.setattr(Scheduler, "_iterations", overlook_them)
    assert_noticed()


def test_notices_masks_that_are_lost_with_the_executor(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.end_epoch

    def forget_masks(pool: RequestPool, *, in_order: bool) -> None:
        original(pool, in_order=in_order)
        for request in pool.waiting:
            request.mask = None

    monkeypatch.setattr(RequestPool, "end_epoch", forget_masks)
    assert_noticed()


def test_notices_a_preempted_request_that_is_admitted_before_its_mask_is_there(monkeypatch: pytest.MonkeyPatch):
    def only_slots_and_flights(self: Scheduler, epoch: Epoch, request: Request) -> bool:
        return len(epoch.running) < epoch.limits.num_slots and not epoch.is_in_flight(request)

    monkeypatch.setattr(Scheduler, "_can_seat", only_slots_and_flights)
    assert_noticed()


def test_notices_that_a_token_of_a_preempted_request_brings_no_new_mask(monkeypatch: pytest.MonkeyPatch):
    original = settlement.forget_mask

    def forget_if_running(pool: RequestPool, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            original(pool, request)

    monkeypatch.setattr(settlement, "forget_mask", forget_if_running)
    assert_noticed()


def test_notices_decode_rows_that_write_to_the_position_before(monkeypatch: pytest.MonkeyPatch):
    """A constrained request that joins again has more tokens than when its prompt was computed."""
    original = DecodeSet.join

    def join_where_the_prompt_ended(self: DecodeSet, request: Request, num_scheduled: int) -> None:
        original(self, request, request.num_prefilled)

    monkeypatch.setattr(DecodeSet, "join", join_where_the_prompt_ended)
    assert_noticed()


def test_notices_that_texts_go_on_after_their_end(monkeypatch: pytest.MonkeyPatch):
    original = masks.give_mask

    def never_end(pool: RequestPool, request: Request, mask: NDArray[np.int32]) -> None:
        original(pool, request, mask if mask.any() else mask + 1)

    monkeypatch.setattr(masks, "give_mask", never_end)
    assert_noticed()
