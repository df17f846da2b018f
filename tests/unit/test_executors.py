"""The executors of a core: which one it takes, which it refuses, and when it gives one up."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core import epoch
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.session import PROTOCOL_VERSION, ExecutorSession, SessionEnded
from scheduler_service.core.step_plan import StepPlan
from tests.unit.core_harness import LENGTH, LIMITS, Core, FakeExecutor, continuation
from tests.unit.engine_harness import FrontEnd, Setting

STEP_NS = 1_000_000


class CountingFake(FakeExecutor):
    """Keeps how many sequences each plan brought; dies of the first one where it is doomed to."""

    def __init__(self, limits: ExecutorLimits) -> None:
        super().__init__(limits)
        self.is_doomed = False
        self.num_admitted: list[int] = []

    def run(self, plan: pb.StepPlan) -> list[pb.StepResult]:
        if self.is_doomed:
            raise RuntimeError("device error")
        self.num_admitted.append(len(plan.new_sequences))
        return super().run(plan)


async def lost(frontend: FrontEnd) -> None:
    await frontend.until(lambda: frontend.status is not None and not frontend.status.ready)


# --- several addresses -------------------------------------------------------------------------------------------


async def test_of_several_executors_the_first_that_answers_is_taken_and_the_others_stand_by(setting: Setting):
    first, second = await setting.start_executor(), await setting.start_executor(address_index=1)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 5)
    await frontend.until(lambda: frontend.ends)
    assert (len(first.opened), len(second.opened)) == (1, 0)


async def test_the_next_executor_takes_over_where_the_first_ends_in_order_and_streams_go_on(setting: Setting):
    first, second = await setting.start_executor(), await setting.start_executor(address_index=1)
    frontend = await setting.connect()
    await frontend.ready()
    first.going.clear()
    for stream in (1, 2, 3):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 20)
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 3)
    first.going.set()
    first.stopping.set()
    await frontend.until(lambda: len(frontend.ends) == 3)
    for stream in (1, 2, 3):
        assert frontend.tokens[stream] == continuation(range(100 * stream, 100 * stream + 10), 20)
    assert (len(first.opened), len(second.opened)) == (1, 1)
    assert second.opened[0].weights_digest == "weights"


async def test_the_next_executor_takes_over_where_the_first_is_killed_or_was_never_there(setting: Setting):
    await setting.start_executor()
    await setting.kill_executor()
    await setting.start_executor(address_index=1, die_after_plans=4)
    third = await setting.start_executor(address_index=2)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 20)
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(10), 20)
    assert len(third.opened) == 1


async def test_an_executor_that_is_held_by_another_core_is_passed_over(setting: Setting):
    held = await setting.start_executor(session_alive=True)
    free = await setting.start_executor(address_index=1)
    frontend = await setting.connect()
    await frontend.ready()
    assert (len(held.opened), len(free.opened)) == (0, 1)


@pytest.mark.parametrize("difference", [{"weights_digest": "retrained"}, {"digest": "another tokenizer"}])
async def test_an_executor_with_other_weights_or_another_tokenizer_does_not_take_over(
    setting: Setting, difference: dict[str, Any]
):
    first = await setting.start_executor()
    other = await setting.start_executor(address_index=1, **difference)
    frontend = await setting.connect()
    await frontend.ready()
    first.stopping.set()
    await lost(frontend)
    for _ in range(2):
        await other.asked.acquire()
    frontend.submit(1, range(10), 5)
    first.stopping.clear()
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(10), 5)
    assert not other.opened


# --- protocol versions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [-1, 0, 1])
async def test_an_executor_of_the_version_before_or_after_is_served_in_the_lower_of_both(setting: Setting, skew: int):
    executor = await setting.start_executor(protocol_version=PROTOCOL_VERSION + skew)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 5)
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(10), 5)
    assert executor.opened[0].protocol_version == min(PROTOCOL_VERSION, PROTOCOL_VERSION + skew)


@pytest.mark.parametrize("skew", [-2, 2])
async def test_an_executor_further_away_is_refused_and_the_log_says_why(
    setting: Setting, skew: int, caplog: pytest.LogCaptureFixture
):
    executor = await setting.start_executor(protocol_version=PROTOCOL_VERSION + skew)
    fitting = await setting.start_executor(address_index=1)
    frontend = await setting.connect()
    with caplog.at_level(logging.WARNING):
        await frontend.ready()
    assert (len(executor.opened), len(fitting.opened)) == (0, 1)
    assert f"speaks version {PROTOCOL_VERSION + skew}, this core {PROTOCOL_VERSION}" in caplog.text


# --- ends in order and otherwise ---------------------------------------------------------------------------------


async def test_requests_outlive_any_number_of_executors_that_end_in_order(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    for num_sessions in range(1, 5):
        await frontend.ready()
        executor.going.clear()
        frontend.submit(num_sessions, range(100 * num_sessions, 100 * num_sessions + 10), 30)
        await frontend.until_load(lambda load: load.running_requests)
        executor.stopping.set()
        executor.going.set()
        await lost(frontend)
        executor.stopping.clear()
        assert (await frontend.load()).load.quarantined_requests == 0
    await frontend.until(lambda: len(frontend.ends) == 4)
    assert [frontend.finish_reason(stream) for stream in range(1, 5)] == [LENGTH] * 4


async def test_requests_in_plans_of_two_killed_executors_are_tried_alone_by_the_third_and_go_on(setting: Setting):
    fakes: list[CountingFake] = []

    def make_fake(limits: ExecutorLimits) -> FakeExecutor:
        fakes.append(CountingFake(limits))
        fakes[-1].is_doomed = len(fakes) <= 2
        return fakes[-1]

    await setting.start_executor(make_fake=make_fake)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(3), 20, streams=[1, 2])
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert [frontend.tokens[stream] for stream in (1, 2)] == [continuation(range(3), 20, index) for index in (0, 1)]
    assert fakes[2].num_admitted[:3] == [1, 1, 2], "each alone, then both as ever"
    load = (await frontend.load()).load
    assert (load.quarantined_requests, load.executor_losses_total) == (0, 2)


async def test_requests_that_kill_every_executor_fail_each_by_itself(setting: Setting):
    executor = await setting.start_executor(die_after_plans=0)
    frontend = await setting.connect()
    await frontend.ready()
    for stream in (1, 2, 3):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 20)
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert {frontend.error(stream) for stream in (1, 2, 3)} == {("INTERNAL", "InternalError")}
    assert len(executor.opened) >= 2 + 3


async def test_a_plan_that_is_sent_as_the_executor_ends_in_order_is_no_other_loss(setting: Setting):
    executor = await setting.start_executor()
    async with grpc.aio.insecure_channel(setting.address) as channel:
        session = ExecutorSession(channel)
        await session.open(setting.digest, "")
        executor.stopping.set()
        with pytest.raises(SessionEnded):
            await session._read()
        session.send(StepPlan(step_id=1))
        with pytest.RaisesGroup(SessionEnded, SessionEnded):
            await session.run(lambda result: None)


# --- hangs -------------------------------------------------------------------------------------------------------


def test_a_plan_has_no_bound_until_its_kind_was_measured_and_then_one_that_grows_with_its_work():
    core = Core(dataclasses.replace(LIMITS, max_tokens_per_step=64, max_model_len=64))
    core.executor.device_time_ns = STEP_NS
    core.submit(range(10), 3)
    core.run()
    assert [plan.timeout_ms for plan in core.plans] == [0, 0, 60_000 + 20], "one step of 1 ms, times 20"
    core.submit(range(100, 150), 2)
    core.run()
    prefill, decode = core.plans[3:]
    assert prefill.timeout_ms == 60_000 + 50 * 20 // 10, "50 tokens, of which 10 take 1 ms"
    assert decode.timeout_ms >= 60_000 + 20


def test_a_plan_of_several_steps_has_the_time_of_all():
    core = Core()
    core.executor.device_time_ns = STEP_NS
    core.submit(range(4), 20)
    core.run()
    iterated = [plan for plan in core.plans if plan.iterations > 1]
    assert iterated
    assert all(plan.timeout_ms == 60_000 + 20 * plan.iterations for plan in iterated)


def test_an_executor_is_overdue_with_its_oldest_plan_alone():
    core = Core(inflight=2)
    core.executor.device_time_ns = STEP_NS
    core.submit(range(8), 100)
    for _ in range(4):
        core.step()
    while core.send() is not None:
        pass
    bound_s = core.epoch.records[0].timeout_s + epoch.TIMEOUT_SLACK_S
    assert not core.epoch.is_overdue(core.now + bound_s)
    assert core.epoch.is_overdue(core.now + bound_s + 0.001)
    core.now += bound_s
    core.settle()  # the next one begins to be the oldest
    assert not core.epoch.is_overdue(core.now + bound_s)
    while core.in_flight:
        core.settle()
    core.now += 1000.0
    assert not core.epoch.is_overdue(core.now), "nothing is in flight"


async def test_an_executor_that_never_answers_is_given_up_and_the_next_one_goes_on(
    make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(epoch, "TIMEOUT_SLACK_S", 0.1)
    setting = make_setting(step_timeout_s=0.1)
    hanging = await setting.start_executor(device_time_ns=1000)
    other = await setting.start_executor(address_index=1)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 200)
    await frontend.until(lambda: len(frontend.tokens.get(1, ())) > 20)
    hanging.going.clear()
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(10), 200)
    assert hanging.timeouts_ms[0] == 0
    assert hanging.timeouts_ms[-1] >= 100
    assert len(other.opened) == 1


async def test_an_executor_that_takes_long_over_its_first_plan_is_waited_for(
    make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(epoch, "TIMEOUT_SLACK_S", 0.0)
    setting = make_setting(step_timeout_s=0.001)
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    frontend.submit(1, range(10), 5)
    await frontend.until(lambda: frontend.started)
    await asyncio.sleep(0.5)
    executor.going.set()
    await frontend.until(lambda: frontend.ends)
    assert len(executor.opened) == 1
