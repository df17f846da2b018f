"""Connections to a running server: Client blocks, AsyncClient awaits. Both say the same things."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from duet.delivery import Delivery
from duet.errors import DuetError, StreamCut, from_rpc
from duet.output import Event, Output
from duet.params import Options, SamplingParams
from duet.request import Prompt, build_request
from duet.retry import Retry
from protos.duet.admin.v1 import admin_pb2
from protos.duet.admin.v1.admin_pb2_grpc import AdminServiceStub
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub

Response = TypeVar("Response")

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_RETRY = Retry()

_CANCEL_TIMEOUT_S = 1.0  # for a request that nobody waits for
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # one meant for web traffic must not swallow calls to the loopback or to a cluster
    ("grpc.initial_reconnect_backoff_ms", 100),  # so that a request that is sent again finds a connection
    ("grpc.max_reconnect_backoff_ms", 1000),  # and soon after a long absence of the server too
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: of several front ends another may have it
    ("grpc.max_receive_message_length", -1),  # the log-probabilities of a long prompt are one message
]


class Client:
    """A blocking client; several threads may share it. Every method raises an error of duet.errors.

    `retry` says when `stream` and `generate` send a request again; None: never. With the option `detach_seconds` a
    request outlives its connection for that long, and its stream goes on after a break, with nothing lost or twice:
    until the server has been silent for `detach_seconds`, whatever `retry` says. `admin_secret` is for `drain` and
    `cancel_drain`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: Retry | None = DEFAULT_RETRY,
        admin_secret: str | None = None,
    ) -> None:
        self.address = address
        self._retry = retry
        self._admin_metadata = _admin_metadata(admin_secret)
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)
        self._admin_stub = AdminServiceStub(self._channel)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Event]:
        """Yield the events of a request as they come; closing the iterator cancels it."""
        delivery = Delivery(build_request(prompt, params, options), self._retry, timeout_s)
        with self._cancelled_if_left(delivery):
            while True:
                call = self._stub.Generate(delivery.request, timeout=delivery.remaining_s())
                try:
                    for response in call:
                        if (event := delivery.take(response)) is not None:
                            yield event
                    delivery.end()
                    return
                except grpc.RpcError as error:
                    failure = from_rpc(error, self.address)
                except StreamCut as cut:
                    failure = cut
                finally:
                    call.cancel()
                if (delay_s := delivery.delay_s(failure)) is None:
                    return
                time.sleep(delay_s)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Output:
        """Wait for the whole output."""
        return Output.of(self.stream(prompt, params, timeout_s=timeout_s, **options))

    def cancel(self, request_id: str) -> None:
        """End a waiting or running request, whoever started it."""
        self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))

    def model(self) -> pb.GetModelResponse:
        """What is served."""
        return self._call(self._stub.GetModel, pb.GetModelRequest())

    def server(self) -> pb.GetServerResponse:
        """The server and its load now."""
        return self._call(self._stub.GetServer, pb.GetServerRequest())

    def drain(self, limit_s: float | None = None, *, timeout_s: float | None = None) -> admin_pb2.DrainResponse:
        """Have the server refuse new requests, and wait until those that are there have ended.

        After `limit_s` seconds those that are left are cut; None: never. After `timeout_s` seconds, or with the
        connection, only the wait ends.
        """
        request = admin_pb2.DrainRequest(limit_seconds=limit_s)
        return self._call(self._admin_stub.Drain, request, timeout=timeout_s, metadata=self._admin_metadata)

    def cancel_drain(self) -> None:
        """Have the server take new requests again."""
        request = admin_pb2.CancelDrainRequest()
        self._call(self._admin_stub.CancelDrain, request, metadata=self._admin_metadata)

    def watch_load(self, interval_s: float = 1.0) -> Iterator[pb.Load]:
        """Yield the load every `interval_s` seconds (0.05 to 60) until the iterator is closed."""
        call = self._stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=interval_s))
        try:
            for response in call:
                yield response.load
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the connection; its requests are cancelled, but for those with detach_seconds."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _cancelled_if_left(self, delivery: Delivery) -> Iterator[None]:
        """Cancel a detachable request, as well as may be, where the caller closes its stream or is interrupted."""
        try:
            yield
        except DuetError:
            raise
        except BaseException:
            if delivery.is_detachable and not delivery.is_whole:
                request = pb.CancelRequest(request_id=delivery.request.request_id)
                with contextlib.suppress(grpc.RpcError, ValueError):  # the channel may be closed
                    self._stub.Cancel(request, timeout=_CANCEL_TIMEOUT_S)
            raise

    def _call(self, method: Callable[..., Response], request: Message, **settings: Any) -> Response:
        try:
            return method(request, **settings)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None


