"""The front end between real gRPC clients and a fake core that speaks ipc.py."""

import asyncio
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1 import inference_pb2_grpc
from scheduler_service import errors, ipc
from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend import service, validation
from scheduler_service.frontend.address import PortUnavailable
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.server import FrontendServer
from scheduler_service.frontend.service import SERVICE_NAME
from scheduler_service.frontend.tokenizer import load_model_tokenizer
from tests.small_model import EOS, byte_level_bpe, write_model

MODEL = ipc.ModelInfo(
    "LlamaForCausalLM", "float32", "cpu", "c0ffee", 400, max_model_len=30_000, max_cache_tokens=50_000
)
READY = ipc.EngineStatus(ready=True, epoch=3, queue_order="fcfs", model=MODEL)
LOAD = ipc.Load(*range(1, 15), uptime_seconds=2.5)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
WORDS = byte_level_bpe().encode("The quick brown fox jumps over the lazy dog.").ids


class FakeCore:
    """Hears what the front end says, and says what the test tells it to."""

    def __init__(self, path: str, status: ipc.EngineStatus) -> None:
        self.path = path
        self.status = status
        self.heard: asyncio.Queue[ipc.FrontendMessage] = asyncio.Queue()
        self.alive: set[str] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.close()
        await self._server.wait_closed()
        Path(self.path).unlink(missing_ok=True)  # noqa: ASYNC240 - a test may block

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.say(self.status)
        decoder: msgspec.msgpack.Decoder[ipc.FrontendMessage] = msgspec.msgpack.Decoder(ipc.FrontendMessage)
        while (message := await ipc.read_frame(reader, decoder)) is not None:
            match message:
                case ipc.LoadQuery():
                    self.say(ipc.LoadReply(message.call, LOAD))
                case ipc.Cancel():
                    self.say(ipc.CancelReply(message.call, message.request_id in self.alive))
                case _:
                    self.heard.put_nowait(message)
        writer.close()

    def say(self, message: ipc.CoreMessage) -> None:
        assert self._writer is not None
        self._writer.write(ipc.encode_frame(message))

    def set_status(self, status: ipc.EngineStatus) -> None:
        self.status = status
        self.say(status)

    async def hear(self, kind: type[Any]) -> Any:
        message = await asyncio.wait_for(self.heard.get(), 10)
        assert isinstance(message, kind)
        return message

    def outputs(self, stream: int, token_ids: Sequence[int] = (), **news: Any) -> None:
        column = np.full(len(token_ids), stream, "<i4").tobytes()
        self.say(ipc.Outputs(column, np.array(token_ids, "<i4").tobytes(), **news))

    def start_stream(self, submit: ipc.Submit) -> None:
        num_prompt_tokens = len(submit.token_ids) // 4
        self.outputs(submit.stream, started=[ipc.Started(submit.stream, num_prompt_tokens, 1, 99)])

    def finish(self, submit: ipc.Submit, reason: int, token_ids: Sequence[int] = (), stop: int | None = None) -> None:
        self.outputs(submit.stream, token_ids, finished=[ipc.Finished(submit.stream, reason, stop, 2, 1, 5, 6, 7)])


@dataclasses.dataclass
class World:
    core: FakeCore
    frontend: FrontendServer
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)


@contextlib.asynccontextmanager
async def make_world(
    directory: Path, status: ipc.EngineStatus = READY, max_pause_s: float = 10.0
) -> AsyncIterator[World]:
    core = FakeCore(str(directory / "core.sock"), status)
    await core.start()
    model = write_model(directory / "tiny")
    config = SchedulerConfig(model=str(model), listen="127.0.0.1:0", core_socket=core.path, max_pause_s=max_pause_s)
    frontend = FrontendServer(config)
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(frontend.run(stop, ready.set))
    await asyncio.wait_for(ready.wait(), 10)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{frontend.port}", options=options) as channel:
            yield World(core, frontend, channel)
    finally:
        stop.set()
        await asyncio.wait_for(running, 10)
        await core.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with make_world(tmp_path) as world:
        yield world


def health_stub(world: World) -> Any:
    """The generated stubs are typed for the synchronous channel, or not at all."""
    return health_pb2_grpc.HealthStub(world.channel)


def events_of(responses: Sequence[pb.GenerateResponse]) -> list[str | None]:
    return [response.WhichOneof("event") for response in responses]


def joined(responses: Sequence[pb.GenerateResponse]) -> tuple[list[int], str]:
    deltas = [response.delta for response in responses if response.HasField("delta")]
    return [token_id for delta in deltas for token_id in delta.token_ids], "".join(delta.text for delta in deltas)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    return caught.value


