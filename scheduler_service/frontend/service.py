"""The RPCs of duet.inference.v1.InferenceService."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import __version__, ipc
from scheduler_service.errors import (
    DeadlineExceeded,
    DuetError,
    ExecutorUnavailable,
    InvalidRequest,
    UnknownRequest,
    logged_internal_error,
)
from scheduler_service.frontend import validation
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.detokenizer import Detokenizer
from scheduler_service.frontend.status import abort
from scheduler_service.frontend.streams import TokenStream
from scheduler_service.frontend.tokenizer import ModelTokenizer

Context = grpc.aio.ServicerContext
M = TypeVar("M", bound=Message)
Method = Callable[[Any, Context], Awaitable[Message | None]]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_LONG_REQUEST_BYTES = 4096  # beyond this, tokenizing would hold up the other streams


class InferenceService:
    """Turns RPCs into messages for the core and the core's news into responses."""

    def __init__(self, core: CoreClient, tokenizer: ModelTokenizer, *, max_pause_s: float) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._max_pause_s = max_pause_s
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

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
        """Validate, submit, and stream until the end or until the client leaves. Raises: DuetError."""
        arrival = time.monotonic()
        validation.check_fields(request, self._tokenizer.name)
        model = await self._wait_for_model(context)
        token_ids = await self._encode_prompt(request, model)
        stream = self._core.open_stream()
        try:
            submit = validation.build_submit(
                request,
                token_ids,
                stream=stream.number,
                eos_token_ids=self._tokenizer.eos_token_ids,
                vocab_size=model.vocab_size,
                arrival=arrival,
                time_remaining_s=context.time_remaining(),
            )
            await self._core.send(submit)
            skip = request.output.skip_special_tokens if request.output.HasField("skip_special_tokens") else True
            await _Continuation(context, submit, self._tokenizer.detokenizer(skip_special_tokens=skip)).follow(stream)
        finally:
            self._core.close_stream(stream)

    async def cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Raises: UnknownRequest, InvalidRequest."""
        if not request.request_id:
            raise InvalidRequest("request_id is required", field="request_id")
        if not await self._core.cancel(request.request_id):
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
            eos_token_ids=validation.within_vocabulary(self._tokenizer.eos_token_ids, model.vocab_size),
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
        )

    async def watch_load(self, request: pb.WatchLoadRequest, context: Context) -> None:
        """Stream the load until the client leaves. Raises: InvalidRequest, ExecutorUnavailable."""
        interval_s = request.interval_seconds if request.HasField("interval_seconds") else 1.0
        if not 0.05 <= interval_s <= 60:
            raise InvalidRequest("interval_seconds must be 0.05 to 60", field="interval_seconds")
        while True:
            await context.write(pb.WatchLoadResponse(load=_load(await self._core.load())))
            await asyncio.sleep(interval_s)

    async def _wait_for_model(self, context: Context) -> ipc.ModelInfo:
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s >= self._max_pause_s:
            return await self._core.wait_for_model(self._max_pause_s)
        try:
            return await self._core.wait_for_model(remaining_s)
        except ExecutorUnavailable as error:
            raise DeadlineExceeded("the deadline passed before an executor had connected") from error

    async def _encode_prompt(self, request: pb.GenerateRequest, model: ipc.ModelInfo) -> list[int]:
        if request.ByteSize() <= _LONG_REQUEST_BYTES:
            return validation.encode_prompt(request, self._tokenizer, model)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, validation.encode_prompt, request, self._tokenizer, model)


class _Continuation:
    """Writes one request's responses. The first event is `started`, the last `finished`."""

    def __init__(self, context: Context, submit: ipc.Submit, detokenizer: Detokenizer) -> None:
        self._context = context
        self._submit = submit
        self._stop_token_ids = frozenset(submit.stop_token_ids)
        self._detokenizer = detokenizer
        self._offset = 0  # tokens written

    async def follow(self, stream: TokenStream) -> None:
        """Write the stream's news until its end. Raises: DuetError where the core ended it with one."""
        while True:
            news = await stream.take()
            if news.started is not None:
                await self._context.write(pb.GenerateResponse(started=self._started(news.started)))
            token_ids, text = self._detokenize(news.token_ids, is_last=news.end is not None)
            if token_ids:
                await self._context.write(self._delta(token_ids, text))
            if isinstance(news.end, DuetError):
                raise news.end
            if news.end is not None:
                await self._context.write(pb.GenerateResponse(finished=_finished(news.end)))
                return

    def _detokenize(self, token_ids: list[int], *, is_last: bool) -> tuple[list[int], str]:
        """What may be sent now. A stop token is the last one: it goes out with all that was held back, unspoken."""
        stop = token_ids[-1:] if token_ids and token_ids[-1] in self._stop_token_ids else []
        released, text = self._detokenizer.push(token_ids[: len(token_ids) - len(stop)])
        if is_last or stop:
            rest, rest_text = self._detokenizer.flush()
            released, text = released + rest + stop, text + rest_text
        return released, text

    def _delta(self, token_ids: list[int], text: str) -> pb.GenerateResponse:
        response = pb.GenerateResponse()  # filled in place, at less than half the cost of nested constructors
        delta = response.delta
        delta.index = 0
        delta.offset = self._offset
        delta.token_ids.extend(token_ids)
        delta.text = text
        self._offset += len(token_ids)
        return response

    def _started(self, started: ipc.Started) -> pb.Started:
        return pb.Started(
            request_id=self._submit.request_id,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            queue_time_ns=started.queue_time_ns,
            seed=self._submit.sampling.seed,
        )


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


def _finished(finished: ipc.Finished) -> pb.Finished:
    return pb.Finished(
        index=0,
        reason=pb.FinishReason.Name(finished.reason),
        stop_token_id=finished.stop_token_id,
        usage=pb.Usage(
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            output_tokens=finished.output_tokens,
            preemptions=finished.preemptions,
            recoveries=finished.recoveries,
        ),
    )
