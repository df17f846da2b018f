"""Connections to a running server: Client blocks, AsyncClient awaits. Both say the same things."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Self, TypeVar, Unpack

import grpc

from duet.errors import from_rpc
from duet.output import Event, Output, StreamOrder
from duet.params import Options, SamplingParams
from duet.request import Prompt, build_request
from duet.retry import Attempts, Retry
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub

Request = TypeVar("Request")
Response = TypeVar("Response")

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_RETRY = Retry()

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # one meant for web traffic must not swallow calls to the loopback or to a cluster
    ("grpc.initial_reconnect_backoff_ms", 100),  # so that a request that is sent again finds a connection
    ("grpc.max_receive_message_length", -1),  # the log-probabilities of a long prompt are one message
]


class Client:
    """A blocking client; several threads may share it. Every method raises an error of duet.errors.

    `retry` says when `stream` and `generate` send a request again; None: never.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, retry: Retry | None = DEFAULT_RETRY) -> None:
        self.address = address
        self._retry = retry
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Event]:
        """Yield the events of a request as they come; closing the iterator cancels it."""
        request = build_request(prompt, params, options)
        attempts = Attempts(self._retry, timeout_s)
        while True:
            order = StreamOrder(request.sampling.n or 1)
            call = self._stub.Generate(request, timeout=attempts.remaining_s())
            try:
                for response in call:
                    yield order.take(response)
                order.end()
                return
            except grpc.RpcError as error:
                failure = from_rpc(error, self.address)
            finally:
                call.cancel()
            delay_s = None if order.has_begun else attempts.delay_s(failure)
            if delay_s is None:
                raise failure
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
        """Close the connection; its requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Callable[[Request], Response], request: Request) -> Response:
        try:
            return method(request)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None


class AsyncClient:
    """The same for asyncio; make it where its event loop runs."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, retry: Retry | None = DEFAULT_RETRY) -> None:
        self.address = address
        self._retry = retry
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a request as they come; closing the iterator cancels it."""
        request = build_request(prompt, params, options)
        attempts = Attempts(self._retry, timeout_s)
        while True:
            order = StreamOrder(request.sampling.n or 1)
            call = self._stub.Generate(request, timeout=attempts.remaining_s())
            try:
                async for response in call:
                    yield order.take(response)
                order.end()
                return
            except grpc.RpcError as error:
                failure = from_rpc(error, self.address)
            finally:
                call.cancel()
            delay_s = None if order.has_begun else attempts.delay_s(failure)
            if delay_s is None:
                raise failure
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
        """Close the connection; its requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        try:
            return await method(request)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