async def rest(call: Any) -> list[Any]:
    """The responses of a stream up to its end."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details by message name."""
    kinds = {f"google.rpc.{name}": kind for name, kind in vars(error_details_pb2).items()}
    encoded = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(encoded, bytes)
    status = status_pb2.Status.FromString(encoded)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for packed in status.details:
        kind = kinds[packed.TypeName()]
        message = kind()
        packed.Unpack(message)
        found[kind.DESCRIPTOR.name] = message
    return found


def fields_at_fault(error: grpc.aio.AioRpcError) -> list[str]:
    return [violation.field for violation in details(error)["BadRequest"].field_violations]


# --- streaming ---------------------------------------------------------------------------------------------------


async def test_a_request_streams_started_deltas_and_finished(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", sampling=pb.SamplingParams(seed=11)))
    submit = await world.core.hear(ipc.Submit)
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == byte_level_bpe().encode("the fox").ids
    world.core.start_stream(submit)
    responses = [await call.read()]
    for token_id in WORDS:
        world.core.outputs(submit.stream, [token_id])
        responses.append(await call.read())
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    responses += await rest(call)
    assert events_of(responses) == ["started", *["delta"] * len(WORDS), "finished"]
    started = responses[0].started
    assert (started.request_id, started.seed) == (submit.request_id, 11)
    assert (started.cached_tokens, started.queue_time_ns) == (1, 99)
    assert joined(responses) == (WORDS, "The quick brown fox jumps over the lazy dog.")
    assert [response.delta.offset for response in responses[1:-1]] == list(range(len(WORDS)))
    finished = responses[-1].finished
    assert (finished.reason, finished.HasField("stop_token_id")) == (pb.FINISH_REASON_LENGTH, False)
    assert finished.usage == pb.Usage(prompt_tokens=2, cached_tokens=1, output_tokens=5, preemptions=6, recoveries=7)


@pytest.mark.parametrize("skip", [True, False])
async def test_a_stop_token_is_counted_and_not_spoken(world: World, skip: bool) -> None:
    output = pb.OutputOptions(skip_special_tokens=skip)
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", output=output))
    submit = await world.core.hear(ipc.Submit)
    assert submit.stop_token_ids == [0, EOS]
    world.core.outputs(submit.stream, [*WORDS, 1, EOS])
    await asyncio.sleep(0.05)  # the end may come in a later frame than the token
    world.core.finish(submit, pb.FINISH_REASON_STOP, stop=EOS)
    responses = await rest(call)
    spoken = byte_level_bpe().decode([*WORDS, 1], skip_special_tokens=skip)
    assert joined(responses) == ([*WORDS, 1, EOS], spoken)
    assert responses[-1].finished.stop_token_id == EOS


async def test_half_a_character_is_held_back_with_its_tokens_until_the_end(world: World) -> None:
    fire = byte_level_bpe().encode("🜁").ids
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.stream, [*WORDS, fire[0]])
    first = await call.read()
    assert list(first.delta.token_ids) == WORDS
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, token_ids=[fire[1]])
    responses = [first] + await rest(call)
    assert events_of(responses) == ["delta", "delta", "finished"]
    assert list(responses[1].delta.token_ids) == fire[:2]
    assert responses[1].delta.offset == len(WORDS)
    assert joined(responses)[1] == byte_level_bpe().decode([*WORDS, *fire[:2]])


async def test_a_client_that_reads_late_gets_its_tokens_coalesced(world: World) -> None:
    num_tokens = 20_000
    token_ids = (WORDS * num_tokens)[:num_tokens]
    slow = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    for token_id in token_ids:
        world.core.outputs(submit.stream, [token_id])
        await asyncio.sleep(0)
    other = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    other_submit = await world.core.hear(ipc.Submit)
    world.core.finish(other_submit, pb.FINISH_REASON_LENGTH, WORDS)
    assert joined(await rest(other))[0] == WORDS  # the slow one holds nobody up
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    responses = await rest(slow)
    assert joined(responses) == (token_ids, byte_level_bpe().decode(token_ids))
    assert len(responses) < num_tokens / 2
    assert max(len(response.delta.token_ids) for response in responses) > num_tokens / 10


