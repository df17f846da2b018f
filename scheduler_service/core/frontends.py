"""The core's end of the Unix socket: one connection for each front end."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.kv_events import KvEventLog
from scheduler_service.core.outbox import Outbox, failure
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.resumption import detach, known_choices, merge, resume
from scheduler_service.core.submission import read_resubmission, read_submission
from scheduler_service.errors import DuetError
from scheduler_service.ipc import (
    Abandon,
    Cancel,
    CancelDrain,
    CancelReply,
    CoreMessage,
    Detach,
    Drain,
    DrainReply,
    FrontendMessage,
    LoadQuery,
    LoadReply,
    Stop,
    Submit,
    encode_frame,
    read_frame,
)
from scheduler_service.kv_messages import KvSubscribe, KvUnsubscribe
from servicekit.fault_points import reach

if TYPE_CHECKING:
    from scheduler_service.core.engine import Engine

MAX_UNREAD_BYTES = 256 << 20  # a front end that leaves more than this unread hangs, and is cut off

log = logging.getLogger(__name__)


class Connection:
    """One front end: its outbox, and the living choices of its requests by stream."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.outbox = Outbox()
        self.requests: dict[int, Request] = {}

    def send(self, message: CoreMessage) -> None:
        """Queue a message; cuts off a front end that does not read."""
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            log.error("a front end has stopped reading: cutting it off")
            self._writer.transport.abort()
        else:
            self._writer.write(encode_frame(message))

    def take_on(self, choices: Iterable[Request]) -> None:
        """Remember those whose client is behind this front end."""
        for request in choices:
            if request.outbox is self.outbox and request.state is not RequestState.FINISHED:
                self.requests[request.stream] = request

    def take_living(self, stream: int) -> Request | None:
        """Forget the stream; returns its request, unless that has ended."""
        request = self.requests.pop(stream, None)
        return None if request is None or request.state is RequestState.FINISHED else request

    def flush(self) -> None:
        """Send what the outbox collected, as one frame."""
        outputs = self.outbox.take()
        if outputs is not None:
            for event in (*outputs.finished, *outputs.failed):
                self.requests.pop(event.stream, None)
            self.send(outputs)


class Frontends:
    """Accepts front ends and turns their messages into changes of the engine's pool."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._connections: set[Connection] = set()
        self.kv_events = KvEventLog()

    async def serve(self, socket_path: str, on_listening: Callable[[], None]) -> None:
        """Listen until cancelled; that hangs up on every front end."""
        async with asyncio.TaskGroup() as tasks:
            server = await asyncio.start_unix_server(
                lambda reader, writer: tasks.create_task(self._serve_one(reader, writer)), socket_path
            )
            on_listening()
            try:
                await asyncio.Event().wait()  # from Python 3.12 on, serve_forever would not end before the front ends
            finally:
                server.close()

    def flush(self) -> None:
        """Send each front end its news."""
        for connection in self._connections:
            connection.flush()
        self.kv_events.flush()

    def broadcast_status(self) -> None:
        """Tell every front end of a change of the executor."""
        for connection in self._connections:
            connection.send(self._engine.status)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self._connections.add(connection)
        decoder = msgspec.msgpack.Decoder(FrontendMessage)
        try:
            connection.send(self._engine.status)
            while (message := await read_frame(reader, decoder)) is not None:
                self._handle(connection, message)
                self._engine.pump()
        except msgspec.DecodeError:
            log.exception("a front end sent what is no message: hanging up")
        finally:
            self._connections.discard(connection)
            self.kv_events.unsubscribe(connection)
            writer.close()
            self._engine.leave_all(connection.outbox)

    def _handle(self, connection: Connection, message: FrontendMessage) -> None:
        match message:
            case Submit():
                self._submit(connection, message)
            case Abandon(stream):
                if request := connection.take_living(stream):
                    self._engine.pool.drop(request)
            case Detach(stream):
                if request := connection.take_living(stream):
                    detach(self._engine.pool, request)
            case Stop(stream):
                request = connection.requests.get(stream)
                if request is not None and request.state is not RequestState.FINISHED:
                    self._engine.pool.finish(request, pb.FINISH_REASON_STOP)
            case KvSubscribe(subscription):
                self.kv_events.subscribe(connection, subscription, connection.send)
            case KvUnsubscribe(subscription):
                self.kv_events.unsubscribe(connection, subscription)
            case _:
                self._answer(connection, message)

    def _answer(self, connection: Connection, message: Cancel | Drain | CancelDrain | LoadQuery) -> None:
        match message:
            case Cancel(call, tenant, request_id):
                choices = self._engine.pool.choices_of((tenant, request_id))
                for request in choices:
                    self._engine.pool.cancel(request, time.monotonic())
                connection.send(CancelReply(call, bool(choices)))
            case Drain(call, limit_s):
                self._engine.drain.begin(call, limit_s, connection.send)
                self.broadcast_status()
            case CancelDrain(call):
                self._engine.drain.cancel()
                connection.send(DrainReply(call, 0, 0))
                self.broadcast_status()
            case LoadQuery(call):
                connection.send(LoadReply(call, self._engine.load()))

    def _submit(self, connection: Connection, message: Submit) -> None:
        pool, outbox, key = self._engine.pool, connection.outbox, (message.tenant, message.request_id)
        if message.progress:
            reach("core.resubmit_read")
        else:
            reach("core.submit_read")
        try:
            known = known_choices(pool, key) if message.progress or message.resumes else None
            if message.progress:
                choices, told = read_resubmission(message, outbox)
                if known is None:
                    pool.adopt(*choices)
                else:
                    merge(pool, known, choices, told)
                    choices = known_choices(pool, key) or []
            elif known is not None and resume(pool, known, outbox, message.streams, message.arrival):
                choices = known
            else:
                choices = read_submission(message, outbox, self._engine.status.model)
                if known is None:
                    pool.submit(*choices)
                else:  # it was here, and is generated anew
                    pool.adopt(*choices)
            for one in self._connections:  # a merge may put another object behind another front end's stream
                one.take_on(choices)
        except DuetError as error:
            outbox.failed += [failure(stream, error) for stream in message.streams]
