"""The engine between a raw Unix-socket front end and an executor that speaks real gRPC in this process."""

import asyncio
import dataclasses
import time
from array import array
from collections.abc import Callable

import grpc.aio
import msgspec
import pytest

from scheduler_service.core.session import ExecutorSession, SessionRefused
from scheduler_service.core.step_plan import StepPlan
from scheduler_service.ipc import (
    Abandon,
    Cancel,
    CancelReply,
    EngineStatus,
    Failed,
    Finished,
    LoadQuery,
    Sampling,
    Stop,
)
from tests.unit.core_harness import CANCELLED, LENGTH, LIMITS, STOP, continuation, row_logprobs
from tests.unit.engine_harness import Setting


def without_times(end: Finished | Failed) -> Finished:
    assert isinstance(end, Finished)
    return msgspec.structs.replace(end, queue_time_ns=0, time_to_first_token_ns=0)


async def test_a_request_gets_its_start_its_tokens_and_its_end(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    assert frontend.status is not None
    assert frontend.status.model is not None
    assert (frontend.status.epoch, frontend.status.model.max_cache_tokens) == (1, 256)
    stop = continuation(range(100, 120), 5)[-1]
    frontend.submit(1, range(30), 8)
    frontend.submit(2, range(100, 120), 9, stop_token_ids=[stop])
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert frontend.tokens[1] == continuation(range(30), 8)
    assert frontend.tokens[2] == continuation(range(100, 120), 5)
    assert without_times(frontend.ends[1]) == Finished(1, LENGTH, None, 30, 0, 8, 0, 0)
    assert without_times(frontend.ends[2]) == Finished(2, STOP, stop, 20, 0, 5, 0, 0)
    assert frontend.started[1].queue_time_ns >= 0
    assert executor.opened[0].weights_digest == ""


async def test_a_request_before_any_executor_has_connected_is_unavailable(setting: Setting):
    await setting.start_executor()
    await setting.kill_executor()
    frontend = await setting.connect()
    frontend.submit(1, range(8))
    await frontend.until(lambda: frontend.ends)
    assert frontend.status == EngineStatus(False, 0, "fcfs", None)
    assert frontend.error(1) == ("UNAVAILABLE", "ExecutorUnavailable")


async def test_streams_go_on_when_the_executor_dies_and_comes_back(setting: Setting):
    await setting.start_executor(die_after_plans=9)
    frontend = await setting.connect()
    await frontend.ready()
    for stream in range(1, 5):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 30)
    await frontend.until(lambda: len(frontend.tokens) == 4 and not (frontend.status and frontend.status.ready))
    await setting.kill_executor()
    known = {stream: list(tokens) for stream, tokens in frontend.tokens.items()}
    executor = await setting.start_executor()
    await frontend.until(lambda: len(frontend.ends) == 4)
    for stream in range(1, 5):
        tokens = continuation(range(100 * stream, 100 * stream + 10), 30)
        assert tokens[: len(known[stream])] == known[stream]
        assert frontend.tokens[stream] == tokens, "none lost, none twice"
        end = frontend.ends[stream]
        assert isinstance(end, Finished)
        assert end.recoveries == 1
    assert executor.opened[0].weights_digest == "weights"
    assert executor.opened[0].epoch == 1, "a new process counts its own epochs"


async def test_streams_go_on_through_many_losses_while_requests_come_and_go(setting: Setting):
    executor = await setting.start_executor(die_after_plans=6)
    frontend = await setting.connect()
    await frontend.ready()

    async def keep_submitting() -> None:
        for stream in range(1, 61):
            frontend.submit(stream, range(100 * stream, 100 * stream + 10), 6)
            await asyncio.sleep(0.01)

    submitting = asyncio.create_task(keep_submitting())
    await frontend.until(lambda: len(executor.opened) > 8)
    executor.die_after_plans = None
    await frontend.until(lambda: len(frontend.ends) == 60)
    await submitting
    for stream in range(1, 61):
        assert frontend.tokens[stream] == continuation(range(100 * stream, 100 * stream + 10), 6)
    assert (await frontend.load()).load.used_blocks == 0
    assert [opening.epoch for opening in executor.opened] == list(range(1, len(executor.opened) + 1))