async def test_many_streams_get_their_own_tokens(world: World) -> None:
    calls = [world.stub.Generate(pb.GenerateRequest(request_id=f"r{i}", text="the fox")) for i in range(20)]
    submits = [await world.core.hear(ipc.Submit) for _ in calls]
    streams = {int(submit.request_id[1:]): submit.stream for submit in submits}
    for position in range(10):
        world.core.say(
            ipc.Outputs(
                np.array(list(streams.values()), "<i4").tobytes(),
                np.array([WORDS[(i + position) % len(WORDS)] for i in streams], "<i4").tobytes(),
                finished=[ipc.Finished(s, 2, None, 1, 0, 10, 0, 0) for s in streams.values() if position == 9],
            )
        )
    for i, call in enumerate(calls):
        responses = await rest(call)
        assert joined(responses)[0] == [WORDS[(i + position) % len(WORDS)] for position in range(10)]


# --- leaving, deadlines, cancellation ----------------------------------------------------------------------------


async def test_a_client_that_leaves_abandons_its_request(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.stream, WORDS)
    await call.read()
    call.cancel()
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.stream)
    world.core.outputs(submit.stream, WORDS)  # tokens that were under way are nobody's
    world.core.finish(submit, pb.FINISH_REASON_CANCELLED)
    assert (await world.stub.GetServer(pb.GetServerRequest())).ready


async def test_clients_that_leave_in_a_flood_of_tokens_are_no_errors(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
        submit = await world.core.hear(ipc.Submit)
        for _ in range(50):
            world.core.outputs(submit.stream, WORDS)
        await call.read()
        call.cancel()
        for _ in range(50):
            world.core.outputs(submit.stream, WORDS)
        assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.stream)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_stream_that_finished_is_not_abandoned(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert await rest(call)
    await world.stub.GetServer(pb.GetServerRequest())  # goes after an Abandon on the same socket
    assert world.core.heard.empty()


async def test_the_calls_deadline_reaches_the_core(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"), timeout=30)
    submit = await world.core.hear(ipc.Submit)
    assert submit.deadline == pytest.approx(time.monotonic() + 30, abs=5)
    assert submit.arrival == pytest.approx(time.monotonic(), abs=5)
    call.cancel()


async def test_a_call_without_a_deadline_has_none(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    assert (await world.core.hear(ipc.Submit)).deadline is None
    call.cancel()


async def test_a_deadline_that_passes_abandons_the_request(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"), timeout=0.3)
    submit = await world.core.hear(ipc.Submit)
    assert (await failure(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.stream)


async def test_cancel_says_whether_the_request_was_alive(world: World) -> None:
    world.core.alive.add("a")
    assert await world.stub.Cancel(pb.CancelRequest(request_id="a")) == pb.CancelResponse()
    error = await failure(world.stub.Cancel(pb.CancelRequest(request_id="b")))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert details(error)["ErrorInfo"].reason == "UnknownRequest"
    error = await failure(world.stub.Cancel(pb.CancelRequest()))
    assert (error.code(), fields_at_fault(error)) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])


# --- errors ------------------------------------------------------------------------------------------------------

REFUSED = [
    (pb.GenerateRequest(), "prompt", "InvalidRequest"),
    (pb.GenerateRequest(text=""), "text", "InvalidRequest"),
    (pb.GenerateRequest(text="a", model="x" * 100_000), "model", "InvalidRequest"),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1)),
        "sampling.temperature",
        "InvalidRequest",
    ),
    (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(top_p=2)), "sampling.top_p", "InvalidRequest"),
    (pb.GenerateRequest(text="a", stop=pb.StopConditions(max_tokens=0)), "stop.max_tokens", "InvalidRequest"),
    (
        pb.GenerateRequest(text="a", stop=pb.StopConditions(max_tokens=30_000)),
        "stop.max_tokens",
        "ContextLengthExceeded",
    ),
    (pb.GenerateRequest(text="a", resume_offset=1), "resume_offset", "InvalidRequest"),
    (pb.GenerateRequest(text="x" * 10_000_000), "text", "ContextLengthExceeded"),
    (pb.GenerateRequest(text="ab " * 40_000), "text", "ContextLengthExceeded"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[400])), "token_ids.ids[0]", "InvalidRequest"),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])),
        "chat.messages[0].content",
        "InvalidRequest",
    ),
]


