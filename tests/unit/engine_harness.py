"""What stands on both sides of the engine in its tests: a scripted executor and a front end that speaks raw frames."""

import asyncio
import contextlib
import dataclasses
import time
from array import array
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1 import executor_pb2_grpc as pb_grpc
from scheduler_service.config import SchedulerConfig
from scheduler_service.core.engine import Engine
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.session import PROTOCOL_VERSION
from scheduler_service.ipc import (
    CancelReply,
    CoreMessage,
    DrainReply,
    EngineStatus,
    Failed,
    Finished,
    Load,
    LoadQuery,
    LoadReply,
    Outputs,
    PromptLogprobs,
    Sampling,
    Started,
    Submit,
    TokenLogprobs,
    encode_frame,
    read_frame,
)
from servicekit.digest import model_digest
from tests.unit.core_harness import LIMITS, VOCAB_SIZE, FakeExecutor


class ScriptedExecutor(pb_grpc.ExecutorServiceServicer):
    """Runs plans on the fake, dies when told to, and refuses what a real executor refuses."""

    def __init__(
        self,
        limits: ExecutorLimits = LIMITS,
        *,
        digest: str,
        weights_digest: str = "weights",
        die_after_plans: int | None = None,
        session_alive: bool = False,
        protocol_version: int = PROTOCOL_VERSION,
        device_time_ns: int = 0,
        vocab_size: int = VOCAB_SIZE,
        make_fake: Callable[[ExecutorLimits], FakeExecutor] = FakeExecutor,
    ) -> None:
        self._limits = limits
        self._digest = digest
        self._weights_digest = weights_digest
        self._protocol_version = protocol_version
        self._device_time_ns = device_time_ns  # what each step is said to have taken
        self._vocab_size = vocab_size
        self._make_fake = make_fake
        self.die_after_plans = die_after_plans  # in each session
        self.session_alive = session_alive
        self.going = asyncio.Event()  # cleared: plans wait
        self.going.set()
        self.stopping = asyncio.Event()  # set: sessions end in order
        self.timeouts_ms: list[int] = []  # of the plans, in order
        self.last_epoch = 0
        self.asked = asyncio.Semaphore(0)  # counts the sessions that got as far as the first message
        self.opened: list[pb.OpenSession] = []

    async def RunSession(
        self, request_iterator: AsyncIterator[pb.RunSessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.RunSessionResponse]:
        limits = {field.name: getattr(self._limits, field.name) for field in dataclasses.fields(self._limits)}
        info = pb.ExecutorInfo(
            protocol_version=self._protocol_version,
            last_epoch=self.last_epoch,
            session_alive=self.session_alive,
            architecture="Fake",
            model_digest=self._digest,
            weights_digest=self._weights_digest,
            dtype="float32",
            device="cpu",
            vocab_size=self._vocab_size,
            **limits,
        )
        self.asked.release()
        yield pb.RunSessionResponse(info=info)
        opening = (await anext(request_iterator)).open
        if opening.model_digest != self._digest or opening.weights_digest not in ("", self._weights_digest):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "other weights")
        assert opening.epoch == self.last_epoch + 1
        self.last_epoch = opening.epoch
        self.opened.append(opening)
        yield pb.RunSessionResponse(opened=pb.SessionOpened(epoch=opening.epoch))
        fake, num_plans = self._make_fake(self._limits), 0
        fake.device_time_ns = self._device_time_ns
        while (request := await self._next(request_iterator)) is not None:
            if num_plans == self.die_after_plans:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            await self.going.wait()
            assert request.plan.epoch == opening.epoch
            self.timeouts_ms.append(request.plan.timeout_ms)
            for result in fake.run(request.plan):
                yield pb.RunSessionResponse(result=result)
            num_plans += 1

    async def _next(self, requests: AsyncIterator[pb.RunSessionRequest]) -> pb.RunSessionRequest | None:
        """The next message, or None where the executor is to stop or the core has gone."""
        reading, stopping = asyncio.ensure_future(anext(requests, None)), asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            reading.cancel()
            stopping.cancel()


