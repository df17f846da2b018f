"""The core's end of the Unix socket: one connection for each front end."""

import asyncio
import logging
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.kv_events import KvEventLog
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import failure
from scheduler_service.errors import ContextLengthExceeded, DeadlineExceeded, DuetError, ExecutorUnavailable
from scheduler_service.ipc import (
    Abandon,
    Cancel,
    CancelReply,
    CoreMessage,
    FrontendMessage,
    KvSubscribe,
    KvUnsubscribe,
    LoadQuery,
    LoadReply,
    Stop,
    Submit,
    encode_frame,
    read_frame,
)

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
            self._engine.drop_all_of(connection.outbox)

    def _handle(self, connection: Connection, message: FrontendMessage) -> None:
        match message:
            case Submit():
                self._submit(connection, message)
            case Abandon(stream):
                request = connection.requests.pop(stream, None)
                if request is not None and request.state is not RequestState.FINISHED:
                    self._engine.pool.drop(request)
            case Stop(stream):
                request = connection.requests.get(stream)
                if request is not None and request.state is not RequestState.FINISHED:
                    self._engine.pool.finish(request, pb.FINISH_REASON_STOP)
            case Cancel(call, request_id):
                choices = self._engine.pool.choices_of(request_id)
                for request in choices:
                    self._engine.pool.cancel(request, time.monotonic())
                connection.send(CancelReply(call, bool(choices)))
            case LoadQuery(call):
                connection.send(LoadReply(call, self._engine.load()))
            case KvSubscribe() | KvUnsubscribe():
                self._change_subscription(connection, message)

    def _change_subscription(self, connection: Connection, message: KvSubscribe | KvUnsubscribe) -> None:
        if isinstance(message, KvSubscribe):
            self.kv_events.subscribe(connection, message.subscription, connection.send)
        else:
            self.kv_events.unsubscribe(connection, message.subscription)

    def _submit(self, connection: Connection, message: Submit) -> None:
        try:
            choices = self._new_choices(connection, message)
            self._engine.pool.submit(*choices)
            connection.requests.update((request.stream, request) for request in choices)
        except DuetError as error:
            connection.outbox.failed += [failure(stream, error) for stream in message.streams]

    def _new_choices(self, connection: Connection, message: Submit) -> list[Request]:
        if message.deadline is not None and message.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline passed before the request was queued")
        if self._engine.status.model is None:
            raise ExecutorUnavailable("no executor has connected yet")
        token_ids = array("i", message.token_ids)
        limit = self._engine.max_total_tokens
        wanted = limit if message.max_tokens is None else len(token_ids) + message.max_tokens
        if len(token_ids) >= limit or wanted > limit:
            raise ContextLengthExceeded(f"{wanted} tokens are wanted, {limit} fit", field="stop.max_tokens")
        choices = [
            Request(
                request_id=message.request_id,
                outbox=connection.outbox,
                stream=stream,
                token_ids=token_ids[:],
                num_prompt_tokens=len(token_ids),
                max_total_tokens=wanted,
                sampling=message.sampling,
                stop_token_ids=message.stop_token_ids,
                priority=message.priority,
                cache_salt=message.cache_salt,
                arrival_time=message.arrival,
                deadline=message.deadline,
                choice_index=index,
                end_token_ids=message.end_token_ids,
                constraint=message.constraint,
            )
            for index, stream in enumerate(message.streams)
        ]
        if message.sampling.prompt_logprobs is not None:
            leader, *others = choices
            leader.num_prompt_logprobs = 1 + message.sampling.prompt_logprobs
            for request in others:
                request.leader = leader
        return choices
