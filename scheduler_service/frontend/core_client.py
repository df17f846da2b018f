"""The front end's end of the core's Unix socket."""

import asyncio
import contextlib
import itertools
import logging
import time
from typing import Any, TypeVar

import msgspec
import numpy as np

from scheduler_service import errors, ipc
from scheduler_service.errors import DuetError, ExecutorUnavailable, logged_internal_error
from scheduler_service.frontend.holding import Holding
from scheduler_service.frontend.kv_subscription import KvSubscription
from scheduler_service.frontend.streams import TokenStream
from scheduler_service.kv_messages import KvEvents, KvSubscribe, KvUnsubscribe
from servicekit.fault_points import reach

log = logging.getLogger(__name__)
T = TypeVar("T")

_RECONNECT_S = 0.05
_QUICK_LOSS_S = 2.0  # a core that dies so soon may have died of what it was given,
_MAX_QUICK_LOSSES = 3  # and after so many in a row that fails
_RETRY_AFTER_S = 1.0  # what a client is told when the core or the executor is away
_READ_BUFFER_BYTES = 1 << 20


class CoreClient:
    """Streams and calls over one connection that is renewed when it ends.

    Requests that were under way on a connection that ended go on with the next core, unless none comes for
    `max_pause_s` seconds; all else that was fails with ExecutorUnavailable.
    """

    def __init__(self, path: str, max_pause_s: float) -> None:
        self.status: ipc.EngineStatus | None = None  # None while there is no connection
        self.changed = asyncio.Event()  # set, and replaced by a new one, at each change of `status`
        self._path = path
        self._max_pause_s = max_pause_s
        self._drains = False  # what the core last said, this one or the one before
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[int, TokenStream] = {}  # those that have not ended
        self._holdings: dict[int, Holding] = {}  # by the number of the first stream
        self._subscriptions: dict[int, KvSubscription] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._count = itertools.count()

    async def run(self) -> None:
        """Stay connected until cancelled. Raises: msgspec.DecodeError where the core speaks another protocol."""
        lost_at, num_quick_losses = time.monotonic(), 0
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_READ_BUFFER_BYTES)
            except OSError:
                log.debug("no core listens at %s", self._path)
            else:
                connected_at = time.monotonic()
                await self._serve(reader, writer)
                log.warning("lost the connection to the core; %d requests wait for another", len(self._holdings))
                lost_at = time.monotonic()
                num_quick_losses = num_quick_losses + 1 if lost_at - connected_at < _QUICK_LOSS_S else 0
            if num_quick_losses >= _MAX_QUICK_LOSSES and self._streams:
                self._fail_streams(logged_internal_error("one core after the other died of the requests that wait"))
            if time.monotonic() - lost_at > self._max_pause_s:
                self._fail_streams(ExecutorUnavailable(f"no scheduler core for {self._max_pause_s:g} seconds"))
            await asyncio.sleep(_RECONNECT_S)

    async def wait_connected(self) -> None:
        """Return once the core has told its status."""
        while self.status is None:
            await self.changed.wait()

    async def wait_for_model(self, timeout_s: float) -> ipc.ModelInfo:
        """The model, once there is a core to which an executor has connected.

        Raises: ExecutorUnavailable after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.status is None or self.status.model is None:
                    await self.changed.wait()
                return self.status.model
        except TimeoutError:
            if self.status is None:
                raise _core_lost() from None
            raise ExecutorUnavailable("no executor has connected yet", retry_after_s=_RETRY_AFTER_S) from None

    def new_streams(self, count: int, news: asyncio.Event) -> list[TokenStream]:
        """Streams for the choices of one Submit, `news` set by each."""
        return [TokenStream(self._next_number(), news) for _ in range(count)]

    async def submit(self, submit: ipc.Submit, streams: list[TokenStream], model: ipc.ModelInfo) -> None:
        """Have the core, or the next one, work for the streams until `close_streams`; waits while the socket is full.

        Raises: ExecutorUnavailable, where there is no core with an executor for too long.
        """
        await self.wait_for_model(self._max_pause_s)  # a core without refuses; the last one may have died meanwhile
        writer = self._connected_writer()
        self._streams.update((stream.number, stream) for stream in streams)
        self._holdings[streams[0].number] = Holding(submit, streams, model)
        writer.write(ipc.encode_frame(submit))
        reach("frontend.submitted")
        with contextlib.suppress(ConnectionError):  # the next core is told again
            await writer.drain()

    def stop_stream(self, stream: TokenStream) -> None:
        """Tell the core that a stop string was completed, where the stream has not ended; its end comes as ever."""
        stream.is_stopped = True
        if stream.number in self._streams and self._writer is not None:
            self._writer.write(ipc.encode_frame(ipc.Stop(stream.number)))

    def close_streams(self, streams: list[TokenStream], *, detach: bool) -> None:
        """Forget the streams of a Submit; the core ends those that have not ended, or keeps them for another client."""
        self._holdings.pop(streams[0].number, None)
        kind = ipc.Detach if detach else ipc.Abandon
        for stream in streams:
            if self._streams.pop(stream.number, None) is not None and self._writer is not None:
                self._writer.write(ipc.encode_frame(kind(stream.number)))

    def subscribe_kv(self) -> KvSubscription:
        """Hear what the prefix cache holds and how it changes, until `unsubscribe_kv`.

        Raises: ExecutorUnavailable without a connection.
        """
        writer = self._connected_writer()
        subscription = KvSubscription(self._next_number())
        self._subscriptions[subscription.number] = subscription
        writer.write(ipc.encode_frame(KvSubscribe(subscription.number)))
        return subscription

    def unsubscribe_kv(self, subscription: KvSubscription) -> None:
        """Hear nothing more."""
        if self._subscriptions.pop(subscription.number, None) is not None and self._writer is not None:
            self._writer.write(ipc.encode_frame(KvUnsubscribe(subscription.number)))

    async def send(self, message: ipc.FrontendMessage) -> None:
        """Write one message and wait while the socket is full. Raises: ExecutorUnavailable without a connection."""
        writer = self._connected_writer()
        writer.write(ipc.encode_frame(message))
        try:
            await writer.drain()
        except ConnectionError:
            raise _core_lost() from None

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """Whether such a request was alive; it ends. Raises: ExecutorUnavailable."""
        number = self._next_number()
        reply: ipc.CancelReply = await self._call(number, ipc.Cancel(number, tenant, request_id))
        return reply.found

    async def drain(self, limit_s: float | None) -> ipc.DrainReply:
        """Have no new requests taken, and wait until none is left. Raises: ExecutorUnavailable."""
        number = self._next_number()
        return await self._call(number, ipc.Drain(number, limit_s))

    async def cancel_drain(self) -> None:
        """Have new requests taken again. Raises: ExecutorUnavailable."""
        number = self._next_number()
        await self._call(number, ipc.CancelDrain(number))

    async def load(self) -> ipc.Load:
        """The load now. Raises: ExecutorUnavailable."""
        number = self._next_number()
        reply: ipc.LoadReply = await self._call(number, ipc.LoadQuery(number))
        return reply.load

    async def _call(self, number: int, message: ipc.Cancel | ipc.Drain | ipc.CancelDrain | ipc.LoadQuery) -> Any:
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
            self._fail_calls()

    def _dispatch(self, message: ipc.CoreMessage, writer: asyncio.StreamWriter) -> None:
        match message:
            case ipc.Outputs():
                self._apply(message)
                reach("frontend.tokens_read")
            case ipc.EngineStatus():
                if self._writer is None:  # the first status opens the connection for requests
                    self._writer = writer
                    self._resubmit(writer)
                    message = self._go_on_draining(message, writer)
                self._drains = message.draining
                self._set_status(message)
            case ipc.CancelReply() | ipc.DrainReply() | ipc.LoadReply():
                future = self._calls.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message)
            case KvEvents():
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

    def _resubmit(self, writer: asyncio.StreamWriter) -> None:
        """Give the core what another one left behind, before any new request comes."""
        for holding in self._holdings.values():
            if holding.is_alive:
                writer.write(ipc.encode_frame(holding.resubmission()))
        for stream in self._streams.values():
            if stream.is_stopped:
                writer.write(ipc.encode_frame(ipc.Stop(stream.number)))

    def _go_on_draining(self, status: ipc.EngineStatus, writer: asyncio.StreamWriter) -> ipc.EngineStatus:
        """Have a core drain that takes the place of one that did; returns its status, as it will be."""
        if not self._drains or status.draining:
            return status
        writer.write(ipc.encode_frame(ipc.Drain(self._next_number(), None)))  # whose answer nobody waits for
        return msgspec.structs.replace(status, draining=True)

    def _fail_streams(self, error: DuetError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.finish(error)

    def _fail_calls(self) -> None:
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            subscription.end()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_core_lost())

    def _set_status(self, status: ipc.EngineStatus | None) -> None:
        self.status = status
        self.announce_change()

    def announce_change(self) -> None:
        """Wake whoever waits for `changed`."""
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
