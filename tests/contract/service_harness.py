"""Front ends and the core of one scheduler service, on an executor that speaks a text: real gRPC on all sides."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from protos.duet.admin.v1 import admin_pb2_grpc
from protos.duet.executor.v1 import executor_pb2 as executor_pb
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1 import inference_pb2_grpc
from scheduler_service.config import SchedulerConfig
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.frontend.server import FrontendServer, Stop
from tests.small_model import byte_level_bpe, write_model
from tests.unit.core_fake import FakeExecutor, Slot
from tests.unit.core_harness import LIMITS
from tests.unit.engine_harness import ScriptedExecutor, Setting

TEXT = "né brown 😀 foxes — 你好，世界 jump 👩‍🚀 over the 🎉 lazy dog: " * 3
TOKENS: list[int] = byte_level_bpe().encode(TEXT).ids


class SpeakingFake(FakeExecutor):
    """Continues every prompt with TOKENS, the choice of index i from the i-th on."""

    def __init__(self, limits: ExecutorLimits) -> None:
        super().__init__(limits)
        self._starts: dict[int, int] = {}  # by slot, which nobody shares

    def _seat(self, sequence: executor_pb.NewSequence) -> None:
        super()._seat(sequence)
        self._starts[id(self.slots[sequence.slot])] = sequence.sampling.choice_index

    def next_token(self, sequence: Slot) -> int:
        return TOKENS[self._starts[id(sequence)] + sequence.num_tokens - len(sequence.prompt)]


@dataclasses.dataclass
class Front:
    """One front end, and what speaks to it."""

    server: FrontendServer
    stop: Stop
    running: asyncio.Task[None]
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def admin(self) -> Any:
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    async def kill(self) -> None:
        """It is gone without a word to anybody."""
        self.stop.stop()
        await self.channel.close()
        await self.running

    async def load(self) -> pb.Load:
        return (await self.stub.GetServer(pb.GetServerRequest())).load


class Service:
    """A core with front ends and an executor."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self._model = write_model(directory / "tiny")
        self._options = options
        self.setting = Setting(self._model)
        self.fronts: list[Front] = []
        self.executor: ScriptedExecutor

    async def start(self, num_fronts: int = 2) -> None:
        limits = dataclasses.replace(LIMITS, num_blocks=200, max_model_len=800, max_tokens_per_step=64)
        self.executor = await self.setting.start_executor(limits, vocab_size=400, make_fake=SpeakingFake)
        await self.setting.start_core()
        for _ in range(num_fronts):
            await self.start_front()

    async def start_front(self) -> Front:
        config = SchedulerConfig(
            model=str(self._model), listen="127.0.0.1:0", core_socket=self.setting.socket, **self._options
        )
        server, stop, ready = FrontendServer(config), Stop(), asyncio.Event()
        running = asyncio.create_task(server.run(stop, ready.set))
        await asyncio.wait_for(ready.wait(), 10)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        front = Front(server, stop, running, channel)
        self.fronts.append(front)
        await server.core.wait_for_model(10)
        return front

    async def until_load(self, **wanted: int) -> None:
        """Ask the last front end for the load until it is as wanted; `alive` stands for all that wait or run."""
        async with asyncio.timeout(10):
            while True:
                load = await self.fronts[-1].load()
                found = {"alive": load.waiting_requests + load.running_requests}
                found |= {name: getattr(load, name) for name in wanted if name not in found}
                if all(found[name] == value for name, value in wanted.items()):
                    return
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        for front in self.fronts:
            await front.kill()
        await self.setting.stop()


@contextlib.asynccontextmanager
async def running_service(directory: Path, num_fronts: int = 2, **options: Any) -> AsyncIterator[Service]:
    service = Service(directory, **options)
    await service.start(num_fronts)
    try:
        yield service
    finally:
        await service.stop()


async def read_until(call: Any, num_tokens: int) -> list[pb.GenerateResponse]:
    """Responses of one continuation up to the one that brings the last of so many tokens."""
    responses: list[pb.GenerateResponse] = []
    while sum(len(response.delta.token_ids) for response in responses) < num_tokens:
        response = await call.read()
        assert response is not grpc.aio.EOF
        responses.append(response)
    return responses


def deltas_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> list[pb.TokenDelta]:
    return [one.delta for one in responses if one.HasField("delta") and one.delta.index == index]
