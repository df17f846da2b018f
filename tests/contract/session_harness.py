"""An executor whose runner is a script, and the core's side of RunSession with it."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from executor_service.device import Followers
from executor_service.plan import InvalidPlan, Limits, Plan
from executor_service.runner.runner import CONTINUES, RunnerInfo, StepOutput
from executor_service.server import SERVICE, serve
from executor_service.session import PROTOCOL_VERSION
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


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def column(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


NEW = {
    "slot": 0,
    "token_ids": column(1, 2),
    "num_prompt_tokens": 2,
    "block_ids": column(0),
    "max_total_tokens": 9,
}


def refuse_second(plan: Plan) -> None:
    if plan.step_id == 2:
        raise InvalidPlan("slot 3 is taken")


def break_second(plan: Plan) -> None:
    if plan.step_id == 2:
        raise RuntimeError("matrix on fire")
