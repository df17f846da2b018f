"""Our own services as the target of a load."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import grpc

from duet.bench.load import sleep_until
from duet.bench.metrics import Arrivals
from duet.bench.scenarios import Request
from duet.cli.status import to_dict
from duet.client import Client
from duet.errors import StreamCut, from_rpc
from duet.params import SamplingParams
from duet.request import build_request
from duet.stream_order import StreamOrder
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub

_GENERATE = "/duet.inference.v1.InferenceService/Generate"


@dataclasses.dataclass(frozen=True)
class DuetTarget:
    """The inference service at `address`."""

    address: str

    async def connect(self) -> "DuetSession":
        """A session with an open connection."""
        channel = grpc.aio.insecure_channel(self.address, options=[("grpc.enable_http_proxy", 0)])
        try:
            await InferenceServiceStub(channel).GetModel(pb.GetModelRequest())
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
        return DuetSession(channel, self.address)

    def describe(self) -> dict[str, Any]:
        """Everything that GetModel and GetServer tell."""
        with Client(self.address) as client:
            return {"model": to_dict(client.model()), "server": to_dict(client.server())}


class DuetSession:
    """A channel whose messages stay bytes until their stream has ended: 15% less CPU a message than AsyncClient."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._address = address
        self._channel = channel  # closes where nobody holds it
        self._generate = channel.unary_stream(_GENERATE, request_serializer=pb.GenerateRequest.SerializeToString)

    async def stream(self, request: Request, begin: "asyncio.Future[float]") -> Callable[[], Arrivals]:
        """As load.Session says."""
        params = SamplingParams(request.temperature, max_tokens=request.output_len, ignore_eos=True)
        message = build_request(request.prompt, params, {})
        times: list[float] = []
        messages: list[bytes] = []
        due = await begin + request.start_s
        await sleep_until(due)
        sent = time.perf_counter()
        try:
            async for data in self._generate(message):
                times.append(time.perf_counter())
                messages.append(data)
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from None
        return functools.partial(_read, sent, sent - due, times, messages)


def _read(sent: float, lag_s: float, times: list[float], messages: list[bytes]) -> Arrivals:
    order = StreamOrder()
    events = [order.take(pb.GenerateResponse.FromString(data)) for data in messages]
    order.end()
    started = events[0]
    assert isinstance(started, pb.Started)
    timed = zip(times, events, strict=True)
    deltas = [(when, len(event.token_ids)) for when, event in timed if isinstance(event, pb.TokenDelta)]
    if not deltas:
        raise StreamCut("a stream was cancelled before its first token")
    return Arrivals(
        sent=sent,
        times=[when for when, _ in deltas],
        num_tokens=[count for _, count in deltas],
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
        lag_s=lag_s,
    )
