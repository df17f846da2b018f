"""The gRPC server of an executor: the session service, health and reflection."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health import aio as aio_health  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha import reflection

from executor_service.device import Device, Followers, SessionError
from executor_service.runner.runner import Runner
from executor_service.session import SessionService
from protos.duet.executor.v1 import executor_pb2 as pb
from servicekit.fault_points import reach

SERVICE = pb.DESCRIPTOR.services_by_name["ExecutorService"].full_name

_MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second executor on the port must fail, not share it
    # A peer that vanished without a word is noticed within 15 s; the peer may probe as often.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # 60 s otherwise, and the longer one counts
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

log = logging.getLogger(__name__)


class ListenError(Exception):
    """The address cannot be listened on."""


async def serve(
    runner: Runner,
    device_thread: ThreadPoolExecutor,
    address: str,
    stop: asyncio.Event,
    on_listening: Callable[[int], None] = lambda port: None,
    followers: Followers | None = None,
) -> bool:
    """Serve sessions on `address` (host:port; port 0: any) until `stop` is set or the device fails.

    `device_thread`: the one worker in which plans run. `on_listening` gets the port. `followers`: the other ranks,
    where there are any. Returns whether the device was sound at the end. Raises: ListenError.
    """
    server = grpc.aio.server(options=_OPTIONS)
    port = _listen(server, address)
    device = Device(runner, device_thread, followers)
    try:
        sessions = SessionService(device)
        healthy = _add_services(server, sessions)
        await server.start()
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening on port %d", port)
        reach("executor.listening")
        on_listening(port)
        await _first_of(stop.wait(), device.failed.wait(), device.watch())
        await healthy.enter_graceful_shutdown()
        failure = SessionError(grpc.StatusCode.UNAVAILABLE, "the device failed") if device.failed.is_set() else None
        sessions.end_all(failure)
        await server.stop(grace=1.0)
        return not device.failed.is_set()
    finally:
        device.close()


def _listen(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: is another executor running there?") from error
    if not port:  # how grpcio before 1.83 says it
        raise ListenError(f"cannot listen on {address}: is another executor running there?")
    return port


def _add_services(server: grpc.aio.Server, sessions: SessionService) -> aio_health.HealthServicer:
    run_session = grpc.stream_stream_rpc_method_handler(
        sessions.run_session,  # pyright: ignore[reportArgumentType]
        response_serializer=pb.RunSessionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"RunSession": run_session}),))
    healthy = aio_health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((SERVICE, SERVICE_NAME, reflection.SERVICE_NAME), server)
    return healthy


async def _first_of(*waits: Coroutine[object, object, object]) -> None:
    """Raises: what it raises."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    ended, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    for task in ended:
        task.result()
