"""The session protocol.

Each stream has a reader, which decodes plans and queues them for the device, and a writer, which sends what comes
back. Readers and writers live on one event loop, so what they do between two awaits is atomic: opening an epoch and
queueing plans need no other lock.
"""

import asyncio
import logging
import uuid

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from executor_service.device import Device, Session, SessionError, Wiped, last_step_id
from executor_service.plan import Column, InvalidPlan, decode_plan
from executor_service.runner.runner import StepOutput
from protos.duet.executor.v1 import executor_pb2 as pb
from servicekit.fault_points import reach

PROTOCOL_VERSION = 3
MAX_INFLIGHT_PLANS = 8  # the core sends at most four ahead; the rest is slack for a faster device

Context = grpc.aio.ServicerContext[bytes, pb.RunSessionResponse]
log = logging.getLogger(__name__)


class SessionService:
    """ExecutorService/RunSession over one device. Requests arrive as bytes, so that garbage gets a proper status."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._boot_id = uuid.uuid4().hex
        self._last_epoch = 0
        self._holder: Session | None = None  # of the last epoch, alive or ended
        self._sessions: set[Session] = set()  # every stream, opened or waiting

    async def run_session(self, _: object, context: Context) -> None:
        """Serve one stream until the client closes it, breaks the protocol or is fenced."""
        session = Session()
        self._sessions.add(session)
        try:
            await context.write(pb.RunSessionResponse(info=self._describe()))
            reader = asyncio.create_task(self._read(session, context))
            try:
                await _write(session, context)
            finally:
                reader.cancel()
        except SessionError as error:
            log.info("epoch %s ends with %s: %s", session.epoch, error.code.name, error.message)
            await context.abort(error.code, error.message)
        finally:
            session.ended = True
            self._sessions.remove(session)

    def end_all(self, error: SessionError | None) -> None:
        """End every session, because the executor ends: in good order (None) or with what went wrong."""
        for session in self._sessions:
            session.end(error)

    def _describe(self) -> pb.ExecutorInfo:
        info, limits = self._device.info, self._device.info.limits
        return pb.ExecutorInfo(
            boot_id=self._boot_id,
            protocol_version=PROTOCOL_VERSION,
            last_epoch=self._last_epoch,
            session_alive=self._holder is not None and not self._holder.ended,
            architecture=info.architecture,
            model_digest=info.model_digest,
            weights_digest=info.weights_digest,
            dtype=info.dtype,
            device=info.device,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            num_slots=limits.num_slots,
            max_tokens_per_step=limits.max_tokens_per_step,
            graph_batch_sizes=info.graph_batch_sizes,
            tensor_parallel_size=info.tensor_parallel_size,
            max_inflight_plans=MAX_INFLIGHT_PLANS,
        )

    async def _read(self, session: Session, context: Context) -> None:
        """Queue what the client sends until its side or the session ends."""
        try:
            while (data := await context.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                if session.ended:
                    return  # what ended it tells the writer why
                self._handle(session, data)
            session.end(None)
        except SessionError as error:
            session.end(error)
        except Exception as error:  # nobody awaits this task: the writer reports for it
            log.exception("reading epoch %s failed", session.epoch)
            session.end(SessionError(grpc.StatusCode.INTERNAL, repr(error)))

    def _handle(self, session: Session, data: bytes) -> None:
        try:
            request = pb.RunSessionRequest.FromString(data)
        except DecodeError as error:
            raise SessionError(grpc.StatusCode.INVALID_ARGUMENT, "the bytes are no RunSessionRequest") from error
        match request.WhichOneof("message"):
            case "open":
                self._open(session, request.open)
            case "plan":
                self._enqueue(session, request.plan, data)
            case _:
                raise SessionError(grpc.StatusCode.INVALID_ARGUMENT, "neither open nor plan is set")

    def _open(self, session: Session, request: pb.OpenSession) -> None:
        """Put the epoch in force, fencing the session before it. Its plans may come when the device has wiped."""
        info = self._device.info
        if session.epoch is not None:
            raise _precondition("the session is open already")
        if abs(request.protocol_version - PROTOCOL_VERSION) > 1:  # services of two releases meet in a rolling restart
            raise _precondition(f"protocol version {request.protocol_version}, this is {PROTOCOL_VERSION}")
        if request.model_digest != info.model_digest:
            raise _precondition(f"model_digest {request.model_digest!r}, this is {info.model_digest!r}")
        if request.weights_digest not in ("", info.weights_digest):
            raise _precondition(f"weights_digest {request.weights_digest!r}, this is {info.weights_digest!r}")
        if request.epoch != self._last_epoch + 1:
            message = f"epoch {request.epoch} does not follow {self._last_epoch}"
            raise SessionError(grpc.StatusCode.ABORTED, message)
        if self._holder and not self._holder.ended:
            self._holder.end(SessionError(grpc.StatusCode.ABORTED, f"fenced by epoch {request.epoch}"))
        session.epoch = self._last_epoch = request.epoch
        self._holder = session
        reach("executor.opening", request.epoch)
        self._device.wipe(session)

    def _enqueue(self, session: Session, message: pb.StepPlan, request: bytes) -> None:
        if not session.is_wiped:
            raise _precondition("a plan before the session was opened")
        if message.epoch != session.epoch:
            raise _precondition(f"a plan of epoch {message.epoch} in epoch {session.epoch}")
        if message.step_id != session.next_step_id:
            raise _precondition(f"step {message.step_id} where {session.next_step_id} is due")
        if len(session.last_step_ids) >= MAX_INFLIGHT_PLANS:
            raise _precondition(f"more than {MAX_INFLIGHT_PLANS} plans in flight")
        try:
            plan = decode_plan(message, self._device.info.limits)
        except InvalidPlan as error:
            raise SessionError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        reach("executor.plan_received", plan.step_id)
        session.last_step_ids.append(last_step_id(plan))
        session.next_step_id = last_step_id(plan) + 1
        self._device.submit(session, plan, request, message.timeout_ms / 1000)


async def _write(session: Session, context: Context) -> None:
    """Send what the device produces; returns when the client closed its side. Raises: SessionError."""
    while (event := await session.events.get()) is not None:
        match event:
            case SessionError():
                raise event
            case Wiped():
                assert session.epoch
                session.is_wiped = True
                await context.write(pb.RunSessionResponse(opened=pb.SessionOpened(epoch=session.epoch)))
            case StepOutput():
                # Settled before it is sent: the client may answer with a plan before the write returns.
                if event.step_id == session.last_step_ids[0] and not event.partial:
                    session.last_step_ids.popleft()
                await context.write(pb.RunSessionResponse(result=_encode(event, session.epoch)))
                reach("executor.result_written", event.step_id)


def _encode(output: StepOutput, epoch: int | None) -> pb.StepResult:
    result = pb.StepResult(
        epoch=epoch,
        step_id=output.step_id,
        partial=output.partial,
        slots=_integers(output.slots),
        token_ids=_integers(output.token_ids),
        finish_reasons=_integers(output.finish_reasons),
        slot_errors=[pb.SlotError(slot=slot, message=message) for slot, message in output.slot_errors],
        device_time_ns=output.device_time_ns,
    )
    if output.logprobs:
        result.logprob_token_ids = _integers(output.logprobs.token_ids)
        result.logprobs = _floats(output.logprobs.logprobs)
        result.logprob_ranks = _integers(output.logprobs.ranks)
    result.prompt_logprobs.extend(
        pb.PromptLogprobs(
            slot=part.slot,
            start=part.start,
            token_ids=_integers(part.token_ids),
            logprobs=_floats(part.logprobs),
            ranks=_integers(part.ranks),
        )
        for part in output.prompt_logprobs
    )
    return result


def _integers(column: Column) -> bytes:
    return column.astype("<i4", copy=False).tobytes()


def _floats(column: NDArray[np.float32]) -> bytes:
    return column.astype("<f4", copy=False).tobytes()


def _precondition(message: str) -> SessionError:
    return SessionError(grpc.StatusCode.FAILED_PRECONDITION, message)
