"""RunSession through a real channel, against a runner that is a script."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import executor_service.device
from executor_service.device import Device, Followers
from executor_service.plan import InvalidPlan, Limits, Plan
from executor_service.runner.runner import CONTINUES, PromptLogprobs, RunnerInfo, StepLogprobs, StepOutput
from executor_service.server import SERVICE, ListenError, serve
from executor_service.session import MAX_INFLIGHT_PLANS, PROTOCOL_VERSION
from executor_service.watchdog import Watchdog
from protos.duet.executor.v1 import executor_pb2 as pb

Code = grpc.StatusCode
LIMITS = Limits(num_slots=4, num_blocks=8, block_size=4, vocab_size=100, max_model_len=32, max_tokens_per_step=16)
INFO = RunnerInfo("TinyForCausalLM", "model", "weights", "float32", "a script", LIMITS, (1, 2))


class ScriptedRunner:
    """Samples token 10 * step_id for the slots that sample; `before` runs first in every plan, on the device thread."""

    def __init__(self, before: Callable[[Plan], None] = lambda plan: None) -> None:
        self.info = INFO
        self.before = before
        self.history: list[str] = []
        self.gate = threading.Event()  # closed, the plan that runs stays on the device
        self.gate.set()
        self.decode_set: set[int] = set()

    def reset(self) -> None:
        self.history.append("reset")
        self.decode_set.clear()

    def execute(self, plan: Plan) -> Iterator[StepOutput]:
        self.history.append(f"plan {plan.step_id}")
        assert self.gate.wait(30)
        self.before(plan)
        self.decode_set |= set(plan.join_slots.tolist())
        self.decode_set -= set(plan.leave_slots.tolist())
        first = [slot for slot, samples in zip(plan.prefill_slots, plan.prefill_samples, strict=True) if samples]
        both = bool(first) and bool(self.decode_set) and plan.iterations > 0
        if first or not plan.iterations:
            yield self._output(plan.step_id, first, partial=both)
        if both or not first:
            for step_id in range(plan.step_id, plan.step_id + plan.iterations):
                yield self._output(step_id, sorted(self.decode_set), partial=False)

    def _output(self, step_id: int, slots: list[int], *, partial: bool) -> StepOutput:
        columns = (
            np.array(column, dtype=np.int32)
            for column in (slots, [10 * step_id] * len(slots), [CONTINUES] * len(slots))
        )
        return StepOutput(step_id, partial, *columns, slot_errors=[], device_time_ns=7)


@dataclasses.dataclass
class Executor:
    """One that serves in this process."""

    runner: ScriptedRunner
    address: str
    channel: grpc.aio.Channel
    serving: asyncio.Task[bool]
    stop: asyncio.Event

    def connect(self, channel: grpc.aio.Channel | None = None) -> "Core":
        multi = (channel or self.channel).stream_stream(
            f"/{SERVICE}/RunSession", response_deserializer=pb.RunSessionResponse.FromString
        )
        return Core(multi())


@dataclasses.dataclass
class Core:
    """The client's side of one stream."""

    call: grpc.aio.StreamStreamCall[bytes, pb.RunSessionResponse]
    epoch: int = 0

    async def read(self) -> pb.RunSessionResponse:
        message = await self.call.read()
        assert isinstance(message, pb.RunSessionResponse)
        return message

    async def info(self) -> pb.ExecutorInfo:
        return (await self.read()).info

    async def ask(
        self, epoch: int, *, model: str = "model", weights: str = "", version: int = PROTOCOL_VERSION
    ) -> None:
        opening = pb.OpenSession(epoch=epoch, protocol_version=version, model_digest=model, weights_digest=weights)
        await self.call.write(pb.RunSessionRequest(open=opening).SerializeToString())

    async def open(self) -> "Core":
        self.epoch = (await self.info()).last_epoch + 1
        await self.ask(self.epoch)
        assert (await self.read()).opened.epoch == self.epoch
        return self

    async def plan(self, step_id: int, **fields: object) -> None:
        plan = pb.StepPlan(**{"epoch": self.epoch, "step_id": step_id, "iterations": 1, **fields})  # pyright: ignore[reportArgumentType]
        await self.call.write(pb.RunSessionRequest(plan=plan).SerializeToString())

    async def result(self) -> pb.StepResult:
        message = await self.read()
        assert message.HasField("result")
        return message.result

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Read to the end; its status."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return await self.call.code(), await self.call.details()


