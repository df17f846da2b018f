"""Starts the gRPC server beside the connection to the core, and stops both."""

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.address import check_address
from scheduler_service.frontend.admin import AdminService, read_secret
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.health import HealthServicer
from scheduler_service.frontend.service import SERVICE_NAME, InferenceService
from scheduler_service.frontend.tokenizer import load_model_tokenizer
from scheduler_service.gateway import vllm_engine
from servicekit.fault_points import reach

log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", 24 << 20),  # what is over our own 16 MiB can still be told so
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_GRACE_S = 1.0  # for calls under way when the server stops


class Stop:
    """How a server is told to stop."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.at_once = asyncio.Event()

    def drain(self) -> None:
        """Once the streams have ended, or after a time; at once, the second time."""
        if self.draining.is_set():
            self.at_once.set()
        self.draining.set()

    def stop(self) -> None:
        """At once."""
        self.at_once.set()
        self.draining.set()


class FrontendServer:
    """gRPC server and core connection of one front end process."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Load the model's tokenizer and bind the port.

        Raises: UnusableModel, UnusableSecret, PortUnavailable.
        """
        assert config.core_socket is not None, "the supervisor names the core's socket"
        reach("frontend.starting")
        self.core = CoreClient(config.core_socket, config.max_pause_s)
        self._drain_s = config.drain_s
        tokenizer = load_model_tokenizer(Path(config.model), config.model_name)
        # Without it two servers on one port fail; front ends of one service are told apart by nobody, and share it.
        shares_port = config.num_frontends is not None and config.num_frontends > 1
        self._server = grpc.aio.server(options=(*_OPTIONS, ("grpc.so_reuseport", int(shares_port))))
        self._generator = generator = Generator(self.core, tokenizer, max_pause_s=config.max_pause_s)
        service = InferenceService(self.core, tokenizer, generator)
        secret_file = config.admin_secret_file
        admin = AdminService(self.core, None if secret_file is None else read_secret(secret_file))
        self._server.add_generic_rpc_handlers((service.handler(), admin.handler()))
        names = (SERVICE_NAME, admin.name)
        if engine := vllm_engine(self.core, generator, tokenizer, Path(config.model)):
            self._server.add_generic_rpc_handlers((engine.handler(),))
            names = (*names, engine.name)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.core, generator, names), self._server)
        reflection.enable_server_reflection((*names, health_name, reflection.SERVICE_NAME), self._server)
        if not shares_port:
            check_address(config.listen)
        self.port = self._server.add_insecure_port(config.listen)

    async def run(self, stop: Stop, on_ready: Callable[[], None]) -> None:
        """Serve until `stop` is told; `on_ready` is called once, when port and core connection are open.

        Raises: what ends the connection to the core for good.
        """
        await self._server.start()
        connection = asyncio.create_task(self.core.run())
        stopped = asyncio.create_task(self._wait_to_stop(stop))
        announced = asyncio.create_task(self._announce(on_ready))
        tasks = (connection, stopped, announced)
        try:
            await asyncio.wait((connection, stopped), return_when=asyncio.FIRST_COMPLETED)
            await self._server.stop(_GRACE_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not connection.cancelled():
            connection.result()

    async def _wait_to_stop(self, stop: Stop) -> None:
        """Return when the server is to stop, with no stream left where it was told to drain, unless that takes long."""
        await stop.draining.wait()
        drained = asyncio.create_task(self._generator.drain())
        at_once = asyncio.create_task(stop.at_once.wait())
        await asyncio.wait((drained, at_once), timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        at_once.cancel()

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        await self.core.wait_connected()
        reach("frontend.listening")
        log.info("listening on port %d", self.port)
        on_ready()


async def serve(config: SchedulerConfig, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM, by which the server drains, or SIGINT, by which it stops at once.

    Raises: UnusableModel, UnusableSecret, PortUnavailable.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.drain)
    loop.add_signal_handler(signal.SIGINT, stop.stop)
    await FrontendServer(config).run(stop, on_ready)