async def test_an_executor_with_other_weights_gets_no_plan_and_streams_wait_for_the_right_one(setting: Setting):
    executor = await setting.start_executor(die_after_plans=5)
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 20)
    await frontend.until(lambda: frontend.status is not None and not frontend.status.ready)
    await setting.kill_executor()
    changed = await setting.start_executor(weights_digest="retrained")
    for _ in range(3):
        await changed.asked.acquire()
    assert not changed.opened
    await setting.kill_executor()
    assert not (frontend.status and frontend.status.ready)
    await setting.start_executor()
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(10), 20)
    assert len(executor.opened) == 1


async def test_a_core_waits_while_another_one_holds_the_executor(setting: Setting):
    executor = await setting.start_executor(session_alive=True)
    frontend = await setting.connect()
    for _ in range(3):
        await executor.asked.acquire()
    assert not executor.opened
    executor.session_alive = False
    await frontend.ready()
    assert len(executor.opened) == 1


async def test_a_request_waits_no_longer_for_an_executor_than_the_longest_pause(make_setting: Callable[..., Setting]):
    setting = make_setting(max_pause_s=0.4)
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    frontend.submit(1, range(10), 20)
    await setting.kill_executor()
    await frontend.until(lambda: 1 in frontend.ends)
    submitted_at = time.monotonic()
    frontend.submit(2, range(100, 110), 20)
    await frontend.until(lambda: 2 in frontend.ends)
    assert time.monotonic() - submitted_at >= 0.4, "the pause of each request begins at its arrival"
    assert frontend.error(1) == frontend.error(2) == ("UNAVAILABLE", "ExecutorUnavailable")
    await setting.start_executor()
    await frontend.ready()
    frontend.submit(3, range(10), 5)
    await frontend.until(lambda: 3 in frontend.ends)
    assert frontend.tokens[3] == continuation(range(10), 5)


async def test_a_front_end_that_goes_away_takes_its_requests_with_it(setting: Setting):
    executor = await setting.start_executor()
    staying, leaving = await setting.connect(), await setting.connect()
    await staying.ready()
    await leaving.ready()
    executor.going.clear()
    for stream in range(1, 13):
        leaving.submit(stream, range(100 * stream, 100 * stream + 10), 10, request_id=f"lost-{stream}")
    staying.submit(1, range(10), 10)
    await staying.until_load(lambda load: load.waiting_requests + load.running_requests == 13)
    await leaving.close()
    await staying.until_load(lambda load: load.waiting_requests + load.running_requests == 1)
    executor.going.set()
    await staying.until(lambda: staying.ends)
    assert staying.tokens[1] == continuation(range(10), 10)
    assert (await staying.load()).load.used_blocks == 0


async def test_an_abandoned_stream_hears_nothing_more_and_frees_its_blocks(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    frontend.submit(1, range(10), 100)
    frontend.submit(2, range(100, 110), 10)
    frontend.send(Abandon(1))
    executor.going.set()
    await frontend.until(lambda: 2 in frontend.ends)
    assert 1 not in frontend.ends
    assert frontend.tokens[2] == continuation(range(100, 110), 10)
    assert (await frontend.load()).load.used_blocks == 0


async def test_each_choice_of_a_request_has_a_stream_and_a_continuation_of_its_own(setting: Setting):
    await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 7, streams=[1, 5, 3])
    await frontend.until(lambda: len(frontend.ends) == 3)
    for index, stream in enumerate([1, 5, 3]):
        assert frontend.tokens[stream] == continuation(range(10), 7, choice_index=index)
        assert frontend.finish_reason(stream) == LENGTH