@pytest.mark.parametrize(("request_", "field", "reason"), REFUSED, ids=[f"{f}-{r}" for _, f, r in REFUSED])
async def test_bad_requests_name_their_field(
    world: World, request_: pb.GenerateRequest, field: str, reason: str
) -> None:
    error = await failure(world.stub.Generate(request_))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert fields_at_fault(error) == [field]
    assert (details(error)["ErrorInfo"].reason, details(error)["ErrorInfo"].domain) == (reason, "duet")
    assert world.core.heard.empty()


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"\xff\xff\xff", "no duet.inference.v1.GenerateRequest message"),
        (b"\x1a\x02\xff\xfe", "UTF-8"),
        (b"\x1a\x84\x80\x80\x08" + b"x" * (16 << 20), "16777216"),
    ],
    ids=["garbage", "invalid UTF-8", "oversize"],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(world: World, payload: bytes, complaint: str) -> None:
    call = world.channel.unary_stream(f"/{SERVICE_NAME}/Generate")(payload)
    error = await failure(call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in (error.details() or "")
    unary = await failure(world.channel.unary_unary(f"/{SERVICE_NAME}/Cancel")(b"\xff"))
    assert unary.code() == grpc.StatusCode.INVALID_ARGUMENT


def all_errors(kind: type[errors.DuetError] = errors.DuetError) -> list[type[errors.DuetError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors()[1:], ids=lambda kind: kind.__name__)
async def test_every_error_of_the_core_keeps_its_status_and_details(world: World, kind: type[errors.DuetError]) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    failed = ipc.Failed(submit.stream, kind.code.name, kind.__name__, "as it is", "request_id", retry_after_s=1.25)
    world.core.outputs(submit.stream, WORDS, failed=[failed])
    first = await call.read()
    assert list(first.delta.token_ids) == WORDS
    error = await failure(call)
    assert (error.code(), error.details()) == (kind.code, "as it is")
    found = details(error)
    assert found["ErrorInfo"].reason == kind.__name__
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    assert fields_at_fault(error) == ["request_id"]


async def test_a_bug_is_internal_with_an_id_that_is_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(validation, "check_fields", broken)
    error = await failure(world.stub.Generate(pb.GenerateRequest(text="the fox")))
    assert error.code() == grpc.StatusCode.INTERNAL
    found = re.search(r"internal error (\w{12})", error.details() or "")
    assert found is not None
    assert "a secret" not in (error.details() or "")
    record = next(record for record in caplog.records if found[1] in record.getMessage())
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


async def test_an_unknown_error_of_the_core_is_internal_with_an_id_that_is_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.stream, failed=[ipc.Failed(submit.stream, "INTERNAL", "Exception", "a secret")])
    error = await failure(call)
    assert error.code() == grpc.StatusCode.INTERNAL
    found = re.search(r"internal error (\w{12})", error.details() or "")
    assert found is not None
    assert "a secret" in next(text for text in caplog.messages if found[1] in text)


async def test_a_write_that_finds_the_client_gone_is_not_our_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def write(request: pb.CancelRequest, context: Any) -> None:
        raise grpc.aio.InternalError("the batch failed")

    context: Any = None  # nothing is told to a client that has left
    with pytest.raises(grpc.aio.InternalError):
        await service.guarded(pb.CancelRequest, write)(b"", context)
    assert caplog.records == []


# --- the core and the executor come and go -----------------------------------------------------------------------


async def test_streams_fail_when_the_core_dies_and_the_next_core_serves(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    await world.core.stop()
    error = await failure(call)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() > 0
    waiting = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    assert (await failure(world.stub.GetServer(pb.GetServerRequest()))).code() == grpc.StatusCode.UNAVAILABLE
    await world.core.start()
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(waiting)) == ["finished"]


async def test_a_request_waits_for_the_first_executor(tmp_path: Path) -> None:
    async with make_world(tmp_path, ipc.EngineStatus(False, 0, "fcfs", None)) as world:
        call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
        error = await failure(world.stub.GetModel(pb.GetModelRequest()))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        server = await world.stub.GetServer(pb.GetServerRequest())
        assert (server.ready, server.device) == (False, "")
        world.core.set_status(READY)
        world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
        assert events_of(await rest(call)) == ["finished"]


async def test_a_request_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with make_world(tmp_path, ipc.EngineStatus(False, 0, "fcfs", None), max_pause_s=0.05) as world:
        error = await failure(world.stub.Generate(pb.GenerateRequest(text="the fox")))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "ExecutorUnavailable"


@pytest.mark.parametrize(
    ("remaining_s", "max_pause_s", "kind"),
    [
        (0.05, 10.0, errors.DeadlineExceeded),
        (10.0, 0.05, errors.ExecutorUnavailable),
        (None, 0.05, errors.ExecutorUnavailable),
    ],
)
async def test_the_smaller_bound_on_the_wait_for_an_executor_is_the_error(
    tmp_path: Path, remaining_s: float | None, max_pause_s: float, kind: type[errors.DuetError]
) -> None:
    tokenizer = load_model_tokenizer(write_model(tmp_path / "tiny"), None)
    core = CoreClient(str(tmp_path / "nobody.sock"))
    context: Any = SimpleNamespace(time_remaining=lambda: remaining_s)  # over gRPC the client's own clock answers
    with pytest.raises(errors.DuetError) as caught:
        await service.InferenceService(core, tokenizer, max_pause_s=max_pause_s).generate(
            pb.GenerateRequest(text="the fox"), context
        )
    assert type(caught.value) is kind


async def test_an_end_of_sequence_outside_the_vocabulary_reaches_neither_core_nor_client(tmp_path: Path) -> None:
    narrow = msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, vocab_size=EOS))
    async with make_world(tmp_path, narrow) as world:
        assert (await world.stub.GetModel(pb.GetModelRequest())).eos_token_ids == [0]
        call = world.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])))
        assert (await world.core.hear(ipc.Submit)).stop_token_ids == [0]
        call.cancel()


