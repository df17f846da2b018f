"""The RPCs of duet.inference.v1.InferenceService."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import __version__, ipc
from scheduler_service.errors import (
    DuetError,
    ExecutorUnavailable,
    InvalidRequest,
    UnknownRequest,
    logged_internal_error,
)
from scheduler_service.frontend import validation
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.prompt import within_vocabulary
from scheduler_service.frontend.status import abort
from scheduler_service.frontend.tokenizer import ModelTokenizer
from servicekit.fault_points import reach

Context = grpc.aio.ServicerContext
M = TypeVar("M", bound=Message)
Method = Callable[[Any, Context], Awaitable[Message | None]]

TENANT_KEY = "duet-tenant"  # metadata; set by what authenticates clients in front of the server
MAX_TENANT_CHARS = 128
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceService:
    """Turns RPCs into messages for the core and the core's news into responses."""

    def __init__(self, core: CoreClient, tokenizer: ModelTokenizer, generator: Generator) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._generator = generator

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server; requests stay bytes until `guarded` parses them."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Generate": stream(guarded(pb.GenerateRequest, self.generate), None, _serialize),
            "Cancel": unary(guarded(pb.CancelRequest, self.cancel), None, _serialize),
            "GetModel": unary(guarded(pb.GetModelRequest, self.get_model), None, _serialize),
            "GetServer": unary(guarded(pb.GetServerRequest, self.get_server), None, _serialize),
            "WatchLoad": stream(guarded(pb.WatchLoadRequest, self.watch_load), None, _serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream until the end or until the client leaves. Raises: DuetError."""
        reach("frontend.request_read")
        events = self._generator.events(request, time_remaining_s=context.time_remaining(), tenant=tenant_of(context))
        async with contextlib.aclosing(events):
            async for event in events:
                await context.write(event)
                if event.HasField("delta"):
                    reach("frontend.delta_written")

    async def cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Raises: UnknownRequest, InvalidRequest."""
        if not request.request_id:
            raise InvalidRequest("request_id is required", field="request_id")
        if not await self._core.cancel(tenant_of(context), request.request_id):
            raise UnknownRequest(f"no request {request.request_id!r} is alive", field="request_id")
        return pb.CancelResponse()

    async def get_model(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Raises: ExecutorUnavailable before an executor has connected."""
        model = await self._core.wait_for_model(0)
        return pb.GetModelResponse(
            name=self._tokenizer.name,
            architecture=model.architecture,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=within_vocabulary(self._tokenizer.eos_token_ids, model.vocab_size),
            dtype=model.dtype,
            weights_digest=model.weights_digest,
            has_chat_template=self._tokenizer.chat_template is not None,
        )

    async def get_server(self, request: pb.GetServerRequest, context: Context) -> pb.GetServerResponse:
        """Raises: ExecutorUnavailable without a core."""
        load = await self._core.load()
        engine = self._core.status
        if engine is None:
            raise ExecutorUnavailable("the scheduler core is restarting")
        return pb.GetServerResponse(
            version=__version__,
            ready=engine.ready,
            uptime_seconds=load.uptime_seconds,
            queue_order=engine.queue_order,
            device=engine.model.device if engine.model else "",
            epoch=engine.epoch,
            load=_load(load),
            draining=self._generator.is_draining,
        )

    async def watch_load(self, request: pb.WatchLoadRequest, context: Context) -> None:
        """Stream the load until the client leaves. Raises: InvalidRequest, ExecutorUnavailable."""
        interval_s = request.interval_seconds if request.HasField("interval_seconds") else 1.0
        if not 0.05 <= interval_s <= 60:
            raise InvalidRequest("interval_seconds must be 0.05 to 60", field="interval_seconds")
        while True:
            await context.write(pb.WatchLoadResponse(load=_load(await self._core.load())))
            await asyncio.sleep(interval_s)


def tenant_of(context: Context) -> str:
    """To whom the call's request ids belong. Raises: InvalidRequest."""
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            if not isinstance(value, str) or len(value) > MAX_TENANT_CHARS:
                raise InvalidRequest(f"{TENANT_KEY} has more than {MAX_TENANT_CHARS} characters", field=TENANT_KEY)
            return value
    return ""


def guarded(kind: type[M], method: Method) -> Callable[[bytes, Context], Awaitable[Message | None]]:
    """The method behind parsing and the error table: a DuetError is its status, anything else INTERNAL."""

    async def handle(payload: bytes, context: Context) -> Message | None:
        try:
            return await method(validation.parse(kind, payload), context)
        except DuetError as error:
            failure = error
        except grpc.aio.BaseError:  # a write found the client gone before its cancellation was heard
            raise
        except Exception as error:
            failure = logged_internal_error(error)
        await abort(context, failure)

    return handle


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _load(load: ipc.Load) -> pb.Load:
    return pb.Load(**{name: getattr(load, name) for name in load.__struct_fields__})
