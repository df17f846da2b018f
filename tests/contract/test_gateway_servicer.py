"""vllm.grpc.engine.VllmEngine as the gateway calls it, over a generator and a core that the test plays."""

import asyncio
import hashlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import errors, ipc
from scheduler_service.errors import DuetError
from scheduler_service.frontend import kv_subscription
from scheduler_service.frontend.kv_subscription import KvSubscription
from scheduler_service.frontend.tokenizer import load_model_tokenizer
from scheduler_service.gateway import vllm_engine
from scheduler_service.gateway.about import ModelFiles
from scheduler_service.gateway.service import SERVICE_NAME
from scheduler_service.kv_messages import KvCleared, KvEvents, KvRemoved, KvStored
from tests.small_model import EOS, write_model

ROOT = Path(__file__).parents[2]
MODEL = ipc.ModelInfo("LlamaForCausalLM", "float32", "cpu", "c0ffee", 400, max_model_len=3_000, max_cache_tokens=2_000)
LOAD = ipc.Load(
    waiting_requests=1,
    running_requests=2,
    max_running_requests=16,
    used_blocks=25,
    cached_blocks=3,
    total_blocks=100,
    block_size=16,
    prompt_tokens_total=40,
    cached_tokens_total=10,
    prefill_tokens_total=30,
    output_tokens_total=50,
    finished_requests_total=6,
    preemptions_total=0,
    steps_total=70,
    uptime_seconds=8.0,
    detached_requests=0,
    quarantined_requests=0,
    idle_checks_total=0,
    idle_check_failures_total=0,
    executor_losses_total=0,
)


