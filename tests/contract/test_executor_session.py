"""RunSession through a real channel, against a runner that is a script: plans, results and failures."""

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import executor_service.device
from executor_service.device import Device
from executor_service.plan import Plan
from executor_service.runner.runner import PromptLogprobs, StepLogprobs, StepOutput
from executor_service.server import SERVICE, ListenError, serve
from executor_service.session import MAX_INFLIGHT_PLANS
from executor_service.watchdog import Watchdog
from protos.duet.executor.v1 import executor_pb2 as pb
from tests.contract.session_harness import (
    NEW,
    Code,
    Executor,
    ScriptedRunner,
    break_second,
    column,
    refuse_second,
    running,
    until,
)

# --- plans and results -------------------------------------------------------------------------------------------


async def test_a_plan_before_the_opening_is_refused(executor: Executor) -> None:
    core = executor.connect()
    await core.info()
    await core.plan(1)
    assert (await core.end())[0] is Code.FAILED_PRECONDITION
    assert executor.runner.history == []


async def test_results_come_in_step_order_partial_before_final(executor: Executor) -> None:
    core = await executor.connect().open()
    chunk = {
        "prefill_slots": column(1), "prefill_starts": column(0), "prefill_counts": column(3),
        "prefill_samples": column(1),
    }  # fmt: skip
    await core.plan(1, iterations=0, **chunk)
    await core.plan(2, join_slots=column(0), **chunk)
    await core.plan(3, leave_slots=column(0), iterations=0)
    results = [await core.result() for _ in range(4)]
    assert [(r.step_id, r.partial, r.slots) for r in results] == [
        (1, False, column(1)), (2, True, column(1)), (2, False, column(0)), (3, False, b"")
    ]  # fmt: skip
    first = results[0]
    assert (first.epoch, first.token_ids, first.finish_reasons, first.device_time_ns) == (1, column(10), column(0), 7)


async def test_log_probabilities_leave_as_columns_where_there_are_any() -> None:
    step = StepLogprobs(
        np.array([3, 3, 99], dtype=np.int32), np.array([-0.5, -0.5, -2], dtype=np.float32), np.array([1], np.int32)
    )
    prompts = [
        PromptLogprobs(
            slot, 1, np.array([slot, 5], np.int32), np.array([-7, -0.25], np.float32), np.array([8], np.int32)
        )
        for slot in (2, 0)
    ]

    class Reporting(ScriptedRunner):
        def execute(self, plan: Plan) -> Iterator[StepOutput]:
            for output in super().execute(plan):
                is_first = output.step_id == 1
                yield dataclasses.replace(output, logprobs=step, prompt_logprobs=prompts) if is_first else output

    async with running(Reporting()) as executor:
        core = await executor.connect().open()
        await core.plan(1)
        await core.plan(2)
        first, second = [await core.result() for _ in range(2)]
    assert (first.logprob_token_ids, first.logprob_ranks) == (column(3, 3, 99), column(1))
    assert np.frombuffer(first.logprobs, dtype="<f4").tolist() == [-0.5, -0.5, -2]
    assert [(part.slot, part.start, part.token_ids, part.ranks) for part in first.prompt_logprobs] == [
        (2, 1, column(2, 5), column(8)), (0, 1, column(0, 5), column(8))
    ]  # fmt: skip
    assert [np.frombuffer(part.logprobs, "<f4").tolist() for part in first.prompt_logprobs] == [[-7, -0.25]] * 2
    assert (second.logprob_token_ids, second.logprobs, second.logprob_ranks) == (b"", b"", b"")
    assert not second.prompt_logprobs


async def test_one_plan_of_k_iterations_gives_k_results_and_uses_up_k_step_ids(executor: Executor) -> None:
    core = await executor.connect().open()
    await core.plan(1, iterations=5, join_slots=column(2))
    await core.plan(6)
    results = [await core.result() for _ in range(6)]
    assert [r.step_id for r in results] == [1, 2, 3, 4, 5, 6]
    assert [r.token_ids for r in results] == [column(10 * step_id) for step_id in range(1, 7)]


async def test_results_leave_while_later_steps_of_the_same_plan_still_run() -> None:
    class Halting(ScriptedRunner):
        def execute(self, plan: Plan) -> Iterator[StepOutput]:
            yield self._output(1, [0], partial=True)
            assert self.gate.wait(30)
            yield self._output(1, [1], partial=False)

    async with running(Halting()) as executor:
        core = await executor.connect().open()
        executor.runner.gate.clear()
        await core.plan(1)
        assert (await core.result()).partial
        executor.runner.gate.set()
        assert not (await core.result()).partial


