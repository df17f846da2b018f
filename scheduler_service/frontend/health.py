"""grpc.health.v1: serving only while an executor session is open and requests are taken.

The library's own asyncio servicer forgets the other watchers of a service when one of them leaves, and holds its lock
while it writes to a slow one; this one keeps no state and reads the core's.
"""

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Health of the server as a whole (the empty name) and of the named services, which is one and the same."""

    def __init__(self, core: CoreClient, generator: Generator, service_names: tuple[str, ...]) -> None:
        self._core = core
        self._generator = generator
        self._names = {"", *service_names}

    async def Check(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        """The health now; NOT_FOUND for an unknown service."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """The health now and at each change, until the client leaves."""
        last = None
        while True:
            changed = self._core.changed  # taken before the look, so that no change falls between
            status = self._status(request.service)
            if status != last:
                await context.write(HealthCheckResponse(status=status))
                last = status
            await changed.wait()

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in self._names:
            return HealthCheckResponse.SERVICE_UNKNOWN
        engine = self._core.status
        is_serving = engine is not None and engine.ready and not self._generator.is_draining
        return HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
