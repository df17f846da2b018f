"""A small InferenceService for tests of the client: it counts up from the prompt's checksum. And an AdminService.

`python -m tests.unit.fake_inference --listen HOST:PORT` serves it alone.
"""

import argparse
import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from protos.duet.admin.v1 import admin_pb2
from protos.duet.admin.v1.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

Context = grpc.aio.ServicerContext
Script = Callable[[pb.GenerateRequest, Context], AsyncIterator[pb.GenerateResponse]]


def prompt_tokens(request: pb.GenerateRequest) -> list[int]:
    """The prompt as token ids: a text's bytes, a conversation's joined texts' bytes."""
    if request.HasField("token_ids"):
        return list(request.token_ids.ids)
    text = request.text if request.HasField("text") else "".join(one.content for one in request.chat.messages)
    return list(text.encode())


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + index) % 1000 for index in range(count)]


def started(request: pb.GenerateRequest) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=request.request_id or "drawn",
            prompt_tokens=len(prompt_tokens(request)),
            cached_tokens=1,
            seed=request.sampling.seed,
        )
    )


def delta(offset: int, token_ids: list[int], index: int = 0) -> pb.GenerateResponse:
    text = "".join(f"<{token}>" for token in token_ids)
    return pb.GenerateResponse(delta=pb.TokenDelta(index=index, offset=offset, token_ids=token_ids, text=text))


def finished(request: pb.GenerateRequest, output_tokens: int, index: int = 0) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_tokens=len(prompt_tokens(request)), cached_tokens=1, output_tokens=output_tokens)
    return pb.GenerateResponse(finished=pb.Finished(index=index, reason=pb.FINISH_REASON_LENGTH, usage=usage))


async def count_up(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
    """Two tokens a message, from the one on that is resumed at; longer continuations end later."""
    yield started(request)
    count = request.stop.max_tokens
    tokens = expected_tokens(prompt_tokens(request), count)
    for offset in range(request.resume_offset, count, 2):
        await asyncio.sleep(0.002)
        yield delta(offset, tokens[offset : offset + 2])
    yield finished(request, count)


async def never_end(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
    yield started(request)
    for offset in itertools.count():
        yield delta(offset, [7])
        await asyncio.sleep(0.01)


def replay(*responses: pb.GenerateResponse) -> Script:
    """A script that says this, whatever is asked."""

    async def script(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        for response in responses:
            yield response

    return script


def fail(code: grpc.StatusCode, message: str, *details: Message) -> Script:
    """A script that ends with this status."""

    async def script(request: pb.GenerateRequest, context: Context) -> AsyncIterator[Any]:
        await abort(context, code, message, *details)
        yield

    return script


async def abort(context: Context, code: grpc.StatusCode, message: str, *details: Message) -> None:
    packed = []
    for detail in details:
        packed.append(PackedAny())
        packed[-1].Pack(detail)
    status = rpc_status.to_status(Status(code=code.value[0], message=message, details=packed))
    await context.abort(code, message, status.trailing_metadata)


class FakeInference(InferenceServiceServicer):
    """The service; `script` decides what Generate says, and what clients did is kept."""

    def __init__(self) -> None:
        self.script: Script = count_up
        self.ready = True
        self.draining = False
        self.requests: list[pb.GenerateRequest] = []
        self.cancel_calls: list[str] = []
        self.cut_calls = threading.Semaphore(0)  # released for each stream that its client closed
        self.running = 0
        self.most_running = 0
        self.num_loads = 2  # messages of WatchLoad before the server ends it

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for response in self.script(request, context):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cut_calls.release()
            raise
        finally:
            self.running -= 1

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self.cancel_calls.append(request.request_id)
        if request.request_id == "unknown":
            await abort(context, grpc.StatusCode.NOT_FOUND, "no such request is alive")
        return pb.CancelResponse()

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(name="fake", vocab_size=1000, eos_token_ids=[2], max_model_len=4096)

    async def GetServer(self, request: pb.GetServerRequest, context: Context) -> pb.GetServerResponse:
        return pb.GetServerResponse(
            version="0", ready=self.ready, queue_order="fcfs", load=load(1), draining=self.draining
        )

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Context) -> AsyncIterator[Any]:
        for second in range(1, self.num_loads + 1):
            yield pb.WatchLoadResponse(load=load(second))


class FakeAdmin(AdminServiceServicer):
    """Drains at once; what it was asked, and with what secret, is kept."""

    def __init__(self, service: FakeInference) -> None:
        self.calls: list[tuple[Message, str | None]] = []
        self.refusal: str | None = None
        self.stays_drained = True
        self.never_ends = False
        self._service = service

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        await self._keep(request, context)
        self._service.draining = self.stays_drained
        if self.never_ends:
            await asyncio.Event().wait()
        return admin_pb2.DrainResponse(finished_requests=5, cut_requests=2)

    async def CancelDrain(self, request: admin_pb2.CancelDrainRequest, context: Context) -> Any:
        await self._keep(request, context)
        self._service.draining = False
        return admin_pb2.CancelDrainResponse()

    async def _keep(self, request: Message, context: Context) -> None:
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        self.calls.append((request, metadata.get("authorization")))
        if self.refusal is not None:
            await abort(context, grpc.StatusCode.PERMISSION_DENIED, self.refusal)


def load(second: int) -> pb.Load:
    """A load that computes ten prompt tokens for each output token, ever faster, a quarter of its prompts cached."""
    return pb.Load(
        running_requests=3,
        max_running_requests=64,
        used_blocks=10,
        cached_blocks=20,
        total_blocks=100,
        block_size=64,
        prompt_tokens_total=1000,
        cached_tokens_total=250,
        prefill_tokens_total=100 * second**2,
        output_tokens_total=10 * second**2,
        uptime_seconds=second,
    )


async def start(service: FakeInference, admin: FakeAdmin, address: str) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(service, server)
    add_AdminServiceServicer_to_server(admin, server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


class ServerThread:
    """A FakeInference on a port (0: a free one), in a thread with a loop of its own, for clients that block."""

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self.service = FakeInference()
        self._address: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self.address = self._address.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.admin = FakeAdmin(self.service)
        server, port = await start(self.service, self.admin, f"127.0.0.1:{self._port}")
        self._address.set_result(f"127.0.0.1:{port}")
        await self._stop.wait()
        await server.stop(0)


def main() -> None:
    """Serve until killed, readiness told to a supervisor as the real services do."""
    from servicekit.lifeline import bind_to_parent, notify_ready

    bind_to_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    args, _ = parser.parse_known_args()

    async def serve() -> None:
        service = FakeInference()
        server, _ = await start(service, FakeAdmin(service), args.listen)
        notify_ready()
        await server.wait_for_termination()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
