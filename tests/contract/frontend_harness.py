"""A front end between real gRPC clients and a fake core that speaks ipc.py."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1 import inference_pb2_grpc
from scheduler_service import ipc
from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.server import FrontendServer, Stop
from tests.small_model import byte_level_bpe, write_model

MODEL = ipc.ModelInfo(
    "LlamaForCausalLM", "float32", "cpu", "c0ffee", 400, max_model_len=30_000, max_cache_tokens=50_000
)
READY = ipc.EngineStatus(ready=True, epoch=3, queue_order="fcfs", model=MODEL)
LOAD = ipc.Load(**{name: number for number, name in enumerate(ipc.Load.__struct_fields__, 1)})
WORDS = byte_level_bpe().encode("The quick brown fox jumps over the lazy dog.").ids


class FakeCore:
    """Hears what the front end says, and says what the test tells it to."""

    def __init__(self, path: str, status: ipc.EngineStatus) -> None:
        self.path = path
        self.status = status
        self.heard: asyncio.Queue[ipc.FrontendMessage] = asyncio.Queue()
        self.alive: set[str] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.close()
        await self._server.wait_closed()
        Path(self.path).unlink(missing_ok=True)  # noqa: ASYNC240 - a test may block

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.say(self.status)
        decoder: msgspec.msgpack.Decoder[ipc.FrontendMessage] = msgspec.msgpack.Decoder(ipc.FrontendMessage)
        while (message := await ipc.read_frame(reader, decoder)) is not None:
            match message:
                case ipc.LoadQuery():
                    self.say(ipc.LoadReply(message.call, LOAD))
                case ipc.Cancel():
                    self.say(ipc.CancelReply(message.call, message.request_id in self.alive))
                case _:
                    self.heard.put_nowait(message)
        writer.close()

    def say(self, message: ipc.CoreMessage) -> None:
        assert self._writer is not None
        self._writer.write(ipc.encode_frame(message))

    def set_status(self, status: ipc.EngineStatus) -> None:
        self.status = status
        self.say(status)

    async def hear(self, kind: type[Any] | UnionType) -> Any:
        message = await asyncio.wait_for(self.heard.get(), 10)
        assert isinstance(message, kind)
        return message

    def outputs(self, stream: int, token_ids: Sequence[int] = (), **news: Any) -> None:
        column = np.full(len(token_ids), stream, "<i4").tobytes()
        self.say(ipc.Outputs(column, np.array(token_ids, "<i4").tobytes(), **news))

    def admit(self, submit: ipc.Submit) -> None:
        """Every choice is admitted."""
        num_prompt_tokens = len(submit.token_ids) // 4
        for stream in submit.streams:
            self.outputs(stream, started=[ipc.Started(stream, num_prompt_tokens, 1, 99, submit.sampling.seed)])

    def finish(
        self,
        submit: ipc.Submit,
        reason: int,
        token_ids: Sequence[int] = (),
        stop: int | None = None,
        choice: int = 0,
    ) -> None:
        stream = submit.streams[choice]
        self.outputs(stream, token_ids, finished=[ipc.Finished(stream, reason, stop, 2, 1, 5, 6, 7, 8, 9)])


@dataclasses.dataclass
class World:
    core: FakeCore
    frontend: FrontendServer
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)


@contextlib.asynccontextmanager
async def make_world(
    directory: Path, status: ipc.EngineStatus = READY, max_pause_s: float = 10.0
) -> AsyncIterator[World]:
    core = FakeCore(str(directory / "core.sock"), status)
    await core.start()
    model = write_model(directory / "tiny")
    config = SchedulerConfig(model=str(model), listen="127.0.0.1:0", core_socket=core.path, max_pause_s=max_pause_s)
    frontend = FrontendServer(config)
    stop, ready = Stop(), asyncio.Event()
    running = asyncio.create_task(frontend.run(stop, ready.set))
    await asyncio.wait_for(ready.wait(), 10)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{frontend.port}", options=options) as channel:
            yield World(core, frontend, channel)
    finally:
        stop.stop()
        await asyncio.wait_for(running, 10)
        await core.stop()


def events_of(responses: Sequence[pb.GenerateResponse]) -> list[str | None]:
    return [response.WhichOneof("event") for response in responses]


def joined(responses: Sequence[pb.GenerateResponse]) -> tuple[list[int], str]:
    deltas = [response.delta for response in responses if response.HasField("delta")]
    return [token_id for delta in deltas for token_id in delta.token_ids], "".join(delta.text for delta in deltas)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    return caught.value


async def rest(call: Any) -> list[Any]:
    """The responses of a stream up to its end."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details by message name."""
    kinds = {f"google.rpc.{name}": kind for name, kind in vars(error_details_pb2).items()}
    encoded = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(encoded, bytes)
    status = status_pb2.Status.FromString(encoded)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for packed in status.details:
        kind = kinds[packed.TypeName()]
        message = kind()
        packed.Unpack(message)
        found[kind.DESCRIPTOR.name] = message
    return found


def fields_at_fault(error: grpc.aio.AioRpcError) -> list[str]:
    return [violation.field for violation in details(error)["BadRequest"].field_violations]
