"""Every failure that a client can see, and its gRPC status.

DuetError
├── InvalidRequest           INVALID_ARGUMENT     the caller does not retry
│   └── ContextLengthExceeded
├── DuplicateRequest         ALREADY_EXISTS       the caller does not retry
├── UnknownRequest           NOT_FOUND            the caller ignores it
├── NotAdmitted              PERMISSION_DENIED    the caller is no operator
├── QueueFull                RESOURCE_EXHAUSTED   the caller retries after retry_after_s
├── ExecutorUnavailable      UNAVAILABLE          the caller retries elsewhere
│   └── ServerDraining
├── Superseded               ABORTED              another client resumed the request
├── DeadlineExceeded         DEADLINE_EXCEEDED
└── InternalError            INTERNAL             our own bug; the message holds an id that is in the log

gRPC itself refuses a message over 24 MiB with RESOURCE_EXHAUSTED and no ErrorInfo; clients take that as InvalidRequest.
"""

import logging
import uuid

import grpc

log = logging.getLogger(__name__)


class DuetError(Exception):
    """Base of all; `code` is the status a client sees."""

    code: grpc.StatusCode

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field  # path of the request field at fault, as in the proto
        self.retry_after_s = retry_after_s


class InvalidRequest(DuetError):
    """A field is out of range, missing, or not implemented."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens are longer than the model or than the whole KV cache."""


class DuplicateRequest(DuetError):
    """The request id is in use."""

    code = grpc.StatusCode.ALREADY_EXISTS


class UnknownRequest(DuetError):
    """No such request is alive."""

    code = grpc.StatusCode.NOT_FOUND


class NotAdmitted(DuetError):
    """Administration is not for this caller."""

    code = grpc.StatusCode.PERMISSION_DENIED


class QueueFull(DuetError):
    """The waiting queue is at its limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class ExecutorUnavailable(DuetError):
    """No executor for longer than the request may wait."""

    code = grpc.StatusCode.UNAVAILABLE


class ServerDraining(ExecutorUnavailable):
    """The server takes no new requests, and soon will be gone."""


class Superseded(DuetError):
    """The stream's request goes on in another stream."""

    code = grpc.StatusCode.ABORTED


class DeadlineExceeded(DuetError):
    """The call's deadline passed, in the queue or while running."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(DuetError):
    """A bug of ours, or a failure of the device; made by `logged_internal_error`."""

    code = grpc.StatusCode.INTERNAL


def logged_internal_error(cause: Exception | str, told: str = "") -> InternalError:
    """A bug of ours as a client sees it; the log has the cause under the same id, the client only what it is `told`."""
    error_id = uuid.uuid4().hex[:12]
    log.error("internal error %s: %s", error_id, cause, exc_info=cause if isinstance(cause, Exception) else None)
    return InternalError(f"internal error {error_id}{told}; the server's log has more under this id")