async def test_cancelling_an_id_ends_its_choices_and_abandoning_a_stream_ends_one(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    frontend.submit(1, range(10), 7, streams=[1, 2, 3], request_id="kept")
    frontend.submit(4, range(10), 7, streams=[4, 5, 6], request_id="cancelled")
    frontend.send(Abandon(2))
    frontend.send(Cancel(9, "", "cancelled"))
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert frontend.replies == [CancelReply(9, True)]
    assert [frontend.finish_reason(stream) for stream in (4, 5, 6)] == [CANCELLED] * 3
    frontend.submit(7, range(10), 7, streams=[7, 8], request_id="kept")
    await frontend.until(lambda: 8 in frontend.ends)
    assert frontend.error(7) == frontend.error(8) == ("ALREADY_EXISTS", "DuplicateRequest")
    executor.going.set()
    await frontend.until(lambda: 3 in frontend.ends and 1 in frontend.ends)
    assert frontend.tokens[3] == continuation(range(10), 7, choice_index=2)
    assert 2 not in frontend.ends
    frontend.send(Cancel(10, "", "kept"))
    await frontend.until(lambda: len(frontend.replies) == 2)
    assert frontend.replies[-1] == CancelReply(10, False)


async def test_a_stream_that_a_stop_string_ends_finishes_with_stop(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 200, streams=[1, 2])
    await frontend.until(lambda: frontend.tokens.get(1))
    executor.going.clear()
    frontend.send(Stop(1))
    await frontend.until(lambda: 1 in frontend.ends)
    executor.going.set()
    await frontend.until(lambda: 2 in frontend.ends)
    end = frontend.ends[1]
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_token_id, end.output_tokens) == (STOP, None, len(frontend.tokens[1]))
    assert end.output_tokens < 200
    assert frontend.finish_reason(2) == LENGTH
    frontend.send(Stop(1))
    frontend.send(Stop(99))
    assert (await frontend.load()).load.finished_requests_total == 2, "a stop that comes too late changes nothing"


async def test_log_probabilities_go_out_with_their_tokens_and_the_prompts_before_them(setting: Setting):
    await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(30), 8, streams=[1, 2], sampling=Sampling(logprobs=2, prompt_logprobs=0))
    frontend.submit(3, range(30), 8)
    await frontend.until(lambda: len(frontend.ends) == 3)
    for index, stream in enumerate([1, 2]):
        tokens = continuation(range(30), 8, choice_index=index)
        assert [array("i", row.token_ids)[0] for row in frontend.logprobs[stream]] == tokens
        assert [row.rank for row in frontend.logprobs[stream]] == [
            row_logprobs(30 + position, token, 3).rank for position, token in enumerate(tokens)
        ]
    assert frontend.prompt_logprobs.keys() == {1}
    prompt = frontend.prompt_logprobs[1]
    assert (prompt.width, list(array("i", prompt.token_ids))) == (1, list(range(1, 30)))
    assert frontend.logprobs.keys() == {1, 2}


async def test_times_are_measured_from_the_arrival_at_the_front_end(setting: Setting):
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    arrival = time.monotonic() - 5.0
    frontend.submit(1, range(10), 2, arrival=arrival)
    await frontend.until(lambda: frontend.started)
    going_at = time.monotonic()
    executor.going.set()
    await frontend.until(lambda: frontend.ends)
    end = frontend.ends[1]
    assert isinstance(end, Finished)
    assert 5.0 <= end.queue_time_ns / 1e9 <= going_at - arrival
    assert going_at - arrival <= end.time_to_first_token_ns / 1e9 <= time.monotonic() - arrival
    assert end.queue_time_ns == frontend.started[1].queue_time_ns


