"""The front end's end of the core's Unix socket."""

import asyncio
import itertools
import logging
from typing import Any, TypeVar

import msgspec
import numpy as np

from scheduler_service import errors, ipc
from scheduler_service.errors import DuetError, ExecutorUnavailable, logged_internal_error
from scheduler_service.frontend.kv_subscription import KvSubscription
from scheduler_service.frontend.streams import TokenStream

log = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_RETRY_AFTER_S = 1.0  # what a client is told when the core or the executor is away
_READ_BUFFER_BYTES = 1 << 20


class CoreClient:
    """Streams and calls over one connection that is renewed when it ends.

    What was under way on a connection that ended fails with ExecutorUnavailable.
    """

    def __init__(self, path: str) -> None:
        self.status: ipc.EngineStatus | None = None  # None while there is no connection
        self.changed = asyncio.Event()  # set, and replaced by a new one, at each change of `status`
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[int, TokenStream] = {}
        self._subscriptions: dict[int, KvSubscription] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._count = itertools.count()

    async def run(self) -> None:
        """Stay connected until cancelled. Raises: msgspec.DecodeError where the core speaks another protocol."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_READ_BUFFER_BYTES)
            except OSError:
                log.debug("no core listens at %s", self._path)
            else:
                backoff_s = _FIRST_BACKOFF_S
                await self._serve(reader, writer)
                log.warning("lost the connection to the core")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def wait_connected(self) -> None:
        """Return once the core has told its status."""
        while self.status is None:
            await self.changed.wait()

    async def wait_for_model(self, timeout_s: float) -> ipc.ModelInfo:
        """The model, once an executor has connected.

        Raises: ExecutorUnavailable after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.status is None or self.status.model is None:
                    await self.changed.wait()
                return self.status.model
        except TimeoutError:
            raise ExecutorUnavailable("no executor has connected yet", retry_after_s=_RETRY_AFTER_S) from None

    def open_streams(self, count: int, news: asyncio.Event) -> list[TokenStream]:
        """Streams for the choices of one Submit, `news` set by each; `close_stream` ends one.

        Raises: ExecutorUnavailable without a connection.
        """
        self._connected_writer()
        streams = [TokenStream(self._next_number(), news) for _ in range(count)]
        self._streams.update((stream.number, stream) for stream in streams)
        return streams

    def stop_stream(self, stream: TokenStream) -> None:
        """Tell the core that a stop string was completed, where the stream has not ended; its end comes as ever."""
        if stream.number in self._streams and self._writer is not None:
            self._writer.write(ipc.encode_frame(ipc.Stop(stream.number)))

    def close_stream(self, stream: TokenStream) -> None:
        """Forget a stream, and tell the core where it had not ended."""
        if self._streams.pop(stream.number, None) is not None and self._writer is not None:
            self._writer.write(ipc.encode_frame(ipc.Abandon(stream.number)))

    def subscribe_kv(self) -> KvSubscription:
        """Hear what the prefix cache holds and how it changes, until `unsubscribe_kv`.

        Raises: ExecutorUnavailable without a connection.
        """
        writer = self._connected_writer()
        subscription = KvSubscription(self._next_number())
        self._subscriptions[subscription.number] = subscription
        writer.write(ipc.encode_frame(ipc.KvSubscribe(subscription.number)))
        return subscription

    def unsubscribe_kv(self, subscription: KvSubscription) -> None:
        """Hear nothing more."""
        if self._subscriptions.pop(subscription.number, None) is not None and self._writer is not None:
            self._writer.write(ipc.encode_frame(ipc.KvUnsubscribe(subscription.number)))

    async def send(self, message: ipc.FrontendMessage) -> None:
        """Write one message and wait while the socket is full. Raises: ExecutorUnavailable without a connection."""
        writer = self._connected_writer()
        writer.write(ipc.encode_frame(message))
        try:
            await writer.drain()
        except ConnectionError:
            raise _core_lost() from None

    async def cancel(self, request_id: str) -> bool:
        """Whether such a request was alive; it ends. Raises: ExecutorUnavailable."""
        number = self._next_number()
        reply: ipc.CancelReply = await self._call(number, ipc.Cancel(number, request_id))
        return reply.found

    async def load(self) -> ipc.Load:
        """The load now. Raises: ExecutorUnavailable."""
        number = self._next_number()
        reply: ipc.LoadReply = await self._call(number, ipc.LoadQuery(number))
        return reply.load

    async def _call(self, number: int, message: ipc.Cancel | ipc.LoadQuery) -> Any:
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            await self.send(message)
            return await future
        finally:
            del self._calls[number]

    def _next_number(self) -> int:
        return next(self._count) % (1 << 31)  # int32 on the wire; the oldest is long gone when it comes again

    def _connected_writer(self) -> asyncio.StreamWriter:
        if self._writer is None:
            raise _core_lost()
        return self._writer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder: msgspec.msgpack.Decoder[ipc.CoreMessage] = msgspec.msgpack.Decoder(ipc.CoreMessage)
        try:
            while (message := await ipc.read_frame(reader, decoder)) is not None:
                self._dispatch(message, writer)
        finally:
            writer.close()
            self._writer = None
            self._set_status(None)
            self._fail_all()

    def _dispatch(self, message: ipc.CoreMessage, writer: asyncio.StreamWriter) -> None:
        match message:
            case ipc.Outputs():
                self._apply(message)
            case ipc.EngineStatus():
                self._writer = writer  # the first status opens the connection for requests
                self._set_status(message)
            case ipc.CancelReply() | ipc.LoadReply():
                future = self._calls.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message)
            case ipc.KvEvents():
                if subscription := self._subscriptions.get(message.subscription):
                    subscription.push(message)

    def _apply(self, outputs: ipc.Outputs) -> None:
        """Hand one step's news to the streams; those of streams closed meanwhile have nowhere to go."""
        streams = self._streams
        for started in outputs.started:
            if stream := streams.get(started.stream):
                stream.start(started)
        if outputs.logprobs or outputs.prompt_logprobs:
            self._apply_logprobs(outputs)
        numbers = np.frombuffer(outputs.streams, dtype="<i4").tolist()
        token_ids = np.frombuffer(outputs.token_ids, dtype="<i4").tolist()
        for number, token_id in zip(numbers, token_ids, strict=True):
            if stream := streams.get(number):
                stream.push(token_id)
        for finished in outputs.finished:
            if stream := streams.pop(finished.stream, None):
                stream.finish(finished)
        for failed in outputs.failed:
            if stream := streams.pop(failed.stream, None):
                stream.finish(_error_of(failed))

    def _apply_logprobs(self, outputs: ipc.Outputs) -> None:
        for prompt_logprobs in outputs.prompt_logprobs:
            if stream := self._streams.get(prompt_logprobs.stream):
                stream.prompt_logprobs = prompt_logprobs
        for logprobs in outputs.logprobs:
            if stream := self._streams.get(logprobs.stream):
                stream.logprobs.append(logprobs)

    def _fail_all(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.finish(_core_lost())
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            subscription.end()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_core_lost())

    def _set_status(self, status: ipc.EngineStatus | None) -> None:
        self.status = status
        self.changed.set()
        self.changed = asyncio.Event()


def _core_lost() -> DuetError:
    return ExecutorUnavailable("the scheduler core is restarting", retry_after_s=_RETRY_AFTER_S)


def _error_of(failed: ipc.Failed) -> DuetError:
    """The core's error as the class that it was there."""
    kind = getattr(errors, failed.reason, None)
    if not (isinstance(kind, type) and issubclass(kind, DuetError)):
        return logged_internal_error(f"the core failed a stream with an unknown error: {failed!r}")
    return kind(failed.message, field=failed.field, retry_after_s=failed.retry_after_s)