class FrontEnd:
    """One connection to the core, and all that it heard."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = msgspec.msgpack.Decoder(CoreMessage)
        self.status: EngineStatus | None = None
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[int, PromptLogprobs] = {}
        self.started: dict[int, Started] = {}
        self._started_before: set[int] = set()
        self.ends: dict[int, Finished | Failed] = {}
        self.replies: list[CancelReply | DrainReply | LoadReply] = []

    def send(self, message: Any) -> None:
        self._writer.write(encode_frame(message))

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def submit(self, stream: int, prompt: range, max_tokens: int | None = 8, **changes: Any) -> None:
        message = Submit(
            streams=[stream],
            request_id=f"request-{stream}",
            token_ids=array("i", prompt).tobytes(),
            sampling=Sampling(),
            stop_token_ids=[],
            end_token_ids=[],
            max_tokens=max_tokens,
            priority=0,
            cache_salt="",
            arrival=time.monotonic(),
            deadline=None,
        )
        self.send(msgspec.structs.replace(message, **changes))

    async def until(self, done: Callable[[], object], *, started: Collection[int] = ()) -> None:
        """Read until `done` says so; the streams `started` were told of their start by another core."""
        self._started_before |= set(started)
        async with asyncio.timeout(30):
            while not done():
                assert await self.read() is not None, "the core hung up"

    async def read(self) -> CoreMessage | None:
        message = await read_frame(self._reader, self._decoder)
        match message:
            case EngineStatus():
                self.status = message
            case Outputs():
                self._note(message)
            case CancelReply() | DrainReply() | LoadReply():
                self.replies.append(message)
        return message

    def _note(self, outputs: Outputs) -> None:
        for started in outputs.started:
            assert started.stream not in self.started, "started twice"
            self.started[started.stream] = started
        for prompt in outputs.prompt_logprobs:
            assert prompt.stream not in self.prompt_logprobs, "sent twice"
            assert prompt.stream not in self.tokens, "a token before the prompt"
            self.prompt_logprobs[prompt.stream] = prompt
        for logprobs in outputs.logprobs:
            self.logprobs.setdefault(logprobs.stream, []).append(logprobs)
        for stream, token in zip(array("i", outputs.streams), array("i", outputs.token_ids), strict=True):
            assert stream in self.started or stream in self._started_before
            assert stream not in self.ends, "a token after the end"
            self.tokens.setdefault(stream, []).append(token)
        for stream, rows in self.logprobs.items():
            assert len(rows) == len(self.tokens[stream]), "they come in the frames of their tokens"
        for end in (*outputs.finished, *outputs.failed):
            assert end.stream not in self.ends, "ended twice"
            self.ends[end.stream] = end

    async def ready(self) -> None:
        await self.until(lambda: self.status is not None and self.status.ready)

    async def load(self) -> LoadReply:
        self.replies.clear()
        self.send(LoadQuery(call=1))
        await self.until(lambda: self.replies)
        reply = self.replies.pop()
        assert isinstance(reply, LoadReply)
        return reply

    async def until_load(self, done: Callable[[Load], object]) -> None:
        """Ask for the load until `done` says so."""
        async with asyncio.timeout(30):
            while not done((await self.load()).load):
                pass

    def error(self, stream: int) -> tuple[str, str]:
        failed = self.ends[stream]
        assert isinstance(failed, Failed)
        return failed.code, failed.reason

    def finish_reason(self, stream: int) -> int:
        finished = self.ends[stream]
        assert isinstance(finished, Finished)
        return finished.reason

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class Setting:
    """The engine under test, and the executors that come and go at its address."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.socket = str(directory / "core.sock")
        self._options = options
        self._directory = directory
        self._servers: list[grpc.aio.Server] = []
        self._frontends: list[FrontEnd] = []
        self.digest = model_digest(directory)
        self._ports: list[int] = []
        self.engine: asyncio.Task[None] | None = None

    async def start_executor(
        self, limits: ExecutorLimits = LIMITS, *, address_index: int = 0, **options: Any
    ) -> ScriptedExecutor:
        """At the address of that index, which is a new one where it is the first that nobody had yet."""
        executor = ScriptedExecutor(limits, **{"digest": self.digest, **options})
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_ExecutorServiceServicer_to_server(executor, server)
        known = self._ports[address_index : address_index + 1]
        port = server.add_insecure_port(f"127.0.0.1:{known[0] if known else 0}")
        if not known:
            self._ports.append(port)
        await server.start()
        self._servers.append(server)
        return executor

    async def kill_executor(self) -> None:
        await self._servers.pop().stop(None)

    @property
    def address(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    async def start_core(self) -> None:
        config = SchedulerConfig(model=str(self._directory), executor=self.address, **self._options)
        listening = asyncio.Event()
        self.core = Engine(config)
        self.engine = asyncio.create_task(self.core.run(self.socket, listening.set))
        await listening.wait()

    async def kill_core(self) -> None:
        """Its connections end without a word, and nothing of what it knew is left."""
        assert self.engine is not None
        self.engine.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.engine
        Path(self.socket).unlink(missing_ok=True)  # noqa: ASYNC240 - a test may block
        self.engine = None

    async def connect(self) -> FrontEnd:
        if self.engine is None:
            await self.start_core()
        self._frontends.append(FrontEnd(*await asyncio.open_unix_connection(self.socket)))
        return self._frontends[-1]

    async def stop(self) -> None:
        for frontend in self._frontends:
            await frontend.close()
        if self.engine is not None:
            await self.kill_core()
        while self._servers:
            await self.kill_executor()
