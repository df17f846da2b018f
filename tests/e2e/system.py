"""A running pair of services as an operator and a client see it: its processes, its health, its load, its answers."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from duet import Client
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub

M = TypeVar("M", bound=Message)

ROOT = Path(__file__).parents[2]
SERVICE = "duet.inference.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PROBE = [9, 8, 7, 6, 5]  # prompt of the request that is answered alike for as long as all is well
ENDLESS = 7_900  # tokens: a stream that outlasts whatever a test does beside it
PATIENCE_S = 60.0  # for what happens soon; only a test that fails waits so long


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A status with its details; None for each detail that is not there."""

    code: grpc.StatusCode
    message: str
    field: str | None
    reason: str | None
    retry_after_s: float | None

    @classmethod
    def of(cls, error: Any) -> "Refusal":
        status = rpc_status.from_call(error)
        packed = list(status.details) if status else []

        def detail(kind: type[M]) -> M | None:
            message = kind()
            return next((message for one in packed if one.Unpack(message)), None)

        request, info, retry = detail(details.BadRequest), detail(details.ErrorInfo), detail(details.RetryInfo)
        return cls(
            code=error.code(),
            message=error.details(),
            field=request.field_violations[0].field if request else None,
            reason=info.reason if info else None,
            retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        )


def refusal_of(call: Any) -> Refusal:
    """The status with which a stream fails, its messages read."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return Refusal.of(caught.value)


class System:
    """The services at `address`, with one connection to them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self.stub = InferenceServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.client = Client(address)
        self.sound_pids, self.sound_tokens = self.pids(), self.probe()

    def close(self) -> None:
        self.client.close()
        self.channel.close()

    def pids(self) -> dict[str, int]:
        """The processes by their modules; all five, unless some are down."""
        return pids_at(self.address)

    def probe(self) -> list[int]:
        """The tokens of a normal request."""
        return tokens_of(self.stub.Generate(generate_request(PROBE, max_tokens=8), timeout=PATIENCE_S))

    def load(self) -> pb.Load:
        return self.stub.GetServer(pb.GetServerRequest(), timeout=PATIENCE_S).load

    def status(self, service: str = SERVICE) -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status

    def wait_idle(self) -> None:
        """Return once no request, no slot and no block is held."""
        wait_until(lambda: is_idle(self.load()))

    def assert_unharmed(self) -> None:
        """The same processes as at the start serve, answer as then, and hold nothing."""
        self.wait_idle()
        assert self.pids() == self.sound_pids
        self.assert_serves()

    def assert_serves(self) -> None:
        """All processes are there, answer as at the start, and hold nothing."""
        assert sorted(self.pids()) == sorted(self.sound_pids)
        assert self.status() == SERVING
        assert self.probe() == self.sound_tokens
        self.wait_idle()

    def refusal(self, request: pb.GenerateRequest | bytes, method: str = "Generate") -> Refusal:
        """The status that a request, or the bytes of one, is refused with."""
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        return refusal_of(self.channel.unary_stream(f"/{SERVICE}/{method}")(payload, timeout=PATIENCE_S))

    @contextlib.contextmanager
    def endless(self, **fields: Any) -> Iterator[Any]:
        """The call of a running stream that is cancelled at the end of the block; its first event is taken."""
        call = self.stub.Generate(generate_request([11, 12, 13], max_tokens=ENDLESS, **fields))
        try:
            assert next(call).HasField("started")
            yield call
        finally:
            call.cancel()


def generate_request(prompt: str | Sequence[int], *, max_tokens: int, **fields: Any) -> pb.GenerateRequest:
    """Greedy, past every end of sequence, unless `fields` say otherwise."""
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0), stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    request.MergeFrom(pb.GenerateRequest(**fields))
    return request


def tokens_of(responses: Iterator[pb.GenerateResponse]) -> list[int]:
    """The tokens of a whole stream, whose order is checked."""
    started, *deltas, finished = responses
    assert started.HasField("started")
    assert finished.HasField("finished")
    token_ids: list[int] = []
    for response in deltas:
        assert response.HasField("delta")
        assert response.delta.offset == len(token_ids)
        token_ids += response.delta.token_ids
    assert finished.finished.usage.output_tokens == len(token_ids)
    return token_ids


def is_idle(load: pb.Load) -> bool:
    return load.waiting_requests == load.running_requests == load.used_blocks == 0


def wait_until(is_so: Callable[[], bool]) -> None:
    """Fail where it does not come true."""
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def pids_at(address: str) -> dict[str, int]:
    """The living processes of the services whose clients connect to `address`, by module."""
    services = {pid: command for pid, command in _commands() if command[1:2] == ["-m"] and "_service" in command[2]}
    executors = {command[command.index("--executor") + 1] for command in services.values() if address in command}
    pids: dict[str, int] = {}
    for pid, command in services.items():
        if address in command or executors & set(command):
            assert command[2] not in pids, f"{command[2]} runs twice"
            pids[command[2]] = pid
    return pids


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _commands() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(entry.name), (entry / "cmdline").read_bytes().decode().split("\0")
