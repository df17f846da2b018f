"""Every failure that a caller of this client can see.

DuetError                  `code` is the gRPC status, None where no server was involved
├── InvalidRequest         INVALID_ARGUMENT     do not retry; `field` names the field where there is one
├── DuplicateRequest       ALREADY_EXISTS       the request id is in use
├── UnknownRequest         NOT_FOUND            no such request is alive
├── NotAdmitted            PERMISSION_DENIED    the server takes this call from operators only
├── QueueFull              RESOURCE_EXHAUSTED   retry after `retry_after_s`
├── Unavailable            UNAVAILABLE          nothing listens there, or the server has no executor
├── Superseded             ABORTED              the request was resumed elsewhere, and goes on there
├── DeadlineExceeded       DEADLINE_EXCEEDED    `timeout_s` passed
├── InternalError          any other status     report it; the message holds an id that is in the server's log
├── StreamCut                                   a stream ended early or lost tokens
└── StartFailed                                 LLM could not start the services; the message ends with their log

RESOURCE_EXHAUSTED without ErrorInfo is gRPC's own refusal of a message that is too large: InvalidRequest.
Streams raise QueueFull and Unavailable after the attempts of the client's Retry; with `detach_seconds` these, StreamCut
and broken connections only where resuming has not helped.
"""

from collections.abc import Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

M = TypeVar("M", bound=Message)


class DuetError(Exception):
    """Base of all."""

    code: grpc.StatusCode | None = None

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field  # path of the request field at fault, as in inference.proto
        self.reason = reason  # the server's own name for the error
        self.retry_after_s = retry_after_s


class InvalidRequest(DuetError):
    """A field is out of range, missing or not implemented."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class DuplicateRequest(DuetError):
    """The request id is in use."""

    code = grpc.StatusCode.ALREADY_EXISTS


class UnknownRequest(DuetError):
    """No such request is alive."""

    code = grpc.StatusCode.NOT_FOUND


class NotAdmitted(DuetError):
    """The call is for operators: from the server's own machine, or with its admin secret."""

    code = grpc.StatusCode.PERMISSION_DENIED


class QueueFull(DuetError):
    """The server's waiting queue is at its limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(DuetError):
    """Nothing listens at the address, or the server has no executor."""

    code = grpc.StatusCode.UNAVAILABLE


class Superseded(DuetError):
    """The request was resumed elsewhere, and goes on there."""

    code = grpc.StatusCode.ABORTED


class DeadlineExceeded(DuetError):
    """The call's timeout passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(DuetError):
    """A bug of the server, or a status that it should not have sent."""

    code = grpc.StatusCode.INTERNAL


class StreamCut(DuetError):
    """A stream ended without `finished`, or its offsets do not follow on."""


class StartFailed(DuetError):
    """The services did not become ready."""


_BY_CODE: dict[grpc.StatusCode | None, type[DuetError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        DuplicateRequest,
        UnknownRequest,
        NotAdmitted,
        QueueFull,
        Unavailable,
        Superseded,
        DeadlineExceeded,
    )
}


def from_rpc(error: grpc.RpcError, address: str) -> DuetError:
    """The failed call `error`, sync or async, as one of ours."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, message = error.code(), error.details() or ""
    status = rpc_status.from_call(error) or Status()  # pyright: ignore[reportArgumentType]
    info = _detail(status, details.ErrorInfo)
    if code is grpc.StatusCode.UNAVAILABLE and info is None:  # gRPC's own report of a broken connection
        message = f"no connection to {address}: {message}"
    kind = _BY_CODE.get(code, InternalError)
    if kind is QueueFull and info is None:
        kind = InvalidRequest
    if kind is InternalError and code is not grpc.StatusCode.INTERNAL:
        message = f"{code.name}: {message}"
    retry = _detail(status, details.RetryInfo)
    result = kind(
        message,
        field=_field(status),
        reason=info.reason if info else None,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )
    result.code = code
    return result


def _detail(status: Status, kind: type[M]) -> M | None:
    message = kind()
    return next((message for packed in status.details if packed.Unpack(message)), None)


def _field(status: Status) -> str | None:
    request = _detail(status, details.BadRequest)
    violations: Sequence[details.BadRequest.FieldViolation] = request.field_violations if request else ()
    return violations[0].field if violations else None