@contextlib.asynccontextmanager
async def running(runner: ScriptedRunner, followers: Followers | None = None) -> AsyncIterator[Executor]:
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
    with ThreadPoolExecutor(1) as thread:
        serving = asyncio.create_task(serve(runner, thread, "127.0.0.1:0", stop, listening.set_result, followers))
        address = f"127.0.0.1:{await listening}"
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                yield Executor(runner, address, channel, serving, stop)
            finally:
                runner.gate.set()
                stop.set()
                await serving


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with running(ScriptedRunner()) as executor:
        yield executor


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def column(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


# --- opening -----------------------------------------------------------------------------------------------------


async def test_executor_speaks_first_and_describes_itself(executor: Executor) -> None:
    info = await executor.connect().info()
    assert info.boot_id
    info.boot_id = ""
    assert info == pb.ExecutorInfo(
        protocol_version=3, architecture="TinyForCausalLM", model_digest="model", weights_digest="weights",
        dtype="float32", device="a script", vocab_size=100, max_model_len=32, block_size=4, num_blocks=8, num_slots=4,
        max_tokens_per_step=16, graph_batch_sizes=[1, 2], tensor_parallel_size=1, max_inflight_plans=MAX_INFLIGHT_PLANS,
    )  # fmt: skip


async def test_opening_wipes_the_slots_and_is_seen_by_the_next_core(executor: Executor) -> None:
    await executor.connect().open()
    assert executor.runner.history == ["reset"]
    info = await executor.connect().info()
    assert (info.last_epoch, info.session_alive) == (1, True)


@pytest.mark.parametrize("epoch", [0, 1, 3, 2**63])
async def test_an_epoch_that_does_not_follow_is_aborted_and_disturbs_nobody(executor: Executor, epoch: int) -> None:
    holder = await executor.connect().open()
    late = executor.connect()
    await late.info()
    await late.ask(epoch)
    assert (await late.end())[0] is Code.ABORTED
    await holder.plan(1)
    assert (await holder.result()).step_id == 1


async def test_of_two_cores_that_ask_for_one_epoch_exactly_one_gets_it(executor: Executor) -> None:
    cores = [executor.connect() for _ in range(2)]
    for core in cores:
        await core.info()
    await asyncio.gather(*(core.ask(1) for core in cores))
    answers = await asyncio.gather(*(core.read() for core in cores), return_exceptions=True)
    assert sum(isinstance(answer, pb.RunSessionResponse) for answer in answers) == 1
    (loser,) = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert loser.code() is Code.ABORTED


@pytest.mark.parametrize(
    ("difference", "word"),
    [({"model": "other"}, "model_digest"), ({"weights": "other"}, "weights_digest"), ({"version": 9}, "version")],
)
async def test_a_core_that_does_not_match_is_refused_and_does_not_fence(
    executor: Executor, difference: dict[str, str], word: str
) -> None:
    holder = await executor.connect().open()
    other = executor.connect()
    await other.info()
    await other.ask(2, **difference)  # pyright: ignore[reportArgumentType]
    code, message = await other.end()
    assert code is Code.FAILED_PRECONDITION
    assert word in message
    await holder.plan(1)
    assert (await holder.result()).step_id == 1


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION, PROTOCOL_VERSION + 1])
async def test_a_core_one_version_older_or_newer_is_served(executor: Executor, version: int) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, version=version)
    assert (await core.read()).opened.epoch == 1
    core.epoch = 1
    await core.plan(1)
    assert (await core.result()).step_id == 1


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 2, PROTOCOL_VERSION + 2])
async def test_a_core_further_away_than_one_version_is_refused(executor: Executor, version: int) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, version=version)
    code, message = await core.end()
    assert code is Code.FAILED_PRECONDITION
    assert f"protocol version {version}" in message
    assert executor.runner.history == []


async def test_equal_weights_digest_is_accepted(executor: Executor) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, weights="weights")
    assert (await core.read()).opened.epoch == 1


async def test_a_session_opens_once(executor: Executor) -> None:
    core = await executor.connect().open()
    await core.ask(2)
    assert (await core.end())[0] is Code.FAILED_PRECONDITION


# --- fencing and loss --------------------------------------------------------------------------------------------


async def test_a_later_epoch_fences_the_older_one_whose_queued_plans_never_run(executor: Executor) -> None:
    runner = executor.runner
    runner.gate.clear()
    old = await executor.connect().open()
    for step_id in (1, 2, 3):
        await old.plan(step_id)
    await until(lambda: "plan 1" in runner.history)
    new = executor.connect()
    await new.info()
    await new.ask(2)
    assert await old.end() == (Code.ABORTED, "fenced by epoch 2")
    opened = asyncio.create_task(new.read())
    await asyncio.sleep(0.05)
    assert not opened.done()  # the device still runs the old epoch's first plan
    runner.gate.set()
    assert (await opened).opened.epoch == 2
    new.epoch = 2
    await new.plan(1)
    assert (await new.result()).epoch == 2
    assert runner.history == ["reset", "plan 1", "reset", "plan 1"]


async def test_no_plan_is_taken_between_the_opening_and_its_confirmation(executor: Executor) -> None:
    runner = executor.runner
    runner.gate.clear()
    old = await executor.connect().open()
    await old.plan(1)
    await until(lambda: "plan 1" in runner.history)
    new = executor.connect()
    await new.info()
    await new.ask(2)
    new.epoch = 2
    await new.plan(1)
    assert (await new.end())[0] is Code.FAILED_PRECONDITION
    runner.gate.set()
    await executor.connect().open()
    assert runner.history == ["reset", "plan 1", "reset"]  # the refused session's wiping was dropped with it


@pytest.mark.parametrize("how", ["cancel", "close", "vanish"])
async def test_a_core_that_went_away_loses_its_queued_plans_and_the_next_one_opens(
    executor: Executor, how: str
) -> None:
    runner = executor.runner
    runner.gate.clear()
    channel = grpc.aio.insecure_channel(executor.address, options=[("grpc.use_local_subchannel_pool", 1)])
    old = await executor.connect(channel).open()
    await old.plan(1)
    await old.plan(2)
    await until(lambda: "plan 1" in runner.history)
    match how:
        case "cancel":
            old.call.cancel()
        case "close":
            await old.call.done_writing()
        case "vanish":
            await channel.close()
    deadline = time.monotonic() + 30
    while (await executor.connect().info()).session_alive:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    runner.gate.set()
    new = await executor.connect().open()
    assert new.epoch == 2
    await new.plan(1)
    assert (await new.result()).step_id == 1
    assert runner.history == ["reset", "plan 1", "reset", "plan 1"]
    await channel.close()


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


NEW = {"slot": 0, "token_ids": column(1, 2), "num_prompt_tokens": 2, "block_ids": column(0), "max_total_tokens": 9}


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


def refuse_second(plan: Plan) -> None:
    if plan.step_id == 2:
        raise InvalidPlan("slot 3 is taken")


def break_second(plan: Plan) -> None:
    if plan.step_id == 2:
        raise RuntimeError("matrix on fire")


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