async def test_any_front_end_can_cancel_a_request_by_its_id(setting: Setting):
    executor = await setting.start_executor()
    owner, other = await setting.connect(), await setting.connect()
    await owner.ready()
    executor.going.clear()
    owner.submit(1, range(10), 100)
    owner.send(LoadQuery(1))
    await owner.until(lambda: owner.replies)
    other.send(Cancel(7, "", "request-1"))
    other.send(Cancel(8, "", "nobody"))
    await other.until(lambda: len(other.replies) == 2)
    assert other.replies == [CancelReply(7, True), CancelReply(8, False)]
    await owner.until(lambda: owner.ends)
    assert owner.finish_reason(1) == CANCELLED
    executor.going.set()


async def test_deadlines_hold_in_the_queue_and_while_running(setting: Setting):
    executor = await setting.start_executor(dataclasses.replace(LIMITS, num_slots=1))
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(3, range(10), 20, deadline=time.monotonic() - 0.1)
    executor.going.clear()
    frontend.submit(1, range(10), 20, deadline=time.monotonic() + 0.2)
    frontend.submit(2, range(10), 20, deadline=time.monotonic() + 0.2)
    frontend.submit(4, range(10), 20)
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert all(frontend.error(stream) == ("DEADLINE_EXCEEDED", "DeadlineExceeded") for stream in (1, 2, 3))
    assert 3 not in frontend.started
    executor.going.set()
    await frontend.until(lambda: 4 in frontend.ends)
    assert frontend.tokens[4] == continuation(range(10), 20)


async def test_refusals_name_their_status(make_setting: Callable[..., Setting]):
    setting = make_setting(max_waiting=3)
    executor = await setting.start_executor(dataclasses.replace(LIMITS, num_slots=1))
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    frontend.submit(1, range(256), 1)
    frontend.submit(2, range(200), 57)
    frontend.submit(3, range(10), 20)
    frontend.submit(4, range(10), 20, request_id="request-3")
    for stream in range(5, 10):
        frontend.submit(stream, range(10), 2)
    await frontend.until(lambda: len(frontend.ends) == 5)
    assert frontend.error(1) == frontend.error(2) == ("INVALID_ARGUMENT", "ContextLengthExceeded")
    assert frontend.error(4) == ("ALREADY_EXISTS", "DuplicateRequest")
    assert frontend.error(8) == frontend.error(9) == ("RESOURCE_EXHAUSTED", "QueueFull")
    full = frontend.ends[9]
    assert isinstance(full, Failed)
    assert full.retry_after_s is not None
    executor.going.set()
    await frontend.until(lambda: len(frontend.ends) == 9)


async def test_unset_max_tokens_means_as_many_as_fit(setting: Setting):
    await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(200), None)
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(range(200), 56)


async def test_a_frame_that_is_no_message_ends_that_connection_alone(
    setting: Setting, caplog: pytest.LogCaptureFixture
):
    await setting.start_executor()
    good, bad = await setting.connect(), await setting.connect()
    await good.ready()
    bad.write(b"\x03\x00\x00\x00\xc1\xc1\xc1")
    while await bad.read() is not None:
        pass
    assert "no message" in caplog.text
    good.submit(1, range(10), 5)
    await good.until(lambda: good.ends)
    assert good.tokens[1] == continuation(range(10), 5)


async def test_the_engine_stops_while_front_ends_are_connected(setting: Setting):
    await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    frontend.submit(1, range(10), 200)
    await frontend.until(lambda: frontend.tokens)
    assert setting.engine is not None
    setting.engine.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([setting.engine])
        while await frontend.read() is not None:
            pass


async def test_a_plan_that_is_sent_as_the_executor_dies_is_a_loss_like_any_other(setting: Setting):
    await setting.start_executor()
    async with grpc.aio.insecure_channel(setting.address) as channel:
        session = ExecutorSession(channel)
        await session.open(setting.digest, "")
        await setting.kill_executor()
        with pytest.raises(grpc.aio.AioRpcError):
            await session._read()
        session.send(StepPlan(step_id=1))
        with pytest.RaisesGroup(SessionRefused, grpc.aio.AioRpcError):
            await session.run(lambda result: None)
