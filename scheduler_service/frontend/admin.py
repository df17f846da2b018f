"""The RPCs of duet.admin.v1.AdminService."""

import hmac
from pathlib import Path

import grpc
from google.protobuf.message import Message

from protos.duet.admin.v1 import admin_pb2 as pb
from scheduler_service.errors import InvalidRequest, NotAdmitted
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.service import Context, guarded

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
_LOOPBACK = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


class UnusableSecret(Exception):
    """The file with the admin secret cannot be read, or holds none."""


def read_secret(path: str) -> str:
    """The secret that a file holds. Raises: UnusableSecret."""
    try:
        secret = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableSecret(f"the admin secret in {path} cannot be read: {error}") from error
    if not secret:
        raise UnusableSecret(f"the admin secret in {path} is empty")
    return secret


class AdminService:
    """What an operator may do; whoever else calls is refused."""

    name = SERVICE_NAME

    def __init__(self, core: CoreClient, secret: str | None) -> None:
        """With a `secret`, it is asked for from everywhere; without one, calls come from the loopback."""
        self._core = core
        self._secret = secret

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server; requests stay bytes until `guarded` parses them."""
        methods = {
            "Drain": grpc.unary_unary_rpc_method_handler(guarded(pb.DrainRequest, self.drain), None, _serialize),
            "CancelDrain": grpc.unary_unary_rpc_method_handler(
                guarded(pb.CancelDrainRequest, self.cancel_drain), None, _serialize
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Raises: NotAdmitted, InvalidRequest, ExecutorUnavailable without a core."""
        self._admit(context)
        limit_s = request.limit_seconds if request.HasField("limit_seconds") else None
        if limit_s is not None and not limit_s >= 0:
            raise InvalidRequest("limit_seconds must be at least 0", field="limit_seconds")
        reply = await self._core.drain(limit_s)
        return pb.DrainResponse(finished_requests=reply.finished, cut_requests=reply.cut)

    async def cancel_drain(self, request: pb.CancelDrainRequest, context: Context) -> pb.CancelDrainResponse:
        """Raises: NotAdmitted, ExecutorUnavailable without a core."""
        self._admit(context)
        await self._core.cancel_drain()
        return pb.CancelDrainResponse()

    def _admit(self, context: Context) -> None:
        if self._secret is None:
            if not context.peer().startswith(_LOOPBACK):
                raise NotAdmitted("administration is open to the loopback only: give the server an admin secret")
            return
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, f"Bearer {self._secret}".encode()):
            raise NotAdmitted("the admin secret is missing or wrong")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