@pytest.mark.parametrize("fields", [{"epoch": 2}, {"epoch": 0}, {"step_id": 1}, {"step_id": 3}, {"step_id": 0}])
async def test_a_plan_of_another_epoch_or_out_of_step_is_refused(executor: Executor, fields: dict[str, int]) -> None:
    core = await executor.connect().open()
    await core.plan(1)
    await core.result()
    await core.plan(**{"step_id": 2, **fields})  # pyright: ignore[reportArgumentType]
    assert (await core.end())[0] is Code.FAILED_PRECONDITION
    assert executor.runner.history == ["reset", "plan 1"]


async def test_a_settled_plan_makes_room_at_once_and_one_more_is_refused() -> None:
    permits = threading.Semaphore(0)

    def wait_for_permit(_: Plan) -> None:
        assert permits.acquire(timeout=30)

    async with running(ScriptedRunner(wait_for_permit)) as executor:
        core = await executor.connect().open()
        for step_id in range(1, MAX_INFLIGHT_PLANS + 1):
            await core.plan(step_id)
        for step_id in range(1, 51):  # exactly full before each result and after each plan
            permits.release()
            assert (await core.result()).step_id == step_id
            await core.plan(step_id + MAX_INFLIGHT_PLANS)
        await core.plan(51 + MAX_INFLIGHT_PLANS)
        code, message = await core.end()
        assert code is Code.FAILED_PRECONDITION
        assert str(MAX_INFLIGHT_PLANS) in message
        permits.release()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"release_slots": b"123"}, "release_slots"),
        ({"release_slots": column(4)}, "release_slots"),
        ({"release_slots": column(-1)}, "release_slots"),
        ({"append_slots": column(0)}, "append_blocks"),
        ({"append_slots": column(0), "append_blocks": column(8)}, "append_blocks"),
        ({"prefill_slots": column(0)}, "prefill_starts"),
        ({"join_slots": column(99)}, "join_slots"),
        ({"leave_slots": b"1"}, "leave_slots"),
        ({"iterations": 33}, "iterations"),
        (
            {
                "prefill_slots": column(0, 1),
                "prefill_starts": column(0, 0),
                "prefill_counts": column(9, 9),
                "prefill_samples": column(0, 0),
            },
            "prefill_counts",
        ),
        (
            {
                "prefill_slots": column(0),
                "prefill_starts": column(0),
                "prefill_counts": column(1),
                "prefill_samples": column(0),
                "iterations": 2,
            },
            "iterations",
        ),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "slot": 4})]}, "slot 4"),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "token_ids": column(1, 100)})]}, "token_ids"),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "token_ids": b""})]}, "tokens"),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "num_cached_tokens": 2})]}, "cached"),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "block_ids": b""})]}, "blocks"),
        ({"new_sequences": [pb.NewSequence(**{**NEW, "max_total_tokens": 33})]}, "max_total_tokens"),
        (
            {"new_sequences": [pb.NewSequence(**NEW, sampling=pb.SamplingParams(presence_penalty=float("nan")))]},
            "presence_penalty",
        ),
        ({"mask_slots": column(0)}, "masks"),
    ],
)
async def test_a_malformed_plan_is_an_invalid_argument_that_names_the_field(
    executor: Executor, fields: dict[str, object], word: str
) -> None:
    core = await executor.connect().open()
    await core.plan(1, **fields)
    code, message = await core.end()
    assert code is Code.INVALID_ARGUMENT
    assert word in message
    assert executor.runner.history == ["reset"]


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"", b"\x0a\x05ab"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(executor: Executor, data: bytes) -> None:
    core = await executor.connect().open()
    await core.call.write(data)
    assert (await core.end())[0] is Code.INVALID_ARGUMENT
    await executor.connect().open()  # nothing else was harmed


# --- the runner's own refusals and failures ----------------------------------------------------------------------


async def test_a_plan_that_the_runner_refuses_ends_the_session_and_not_the_executor() -> None:
    async with running(ScriptedRunner(refuse_second)) as executor:
        executor.runner.gate.clear()
        core = await executor.connect().open()
        for step_id in (1, 2, 3):
            await core.plan(step_id)
        executor.runner.gate.set()
        assert (await core.result()).step_id == 1
        assert await core.end() == (Code.INVALID_ARGUMENT, "slot 3 is taken")
        await executor.connect().open()
        assert executor.runner.history == ["reset", "plan 1", "plan 2", "reset"]  # and never plan 3
        assert not executor.serving.done()