async def test_requests_go_on_while_a_known_executor_is_away(world: World) -> None:
    world.core.set_status(ipc.EngineStatus(False, 3, "fcfs", MODEL))
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    call.cancel()


async def test_health_follows_the_executors_session(world: World) -> None:
    stub = health_stub(world)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE_NAME, "")]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    watches.pop().cancel()  # one watcher that leaves takes no other with it
    world.core.set_status(ipc.EngineStatus(False, 3, "fcfs", MODEL))
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
    for name in ("", SERVICE_NAME):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
    world.core.set_status(READY)
    for watch in watches:
        assert (await watch.read()).status == SERVING
    await world.core.stop()
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
    await world.core.start()


async def test_health_of_an_unknown_service(world: World) -> None:
    stub = health_stub(world)
    error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


# --- description -------------------------------------------------------------------------------------------------


async def test_the_model_is_described(world: World) -> None:
    assert await world.stub.GetModel(pb.GetModelRequest()) == pb.GetModelResponse(
        name="tiny",
        architecture="LlamaForCausalLM",
        max_model_len=30_000,
        vocab_size=400,
        eos_token_ids=[EOS, 0],
        dtype="float32",
        weights_digest="c0ffee",
        has_chat_template=True,
    )


async def test_the_server_and_its_load_are_described(world: World) -> None:
    server = await world.stub.GetServer(pb.GetServerRequest())
    assert (server.version, server.ready, server.epoch, server.device) == ("0.1.0", True, 3, "cpu")
    expected = {name: getattr(LOAD, name) for name in LOAD.__struct_fields__}
    assert {field.name: value for field, value in server.load.ListFields()} == expected
    assert {field.name for field in pb.Load.DESCRIPTOR.fields} == set(expected)


async def test_load_is_watched_at_the_interval_asked_for(world: World) -> None:
    call = world.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=0.05))
    assert [(await call.read()).load.waiting_requests for _ in range(3)] == [1, 1, 1]
    call.cancel()
    for interval_s in (0.0, 61.0, float("nan")):
        error = await failure(world.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=interval_s)))
        assert fields_at_fault(error) == ["interval_seconds"]


async def test_reflection_lists_the_services(world: World) -> None:
    channel: Any = world.channel  # the generated stub is typed for the synchronous one
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert names == {SERVICE_NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:{port}", "Address already in use"),
        ("203.0.113.1:0", "Cannot assign requested address"),
        ("127.0.0.1:http", "not of the form host:port"),
        ("localhost", "not of the form host:port"),
    ],
)
async def test_an_address_that_cannot_be_had_is_one_clear_sentence(
    world: World, tmp_path: Path, address: str, reason: str
) -> None:
    listen = address.format(port=world.frontend.port)
    config = SchedulerConfig(model=str(tmp_path / "tiny"), listen=listen, core_socket=world.core.path)
    with pytest.raises(PortUnavailable, match=f"cannot listen on {listen}: .*{reason}"):
        FrontendServer(config)


async def test_long_text_is_tokenized_while_other_streams_go_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long prompt's tokenizing is held until the short request has been served."""
    import threading

    served = threading.Event()
    encode_prompt = validation.encode_prompt

    def held(request: pb.GenerateRequest, *rest: Any) -> list[int]:
        if len(request.text) > 5000:
            assert served.wait(20)
        return encode_prompt(request, *rest)

    monkeypatch.setattr(validation, "encode_prompt", held)
    long = world.stub.Generate(pb.GenerateRequest(text="the fox " * 1000))
    short = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(short)) == ["finished"]
    served.set()
    assert len((await world.core.hear(ipc.Submit)).token_ids) > 4000
    long.cancel()
