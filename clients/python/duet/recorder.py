"""The recorder: a proxy in front of an executor that writes down what passes between it and a scheduler.

Messages and statuses pass as they are, and unread: it knows nothing of the session's protocol but its method's name.
Everything else that is asked of an executor, such as its health, passes too, and is not recorded.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.rpc.status_pb2 import Status

from duet.recording import MAX_MESSAGE_BYTES, Kind, RecordingWriter
from protos.duet.executor.v1 import executor_pb2 as pb

RUN_SESSION = f"/{pb.DESCRIPTOR.services_by_name['ExecutorService'].full_name}/RunSession"

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Each side notices the other's death as soon as without a recorder between them.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 5_000)]
_CHANNEL_OPTIONS = [
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

Context = grpc.aio.ServicerContext[bytes, bytes]
log = logging.getLogger(__name__)


class ListenError(Exception):
    """The address cannot be listened on."""


async def record(
    writer: RecordingWriter,
    listen: str,
    executor: str,
    stop: asyncio.Event,
    on_listening: Callable[[int], None] = lambda port: None,
) -> None:
    """Pass on, between `listen` and `executor` (host:port each; port 0: any), until `stop` is set.

    `on_listening` gets the port. Sessions then end as if the executor had been told to stop. Raises: ListenError.
    """
    async with grpc.aio.insecure_channel(executor, options=_CHANNEL_OPTIONS) as channel:
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        server.add_generic_rpc_handlers((_Proxy(channel, writer, stop),))
        port = _listen(server, listen)
        await server.start()
        on_listening(port)
        await stop.wait()
        await server.stop(grace=1.0)


def _listen(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: {error}") from error
    if not port:  # how grpcio before 1.83 says it
        raise ListenError(f"cannot listen on {address}")
    return port


class _Proxy(grpc.GenericRpcHandler):
    """Takes calls of any method; on the wire, one message is a stream of one."""

    def __init__(self, channel: grpc.aio.Channel, writer: RecordingWriter, stop: asyncio.Event) -> None:
        self._channel = channel
        self._writer = writer
        self._is_recording = True
        self._stop = stop

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        """What serves a method."""
        forward = functools.partial(self._forward, handler_call_details.method)
        return grpc.stream_stream_rpc_method_handler(forward)  # pyright: ignore[reportArgumentType]

    def begin_session(self) -> int:
        """A number for a session."""
        return self._writer.begin_session()

    def write(self, kind: Kind, session: int, payload: bytes) -> None:
        """Record; or log why not, and never again: a full disk must not end what is served."""
        if not self._is_recording:
            return
        try:
            self._writer.write(kind, session, payload)
        except OSError as error:
            self._is_recording = False
            log.error("the recording ends here, its file takes no more: %s", error)

    async def _forward(self, method: str, _: object, context: Context) -> None:
        """Serve one call, until one side ends it or the recorder stops, which ends it with status OK."""
        notes = _Notes(self) if method == RUN_SESSION else None
        call = self._channel.stream_stream(method)(timeout=context.time_remaining())
        requests = asyncio.create_task(_forward_requests(context, call, notes))
        responses = asyncio.create_task(_forward_responses(call, context, notes))
        stopping = asyncio.create_task(self._stop.wait())
        status = _status(grpc.StatusCode.CANCELLED, "the scheduler ended the call")
        try:
            await asyncio.wait((responses, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not responses.done():
                status = _status(grpc.StatusCode.OK, "the recorder was stopped")
                return
            await responses
            code, message = await call.code(), await call.details()
            status = _status(code, message)
            if code is not grpc.StatusCode.OK:
                await context.abort(code, message, tuple(await call.trailing_metadata()))
        finally:
            for task in (requests, responses, stopping):
                task.cancel()
            call.cancel()
            if notes:
                notes.end(status)


class _Notes:
    """What is recorded of one session. A call that fails before its first message leaves no trace."""

    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy
        self._session: int | None = None

    def take(self, kind: Kind, payload: bytes) -> None:
        if self._session is None:
            self._session = self._proxy.begin_session()
        self._proxy.write(kind, self._session, payload)

    def end(self, status: Status) -> None:
        if self._session is not None:
            self.take(Kind.END, status.SerializeToString())


async def _forward_requests(context: Context, call: Any, notes: _Notes | None) -> None:
    # A call that has ended takes no more; its responses tell why it did.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while (message := await context.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
            if notes:
                notes.take(Kind.REQUEST, message)
            await call.write(message)
        await call.done_writing()


async def _forward_responses(call: Any, context: Context, notes: _Notes | None) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):  # its status is asked for
        while (message := await call.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
            if notes:
                notes.take(Kind.RESPONSE, message)
            await context.write(message)


def _status(code: grpc.StatusCode, message: str) -> Status:
    return Status(code=code.value[0], message=message)