async def test_a_runner_that_fails_ends_the_session_and_then_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with running(ScriptedRunner(break_second)) as executor:
        executor.runner.gate.clear()
        core = await executor.connect().open()
        for step_id in (1, 2, 3):
            await core.plan(step_id)
        executor.runner.gate.set()
        assert (await core.result()).step_id == 1
        code, message = await core.end()
        assert code is Code.INTERNAL
        assert "matrix on fire" in message
        assert await executor.serving is False
        assert executor.runner.history == ["reset", "plan 1", "plan 2"]
    assert "matrix on fire" in caplog.text


async def test_a_runner_that_skips_the_last_result_counts_as_failed() -> None:
    class Forgetful(ScriptedRunner):
        def execute(self, plan: Plan) -> Iterator[StepOutput]:
            yield from list(super().execute(plan))[:-1]

    async with running(Forgetful()) as executor:
        core = await executor.connect().open()
        await core.plan(1, iterations=3)
        assert (await core.end())[0] is Code.INTERNAL
        assert await executor.serving is False


# --- the watchdog ------------------------------------------------------------------------------------------------


async def test_what_was_answered_refused_or_dropped_never_counts_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdogs: list[Watchdog] = []

    class Seen(Watchdog):
        def __init__(self) -> None:
            super().__init__()
            watchdogs.append(self)

        async def watch(self) -> NoReturn:
            await asyncio.Future()  # only the test looks
            raise AssertionError

    monkeypatch.setattr(executor_service.device, "Watchdog", Seen)
    async with running(ScriptedRunner(refuse_second)) as executor:
        runner = executor.runner
        runner.gate.clear()
        old = await executor.connect().open()
        for step_id in (1, 2):  # the second is dropped, and so is the wiping for a session that is refused meanwhile
            await old.plan(step_id, timeout_ms=60_000)
        await until(lambda: "plan 1" in runner.history)
        (watchdog,) = watchdogs
        hasty = executor.connect()
        hasty.epoch = (await hasty.info()).last_epoch + 1
        await hasty.ask(hasty.epoch)
        await hasty.plan(1, timeout_ms=60_000)
        assert (await hasty.end())[0] is Code.FAILED_PRECONDITION
        assert [watchdog.look(0.0), watchdog.look(100.0)][-1] == "step 1 has taken 100.0 s, and may take 60.0 s"
        runner.gate.set()
        core = await executor.connect().open()
        for step_id in (1, 2):  # the second is refused
            await core.plan(step_id, iterations=1, timeout_ms=60_000)
        assert (await core.end())[0] is Code.INVALID_ARGUMENT
        assert [watchdog.look(1e6), watchdog.look(1e6)] == [None, None]


# --- the server --------------------------------------------------------------------------------------------------


async def test_an_executor_that_is_told_to_stop_ends_its_sessions_with_ok_and_starts_no_queued_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(ScriptedRunner()) as executor:
        runner, close = executor.runner, Device.close

        def release_and_close(device: Device) -> None:
            runner.gate.set()
            close(device)

        monkeypatch.setattr(Device, "close", release_and_close)
        core, waiting = await executor.connect().open(), executor.connect()
        await waiting.info()
        runner.gate.clear()
        for step_id in (1, 2):
            await core.plan(step_id)
        await until(lambda: "plan 1" in runner.history)
        executor.stop.set()
        ends = await asyncio.gather(core.end(), waiting.end())
    assert [code for code, _ in ends] == [Code.OK, Code.OK]
    assert executor.serving.result() is True
    assert runner.history == ["reset", "plan 1"]


async def test_the_failure_of_the_device_is_no_orderly_end_for_any_session() -> None:
    async with running(ScriptedRunner(break_second)) as executor:
        core, waiting = await executor.connect().open(), executor.connect()
        await waiting.info()
        await core.plan(1)
        await core.plan(2)
        assert (await core.end())[0] is Code.INTERNAL
        assert await waiting.end() == (Code.UNAVAILABLE, "the device failed")


async def test_a_second_executor_on_the_port_fails_with_one_sentence(executor: Executor) -> None:
    with ThreadPoolExecutor(1) as thread, pytest.raises(ListenError, match=executor.address):
        await serve(ScriptedRunner(), thread, executor.address, asyncio.Event())


async def test_health_and_reflection_are_served(executor: Executor) -> None:
    check = executor.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for service in ("", SERVICE):
        reply = await check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflect = executor.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listing = await reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")])).read()
    assert isinstance(listing, reflection_pb2.ServerReflectionResponse)
    names = {service.name for service in listing.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_message_of_many_mebibytes_arrives(executor: Executor) -> None:
    core = await executor.connect().open()
    await core.plan(1, release_slots=column(0) * (3 << 20))  # 12 MiB, three times gRPC's default limit
    assert (await core.result()).step_id == 1
