"""The core's end of a session with the executor: see executor.proto."""

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio

from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1 import executor_pb2_grpc as pb_grpc
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.step_plan import StepPlan, StepResult, decode_result
from servicekit.fault_points import reach

PROTOCOL_VERSION = 3  # served together with the versions before and after it
INFO_TIMEOUT_S = 10.0  # an executor that takes a call and says nothing for so long is stopped
OPEN_TIMEOUT_S = 150.0  # the device may be at work for an earlier epoch; an executor that hangs ends itself before
MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # an executor is never behind one
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class SessionRefused(Exception):
    """The executor is held by another core, serves another model, or speaks another protocol."""


class SessionEnded(Exception):
    """The executor stopped as it was told to: nothing that it ran was at fault."""


class ExecutorHangs(Exception):
    """A plan takes far longer than it should."""


def limits_of(info: pb.ExecutorInfo) -> ExecutorLimits:
    """The executor's capacity as the core uses it."""
    return ExecutorLimits(
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        num_slots=info.num_slots,
        max_tokens_per_step=info.max_tokens_per_step,
        max_model_len=info.max_model_len,
        max_inflight_plans=info.max_inflight_plans,
    )


class ExecutorSession:
    """One RunSession call, from the handshake to the loss of the executor."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = pb_grpc.ExecutorServiceStub(channel).RunSession()
        self._plans: asyncio.Queue[pb.RunSessionRequest] = asyncio.Queue()
        self._given_up = asyncio.Event()
        self.epoch = 0

    async def open(self, model_digest: str, weights_digest: str) -> pb.ExecutorInfo:
        """Take the epoch after the executor's last one; an empty `weights_digest` accepts any weights.

        Raises: SessionRefused; grpc.aio.AioRpcError where there is no executor; TimeoutError.
        """
        async with asyncio.timeout(INFO_TIMEOUT_S):
            info = (await self._read()).info
        if info.session_alive:
            raise SessionRefused("another core holds the executor")
        if abs(info.protocol_version - PROTOCOL_VERSION) > 1:
            raise SessionRefused(f"the executor speaks version {info.protocol_version}, this core {PROTOCOL_VERSION}")
        self.epoch = info.last_epoch + 1
        request = pb.OpenSession(
            epoch=self.epoch,
            protocol_version=min(PROTOCOL_VERSION, info.protocol_version),
            model_digest=model_digest,
            weights_digest=weights_digest,
        )
        await self._write(pb.RunSessionRequest(open=request))
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            opened = (await self._read()).opened
        if opened.epoch != self.epoch:
            raise SessionRefused(f"the executor opened epoch {opened.epoch}, not {self.epoch}")
        return info

    def send(self, plan: StepPlan) -> None:
        """Queue a plan; plans go out in order, and the number in flight bounds the queue."""
        self._plans.put_nowait(pb.RunSessionRequest(plan=plan.encode(self.epoch)))

    async def run(self, on_result: Callable[[StepResult], None]) -> None:
        """Send plans and hand over results until the executor is lost.

        Raises: a group of SessionRefused, SessionEnded, ExecutorHangs and grpc.aio.AioRpcError, at the loss.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_plans())
            tasks.create_task(self._read_results(on_result))
            tasks.create_task(self._wait_given_up())

    def give_up(self) -> None:
        """The executor hangs: end the session."""
        self._given_up.set()

    async def _wait_given_up(self) -> None:
        await self._given_up.wait()
        raise ExecutorHangs("a plan takes far longer than it should")

    async def _write_plans(self) -> None:
        while True:
            await self._write(await self._plans.get())
            reach("core.plan_sent")

    async def _read_results(self, on_result: Callable[[StepResult], None]) -> None:
        while True:
            result = (await self._read()).result
            reach("core.result_read")
            assert result.epoch == self.epoch
            on_result(decode_result(result))

    async def _write(self, message: pb.RunSessionRequest) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError:  # the call ended between two reads
            if await self._call.code() is grpc.StatusCode.OK:
                raise SessionEnded("the executor is stopping") from None
            raise SessionRefused("the executor ended the session") from None

    async def _read(self) -> pb.RunSessionResponse:
        message = await self._call.read()
        if message is grpc.aio.EOF:  # any status but OK raises
            raise SessionEnded("the executor is stopping")
        return message

    def close(self) -> None:
        """End the call."""
        self._call.cancel()
