"""A DuetError as the gRPC status that a client sees, with google.rpc details."""

import math
from typing import NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from scheduler_service.errors import DuetError

_MAX_MESSAGE_BYTES = 600  # header blocks hold 8 KiB; a message travels twice there and up to triples when escaped


async def abort(context: grpc.aio.ServicerContext, error: DuetError) -> NoReturn:
    """End the call with the error's status."""
    message = _shorten(error.message)
    status = status_pb2.Status(code=error.code.value[0], message=message)
    for detail in _details(error, message):
        status.details.add().Pack(detail)
    metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(error.code, message, trailing_metadata=metadata)


def _details(error: DuetError, message: str) -> list[Message]:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain="duet")]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(retry)
    return details


def _shorten(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return message
    return encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"
