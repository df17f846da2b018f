"""The RPCs of vllm.grpc.engine.VllmEngine that the gateway calls; the others are UNIMPLEMENTED.

Status codes decide what the gateway does: before the first token it sends a request that failed with UNAVAILABLE or
RESOURCE_EXHAUSTED to another server, one that failed with INVALID_ARGUMENT or INTERNAL to nobody.
"""

import asyncio
import contextlib
from pathlib import Path

import grpc
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from scheduler_service.errors import ExecutorUnavailable, ServerDraining
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.service import guarded
from scheduler_service.frontend.tokenizer import ModelTokenizer
from scheduler_service.gateway.about import LoadReport, ModelFiles
from scheduler_service.gateway.kv_events import KvBatches
from scheduler_service.gateway.requests import to_generate_request
from scheduler_service.gateway.responses import Responses
from scheduler_service.gateway.tokenizer_bundle import build_bundle

Context = grpc.aio.ServicerContext

SERVICE_NAME = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name


class VllmEngine:
    """The gateway's worker over our own front end."""

    name = SERVICE_NAME

    def __init__(
        self, core: CoreClient, generator: Generator, tokenizer: ModelTokenizer, model_directory: Path
    ) -> None:
        self._core = core
        self._generator = generator
        self._tokenizer = tokenizer
        self._files = ModelFiles(model_directory)
        self._load = LoadReport()

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server; requests stay bytes until `guarded` parses them."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Generate": stream(guarded(vllm.GenerateRequest, self.generate), None, _serialize),
            "Abort": unary(guarded(vllm.AbortRequest, self.abort), None, _serialize),
            "HealthCheck": unary(guarded(vllm.HealthCheckRequest, self.health_check), None, _serialize),
            "GetModelInfo": unary(guarded(vllm.GetModelInfoRequest, self.get_model_info), None, _serialize),
            "GetServerInfo": unary(guarded(vllm.GetServerInfoRequest, self.get_server_info), None, _serialize),
            "GetLoads": unary(guarded(vllm.GetLoadsRequest, self.get_loads), None, _serialize),
            "GetTokenizer": stream(guarded(common.GetTokenizerRequest, self.get_tokenizer), None, _serialize),
            "SubscribeKvEvents": stream(
                guarded(common.SubscribeKvEventsRequest, self.subscribe_kv_events), None, _serialize
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def generate(self, request: vllm.GenerateRequest, context: Context) -> None:
        """Stream until the end or until the gateway leaves. Raises: DuetError.

        While there is no executor, new requests are better off on another server, and are sent there at once.
        """
        ours = to_generate_request(request)
        self._check_ready()
        responses = Responses(ours, is_streamed=request.stream)
        self._load.queue(request.request_id, len(ours.token_ids.ids))
        events = self._generator.events(ours, time_remaining_s=context.time_remaining())
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._load.begin(request.request_id)
                    for response in responses.of(event):
                        await context.write(response)
        finally:
            self._load.begin(request.request_id)

    async def abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        """End requests; those that ended already are passed over. Raises: ExecutorUnavailable."""
        for request_id in request.request_ids:
            await self._core.cancel("", request_id)
        return vllm.AbortResponse()

    async def health_check(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        """Whether an executor session is open. Raises: ExecutorUnavailable before the first one was.

        The gateway registers a server at its first answer, healthy or not, and asks only once for its model.
        """
        await self._core.wait_for_model(0)
        try:
            self._check_ready()
        except ExecutorUnavailable as error:
            return vllm.HealthCheckResponse(healthy=False, message=error.message)
        return vllm.HealthCheckResponse(healthy=True, message="serving")

    async def get_model_info(self, request: vllm.GetModelInfoRequest, context: Context) -> vllm.GetModelInfoResponse:
        """Raises: ExecutorUnavailable before an executor has connected."""
        return self._files.model_info(await self._core.wait_for_model(0), self._tokenizer)

    async def get_server_info(self, request: vllm.GetServerInfoRequest, context: Context) -> vllm.GetServerInfoResponse:
        """Raises: ExecutorUnavailable before an executor has connected."""
        model = await self._core.wait_for_model(0)
        return self._load.server_info(await self._core.load(), model.dtype)

    async def get_loads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        """Raises: ExecutorUnavailable without a core."""
        return self._load.loads(await self._core.load())

    async def get_tokenizer(self, request: common.GetTokenizerRequest, context: Context) -> None:
        """Stream the tokenizer's files as an archive, which a gateway asks for once, where it lacks our disk."""
        bundle = await asyncio.to_thread(build_bundle, self._files.directory)
        for chunk in bundle.chunks():
            await context.write(chunk)

    async def subscribe_kv_events(self, request: common.SubscribeKvEventsRequest, context: Context) -> None:
        """Stream what the prefix cache holds, then its changes. Raises: ExecutorUnavailable without a core.

        Nothing is kept to resume from: a subscriber that asks for it, that does not read, or that has seen the core
        die, is told to begin anew.
        """
        if request.start_sequence_number:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "no history is kept; subscribe from 0 for a snapshot")
        subscription = self._core.subscribe_kv()
        batches = KvBatches()
        try:
            await context.send_initial_metadata(())
            while (message := await subscription.take()) is not None:
                await context.write(batches.batch(message))
        finally:
            self._core.unsubscribe_kv(subscription)
        await context.abort(grpc.StatusCode.DATA_LOSS, "events were lost; subscribe from 0 for a snapshot")

    def _check_ready(self) -> None:
        if self._core.status is None:
            raise ExecutorUnavailable("the scheduler core is restarting")
        if not self._core.status.ready:
            raise ExecutorUnavailable("no executor is connected")
        if self._generator.is_draining:
            raise ServerDraining("the server is draining")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