class AsyncClient:
    """The same for asyncio; make it where its event loop runs."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: Retry | None = DEFAULT_RETRY,
        admin_secret: str | None = None,
    ) -> None:
        self.address = address
        self._retry = retry
        self._admin_metadata = _admin_metadata(admin_secret)
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)
        self._admin_stub = AdminServiceStub(self._channel)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a request as they come; closing the iterator cancels it."""
        delivery = Delivery(build_request(prompt, params, options), self._retry, timeout_s)
        async with self._cancelled_if_left(delivery):
            while True:
                call = self._stub.Generate(delivery.request, timeout=delivery.remaining_s())
                try:
                    async for response in call:
                        if (event := delivery.take(response)) is not None:
                            yield event
                    delivery.end()
                    return
                except grpc.RpcError as error:
                    failure = from_rpc(error, self.address)
                except StreamCut as cut:
                    failure = cut
                finally:
                    call.cancel()
                if (delay_s := delivery.delay_s(failure)) is None:
                    return
                await asyncio.sleep(delay_s)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Output:
        """Wait for the whole output."""
        return Output.of([event async for event in self.stream(prompt, params, timeout_s=timeout_s, **options)])

    async def cancel(self, request_id: str) -> None:
        """End a waiting or running request, whoever started it."""
        await self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))

    async def model(self) -> pb.GetModelResponse:
        """What is served."""
        return await self._call(self._stub.GetModel, pb.GetModelRequest())

    async def server(self) -> pb.GetServerResponse:
        """The server and its load now."""
        return await self._call(self._stub.GetServer, pb.GetServerRequest())

    async def drain(self, limit_s: float | None = None, *, timeout_s: float | None = None) -> admin_pb2.DrainResponse:
        """Have the server refuse new requests, and wait until those that are there have ended.

        After `limit_s` seconds those that are left are cut; None: never. After `timeout_s` seconds, or with the
        connection, only the wait ends.
        """
        request = admin_pb2.DrainRequest(limit_seconds=limit_s)
        return await self._call(self._admin_stub.Drain, request, timeout=timeout_s, metadata=self._admin_metadata)

    async def cancel_drain(self) -> None:
        """Have the server take new requests again."""
        request = admin_pb2.CancelDrainRequest()
        await self._call(self._admin_stub.CancelDrain, request, metadata=self._admin_metadata)

    async def watch_load(self, interval_s: float = 1.0) -> AsyncGenerator[pb.Load, None]:
        """Yield the load every `interval_s` seconds (0.05 to 60) until the iterator is closed."""
        call = self._stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=interval_s))
        try:
            async for response in call:
                yield response.load
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the connection; its requests are cancelled, but for those with detach_seconds."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def _cancelled_if_left(self, delivery: Delivery) -> AsyncIterator[None]:
        """Cancel a detachable request, as well as may be, where the caller closes its stream or is interrupted."""
        try:
            yield
        except DuetError:
            raise
        except BaseException:
            if delivery.is_detachable and not delivery.is_whole:
                request = pb.CancelRequest(request_id=delivery.request.request_id)
                with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):  # the channel may be closed
                    await self._stub.Cancel(request, timeout=_CANCEL_TIMEOUT_S)
            raise

    async def _call(self, method: Callable[..., Awaitable[Response]], request: Message, **settings: Any) -> Response:
        try:
            return await method(request, **settings)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None


def _admin_metadata(secret: str | None) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {secret}")] if secret is not None else []