class FakeCore:
    """What the servicer knows of the core."""

    def __init__(self) -> None:
        self.status: ipc.EngineStatus | None = ipc.EngineStatus(True, 1, "fcfs", MODEL)
        self.cancelled: list[str] = []
        self.now = LOAD
        self.subscriptions: list[KvSubscription] = []
        self.unsubscribed = asyncio.Event()

    async def wait_for_model(self, timeout_s: float) -> ipc.ModelInfo:
        if self.status is None or self.status.model is None:
            raise errors.ExecutorUnavailable("no executor has connected yet")
        return self.status.model

    async def load(self) -> ipc.Load:
        return self.now

    async def cancel(self, tenant: str, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return False

    def subscribe_kv(self) -> KvSubscription:
        self.subscriptions.append(KvSubscription(len(self.subscriptions)))
        return self.subscriptions[-1]

    def unsubscribe_kv(self, subscription: KvSubscription) -> None:
        self.subscriptions.remove(subscription)
        self.unsubscribed.set()


class FakeGenerator:
    """Yields two tokens and an end, or raises, or goes on until it is closed."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.failure: Exception | None = None
        self.goes_on = False
        self.is_draining = False
        self.begun, self.closed = asyncio.Event(), asyncio.Event()

    async def events(
        self, request: pb.GenerateRequest, *, time_remaining_s: float | None
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.begun.set()
        try:
            if self.failure is not None:
                raise self.failure
            yield pb.GenerateResponse(started=pb.Started(prompt_tokens=3, cached_tokens=1))
            yield pb.GenerateResponse(delta=pb.TokenDelta(token_ids=[5, 6]))
            while self.goes_on:
                await asyncio.sleep(0.01)
                yield pb.GenerateResponse(delta=pb.TokenDelta(token_ids=[5]))
            usage = pb.Usage(prompt_tokens=3, cached_tokens=1, output_tokens=2)
            yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP, usage=usage))
        finally:
            self.closed.set()


class World:
    def __init__(self, directory: Path, channel: grpc.aio.Channel, core: FakeCore, generator: FakeGenerator) -> None:
        self.directory = directory
        self.channel = channel
        self.core = core
        self.generator = generator
        self.stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)

    def generate(self, *, stream: bool = True, **params: Any) -> Any:
        tokenized = vllm.TokenizedInput(input_ids=[7, 8, 9])
        sampling = vllm.SamplingParams(**params)
        return self.stub.Generate(
            vllm.GenerateRequest(request_id="r-1", tokenized=tokenized, stream=stream, sampling_params=sampling)
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    directory = write_model(tmp_path / "tiny")
    core, generator = FakeCore(), FakeGenerator()
    tokenizer = load_model_tokenizer(directory, None)
    engine = vllm_engine(core, generator, tokenizer, directory)  # pyright: ignore[reportArgumentType]
    assert engine is not None
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((engine.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield World(directory, channel, core, generator)
    await server.stop(None)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    return caught.value


async def rest(call: Any) -> list[Any]:
    """The messages of a stream up to its end."""
    return [message async for message in call]


# --- generation --------------------------------------------------------------------------------------------------


async def test_a_stream_has_chunks_and_one_complete(world: World):
    messages = await rest(world.generate(temperature=0))
    assert [message.WhichOneof("response") for message in messages] == ["chunk", "complete"]
    assert list(messages[0].chunk.token_ids) == [5, 6]
    assert messages[1].complete.finish_reason == "stop"
    (request,) = world.generator.requests
    assert (request.request_id, list(request.token_ids.ids)) == ("r-1", [7, 8, 9])


async def test_an_answer_in_one_piece_is_one_complete(world: World):
    (message,) = await rest(world.generate(stream=False))
    assert list(message.complete.output_ids) == [5, 6]


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_the_call_ends_the_request(world: World, stream: bool):
    world.generator.goes_on = True
    call = world.generate(stream=stream)
    await world.generator.begun.wait()
    if stream:
        await call.read()
    assert not world.generator.closed.is_set()
    call.cancel()
    await asyncio.wait_for(world.generator.closed.wait(), 10)


@pytest.mark.parametrize("kind", DuetError.__subclasses__())
async def test_an_error_keeps_its_status(world: World, kind: type[DuetError]):
    world.generator.failure = kind("it did not work")
    assert (await failure(world.generate())).code() is kind.code


async def test_a_bug_of_ours_is_internal_and_so_not_tried_on_every_server(world: World):
    world.generator.failure = ZeroDivisionError()
    error = await failure(world.generate())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "ZeroDivision" not in (error.details() or "")


async def test_a_parameter_that_we_do_not_have_is_invalid(world: World):
    error = await failure(world.generate(structural_tag="{}"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert world.generator.requests == []


@pytest.mark.parametrize("status", [None, ipc.EngineStatus(False, 1, "fcfs", MODEL)])
async def test_a_new_request_is_sent_elsewhere_while_there_is_no_executor(
    world: World, status: ipc.EngineStatus | None
):
    world.core.status = status
    assert (await failure(world.generate())).code() is grpc.StatusCode.UNAVAILABLE
    assert world.generator.requests == []


async def test_bytes_that_are_no_message_are_invalid(world: World):
    call = world.channel.unary_stream(f"/{SERVICE_NAME}/Generate")(b"\xff")
    assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_abort_cancels_every_id_and_passes_over_those_that_have_ended(world: World):
    await world.stub.Abort(vllm.AbortRequest(request_ids=["a", "b"]))
    assert world.core.cancelled == ["a", "b"]


async def test_other_rpcs_are_unimplemented(world: World):
    for call in (
        world.stub.Embed(vllm.EmbedRequest()),
        world.stub.FlushCache(common.FlushCacheRequest()),
        world.stub.StartProfile(common.StartProfileRequest()),
    ):
        assert (await failure(call)).code() is grpc.StatusCode.UNIMPLEMENTED


# --- what is told of model and server ----------------------------------------------------------------------------


async def test_health_is_that_of_the_executor_session(world: World):
    assert (await world.stub.HealthCheck(vllm.HealthCheckRequest())).healthy
    world.core.status = ipc.EngineStatus(False, 1, "fcfs", MODEL)
    answer = await world.stub.HealthCheck(vllm.HealthCheckRequest())
    assert not answer.healthy
    assert answer.message


async def test_a_server_that_drains_is_not_healthy(world: World):
    world.generator.is_draining = True
    answer = await world.stub.HealthCheck(vllm.HealthCheckRequest())
    assert (answer.healthy, answer.message) == (False, "the server is draining")


async def test_the_model_is_described(world: World):
    info = await world.stub.GetModelInfo(vllm.GetModelInfoRequest())
    assert (info.served_model_name, info.is_generation, info.vocab_size) == ("tiny", True, 400)
    assert info.tokenizer_path == info.model_path == str(world.directory)
    assert list(info.architectures) == ["LlamaForCausalLM"]
    assert list(info.eos_token_ids) == [EOS, 0]
    assert (info.max_context_length, info.max_req_input_len) == (2_000, 1_999)
    assert info.default_sampling_params_json == ""


async def test_the_models_own_sampling_defaults_are_told(tmp_path: Path):
    directory = write_model(tmp_path / "tiny")
    content = {"eos_token_id": EOS, "temperature": 0.6, "top_k": 20, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(content))
    info = ModelFiles(directory).model_info(MODEL, load_model_tokenizer(directory, None))
    assert json.loads(info.default_sampling_params_json) == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize("status", [None, ipc.EngineStatus(False, 0, "fcfs", None)])
async def test_a_server_does_not_register_before_its_first_executor(world: World, status: ipc.EngineStatus | None):
    world.core.status = status
    for call in (
        world.stub.HealthCheck(vllm.HealthCheckRequest()),
        world.stub.GetModelInfo(vllm.GetModelInfoRequest()),
        world.stub.GetServerInfo(vllm.GetServerInfoRequest()),
    ):
        assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_the_server_is_described(world: World):
    info = await world.stub.GetServerInfo(vllm.GetServerInfoRequest())
    assert (info.block_size, info.max_num_seqs, info.data_parallel_size) == (16, 16, 1)
    assert (info.active_requests, info.uptime_seconds, info.server_type) == (3, 8.0, "vllm-grpc")
    assert info.constrained_decoding_start == "first_token"


async def test_the_load_is_told_and_its_rate_is_of_the_time_since_the_last_report(world: World):
    (load,) = (await world.stub.GetLoads(vllm.GetLoadsRequest())).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 1, 3)
    assert (load.num_used_tokens, load.max_total_num_tokens, load.max_running_requests) == (400, 1600, 16)
    assert (load.token_usage, load.cache_hit_rate, load.gen_throughput) == (0.25, 0.25, 0.0)
    world.core.now = ipc.Load(**(as_dict(LOAD) | {"uptime_seconds": 10.0, "output_tokens_total": 90}))
    (load,) = (await world.stub.GetLoads(vllm.GetLoadsRequest())).loads
    assert load.gen_throughput == 20.0


async def test_prompts_that_have_not_begun_are_told_as_work_ahead(world: World, monkeypatch: pytest.MonkeyPatch):
    begun = asyncio.Event()

    async def events(request: pb.GenerateRequest, *, time_remaining_s: float | None):
        await begun.wait()
        yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))

    monkeypatch.setattr(world.generator, "events", events)
    call = world.generate()
    waiting = 0
    while not waiting:
        (load,) = (await world.stub.GetLoads(vllm.GetLoadsRequest())).loads
        waiting = load.num_waiting_uncached_tokens
    assert waiting == 2  # of three tokens, at a hit rate of a quarter
    begun.set()
    await rest(call)
    (load,) = (await world.stub.GetLoads(vllm.GetLoadsRequest())).loads
    assert load.num_waiting_uncached_tokens == 0


def as_dict(load: ipc.Load) -> dict[str, Any]:
    return {name: getattr(load, name) for name in load.__struct_fields__}


async def test_the_tokenizers_files_come_as_an_archive_in_chunks(world: World):
    noise = np.random.default_rng(0).bytes(200_000)  # cannot be compressed
    (world.directory / "vocab.json").write_bytes(noise)
    (world.directory / "chat_template.jinja").write_text("{{ messages }}")
    (world.directory / "model.safetensors").write_bytes(b"weights")
    chunks = await rest(world.stub.GetTokenizer(common.GetTokenizerRequest()))
    assert len(chunks) > 3
    assert all(0 < len(chunk.data) <= 64 << 10 for chunk in chunks)
    content = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
    assert chunks[-1].sha256 == hashlib.sha256(content).hexdigest()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert set(archive.namelist()) == {
            *("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"),
            *("vocab.json", "chat_template.jinja"),
        }
        assert archive.read("vocab.json") == noise


# --- cache events ------------------------------------------------------------------------------------------------


async def test_a_subscription_is_a_snapshot_and_then_changes_with_rising_numbers(world: World):
    call = world.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
    await call.initial_metadata()
    (subscription,) = world.core.subscriptions
    tokens = np.arange(8, dtype="<i4").tobytes()
    subscription.push(KvEvents(0, [KvCleared(), KvStored([1, -2], None, tokens, 4)], snapshot_parts=2))
    subscription.push(KvEvents(0, [KvStored([3], -2, tokens[:16], 4)], snapshot_parts=2))
    subscription.push(KvEvents(0, [KvRemoved([3, -2])]))
    batches = [await call.read() for _ in range(3)]
    assert [batch.sequence_number for batch in batches] == [1, 2, 3]
    assert [(batch.snapshot.index, batch.snapshot.count) for batch in batches[:2]] == [(0, 2), (1, 2)]
    assert not batches[2].HasField("snapshot")
    kinds = [event.WhichOneof("data") for batch in batches for event in batch.events]
    assert kinds == ["cleared", "stored", "stored", "removed"]
    stored = batches[0].events[1].stored
    assert not stored.HasField("parent_block_hash")
    assert [(one.block_hash, list(one.token_ids), one.block_size) for one in stored.blocks] == [
        (1, [0, 1, 2, 3], 4),
        (-2, [4, 5, 6, 7], 4),
    ]
    assert batches[1].events[0].stored.parent_block_hash == -2
    assert list(batches[2].events[0].removed.block_hashes) == [3, -2]
    ids = [event.event_id for batch in batches for event in batch.events]
    assert ids == sorted(set(ids))
    assert not world.core.unsubscribed.is_set()
    call.cancel()
    await asyncio.wait_for(world.core.unsubscribed.wait(), 10)


async def test_a_subscriber_who_wants_to_resume_is_told_to_begin_anew(world: World):
    error = await failure(world.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(start_sequence_number=4)))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert world.core.subscriptions == []


async def test_a_subscription_whose_core_died_ends_with_data_loss(world: World):
    call = world.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
    await call.initial_metadata()
    world.core.subscriptions[0].end()
    assert (await failure(call)).code() is grpc.StatusCode.DATA_LOSS
    assert world.core.subscriptions == []


async def test_a_subscriber_who_does_not_read_loses_the_subscription(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_subscription, "MAX_UNSENT_MESSAGES", 2)
    subscription = KvSubscription(0)
    for _ in range(2):
        subscription.push(KvEvents(0, []))
    assert await subscription.take() is not None
    subscription.push(KvEvents(0, []))
    subscription.push(KvEvents(0, []))
    assert await subscription.take() is None


# --- without the extra -------------------------------------------------------------------------------------------


def test_without_the_stubs_the_servicer_is_not_there_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        nothing: Any = None
        assert vllm_engine(nothing, nothing, nothing, Path()) is None
    assert "smg-grpc-proto is not installed" in caplog.text


def test_the_front_end_can_be_imported_without_the_stubs():
    program = "import sys; sys.modules['smg_grpc_proto'] = None; import scheduler_service.frontend.server"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
