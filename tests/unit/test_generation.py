"""The generator of events without gRPC: what happens between two of them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import ExecutorUnavailable
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.streams import TokenStream
from scheduler_service.frontend.tokenizer import load_model_tokenizer
from tests.small_model import byte_level_bpe, write_model

MODEL = ipc.ModelInfo("LlamaForCausalLM", "float32", "cpu", "00", 400, max_model_len=64, max_cache_tokens=256)
WORDS = byte_level_bpe().encode("The quick brown fox").ids


class Core:
    """Stands in for CoreClient, and keeps what it is told."""

    def __init__(self) -> None:
        self.streams: list[TokenStream] = []
        self.was_told = asyncio.Event()
        self.stopped: list[int] = []
        self.closed: list[int] = []
        self.detached: list[int] = []
        self.status = ipc.EngineStatus(True, 1, "fcfs", MODEL)

    async def wait_for_model(self, timeout_s: float) -> ipc.ModelInfo:
        return MODEL

    def new_streams(self, count: int, news: asyncio.Event) -> list[TokenStream]:
        self.streams = [TokenStream(number, news) for number in range(count)]
        return self.streams

    async def submit(self, submit: ipc.Submit, streams: list[TokenStream], model: ipc.ModelInfo) -> None:
        self.was_told.set()

    def stop_stream(self, stream: TokenStream) -> None:
        self.stopped.append(stream.number)

    def close_streams(self, streams: list[TokenStream], *, detach: bool) -> None:
        (self.detached if detach else self.closed).extend(stream.number for stream in streams)


@pytest.fixture
async def core() -> Core:
    return Core()


@pytest.fixture
def generator(core: Core, tmp_path: Path) -> Generator:
    tokenizer = load_model_tokenizer(write_model(tmp_path / "tiny"), None)
    return Generator(cast(CoreClient, core), tokenizer, max_pause_s=1)


async def begin(
    generator: Generator, core: Core, **fields: Any
) -> tuple[AsyncGenerator[pb.GenerateResponse, None], "asyncio.Future[pb.GenerateResponse]"]:
    """A generator that waits for its first event, which is the future's result."""
    events = generator.events(pb.GenerateRequest(text="the fox", **fields), time_remaining_s=None)
    first = asyncio.ensure_future(anext(events))
    await core.was_told.wait()
    return events, first


def end(stream: TokenStream) -> None:
    stream.finish(ipc.Finished(stream.number, pb.FINISH_REASON_LENGTH, None, 2, 0, len(WORDS), 0, 0))


async def test_what_comes_with_the_end_while_an_event_is_being_written_is_not_lost(
    generator: Generator, core: Core
) -> None:
    events, first = await begin(generator, core)
    core.streams[0].push(WORDS[0])
    assert list((await first).delta.token_ids) == WORDS[:1]
    for token_id in WORDS[1:]:
        core.streams[0].push(token_id)
    end(core.streams[0])
    rest = [event async for event in events]
    assert [event.WhichOneof("event") for event in rest] == ["delta", "finished"]
    assert list(rest[0].delta.token_ids) == WORDS[1:]


async def test_every_choice_waits_in_its_own_delta_while_one_is_being_written(generator: Generator, core: Core) -> None:
    events, first = await begin(generator, core, sampling=pb.SamplingParams(n=3))
    for stream in core.streams:
        stream.push(WORDS[0])
    assert (await first).delta.index == 0
    for stream in core.streams:
        for token_id in WORDS[1:]:
            stream.push(token_id)
        end(stream)
    rest = [event async for event in events]
    tokens = {index: [] for index in range(3)}
    for event in rest:
        tokens[event.delta.index if event.HasField("delta") else event.finished.index] += event.delta.token_ids
    assert tokens == {0: WORDS[1:], 1: WORDS, 2: WORDS}
    assert len(rest) == 6


async def test_closing_the_generator_closes_every_stream(generator: Generator, core: Core) -> None:
    events, first = await begin(generator, core, sampling=pb.SamplingParams(n=2))
    core.streams[1].push(WORDS[0])
    await first
    await events.aclose()
    assert core.closed == [0, 1]


async def test_closing_the_generator_of_a_request_with_detach_seconds_leaves_its_streams_to_the_next_client(
    generator: Generator, core: Core
) -> None:
    events, first = await begin(generator, core, request_id="mine", detach_seconds=5)
    core.streams[0].push(WORDS[0])
    await first
    await events.aclose()
    assert (core.closed, core.detached) == ([], [0])


async def test_a_caller_that_is_cancelled_while_it_waits_closes_every_stream(generator: Generator, core: Core) -> None:
    _, first = await begin(generator, core)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert core.closed == [0]


async def test_streams_are_closed_where_the_core_cannot_be_told(
    generator: Generator, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object) -> None:
        raise ExecutorUnavailable("gone")

    monkeypatch.setattr(core, "submit", lost)
    with pytest.raises(ExecutorUnavailable):
        await anext(generator.events(pb.GenerateRequest(text="the fox"), time_remaining_s=None))
    assert core.closed == [0]


async def test_the_core_is_told_of_a_stop_string_once(generator: Generator, core: Core) -> None:
    events, first = await begin(generator, core, stop=pb.StopConditions(stop_strings=["quick"]))
    for token_id in WORDS:
        core.streams[0].push(token_id)
    assert (await first).delta.text == "The "
    assert core.stopped == [0]
    following = asyncio.ensure_future(anext(events))
    for token_id in WORDS:
        core.streams[0].push(token_id)
        await asyncio.sleep(0)
    end(core.streams[0])
    assert (await following).finished.stop_string == "quick"
    assert core.stopped == [0]
