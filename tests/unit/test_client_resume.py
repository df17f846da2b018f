"""Requests with detach_seconds over real connections: streams that break go on, and end where nobody wants them."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details

import duet
from duet import AsyncClient, Client, Output, Retry, SamplingParams
from duet.retry import MAX_BREAKS
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import ENV
from tests.unit.fake_inference import FakeInference, ServerThread, expected_tokens

PARAMS = SamplingParams(max_tokens=8)
UNDISTURBED = expected_tokens(list(b"x"), 8)
INFO = details.ErrorInfo(reason="Why", domain="duet")
NO_DELAY = details.RetryInfo(retry_delay=Duration(nanos=1_000_000))

Break = Callable[[fake.Context], Any]


def breaking(when: int, how: Break, script: fake.Script = fake.count_up, *, times: int = 1) -> fake.Script:
    """Breaks each of the first `times` calls before message `when`, by `how`, which may return to end them silently."""
    count = 0

    async def broken(request: pb.GenerateRequest, context: fake.Context) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal count
        count += 1
        messages = 0
        async for response in script(request, context):
            if count <= times and messages == when:
                await how(context)
                return
            messages += 1
            yield response

    return broken


def status(code: grpc.StatusCode, *more: Message) -> Break:
    async def how(context: fake.Context) -> None:
        await fake.abort(context, code, "broken", *more)

    return how


async def silence(context: fake.Context) -> None:
    """The stream ends as if it were whole."""


BREAKS = {
    "UNAVAILABLE": status(grpc.StatusCode.UNAVAILABLE),
    "the server's own UNAVAILABLE": status(grpc.StatusCode.UNAVAILABLE, INFO),
    "a full queue": status(grpc.StatusCode.RESOURCE_EXHAUSTED, INFO),
    "gRPC's INTERNAL": status(grpc.StatusCode.INTERNAL),
    "gRPC's UNKNOWN": status(grpc.StatusCode.UNKNOWN),
    "no end": silence,
}


async def ask_blocking(address: str, **options: Any) -> Output:
    def generate() -> Output:
        with Client(address) as client:
            return client.generate("x", PARAMS, **options)

    return await asyncio.to_thread(generate)


async def ask_awaiting(address: str, **options: Any) -> Output:
    async with AsyncClient(address) as client:
        return await client.generate("x", PARAMS, **options)


ASK = [ask_blocking, ask_awaiting]


@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("how", BREAKS)
async def test_a_stream_that_breaks_anywhere_goes_on(server: ServerThread, how: str, when: int) -> None:
    """Six messages: started, four deltas, finished."""
    for ask in ASK:
        server.service.script = breaking(when, BREAKS[how])
        server.service.requests.clear()
        output = await ask(server.address, detach_seconds=30)
        assert output.token_ids == UNDISTURBED
        assert output.text == "".join(f"<{token}>" for token in UNDISTURBED)
        first, second = server.service.requests
        assert first.request_id == second.request_id
        assert not first.HasField("resume_offset")
        assert second.resume_offset == 2 * max(0, when - 1)


async def test_a_break_after_the_end_is_none(server: ServerThread) -> None:
    async def script(request: pb.GenerateRequest, context: fake.Context) -> AsyncIterator[pb.GenerateResponse]:
        async for response in fake.count_up(request, context):
            yield response
        await fake.abort(context, grpc.StatusCode.UNAVAILABLE, "broken")

    server.service.script = script
    for ask in ASK:
        assert (await ask(server.address, detach_seconds=30)).token_ids == UNDISTURBED
    assert len(server.service.requests) == len(ASK)


async def test_without_detach_seconds_it_does_not(server: ServerThread) -> None:
    for how in BREAKS.values():
        server.service.script = breaking(2, how, times=1000)
        for ask in ASK:
            with pytest.raises(duet.DuetError):
                await ask(server.address)
    assert len(server.service.requests) == len(BREAKS) * len(ASK)


FINAL = {
    grpc.StatusCode.ABORTED: duet.Superseded,
    grpc.StatusCode.INVALID_ARGUMENT: duet.InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: duet.DuplicateRequest,
    grpc.StatusCode.NOT_FOUND: duet.UnknownRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: duet.DeadlineExceeded,
    grpc.StatusCode.INTERNAL: duet.InternalError,
    grpc.StatusCode.UNKNOWN: duet.InternalError,
}


@pytest.mark.parametrize("code", FINAL, ids=lambda code: code.name)
def test_what_the_server_says_of_the_request_itself_is_final(
    client: Client, service: FakeInference, code: grpc.StatusCode
) -> None:
    service.script = breaking(2, status(code, INFO))
    with pytest.raises(FINAL[code]):
        client.generate("x", PARAMS, detach_seconds=30)
    assert len(service.requests) == 1


async def test_many_choices_are_resumed_each_where_it_was(server: ServerThread) -> None:
    tokens = [[10, 11, 12], [20], [30, 31]]

    async def script(request: pb.GenerateRequest, context: fake.Context) -> AsyncIterator[pb.GenerateResponse]:
        offsets = list(request.resume_offsets) or [0, 0, 0]
        yield fake.started(request)
        for position in range(3):
            for index, choice in enumerate(tokens):
                if offsets[index] <= position < len(choice):
                    yield fake.delta(position, [choice[position]], index)
                if position == len(choice) - 1:
                    yield fake.finished(request, len(choice), index)

    for when in range(10):
        server.service.script = breaking(when, BREAKS["UNAVAILABLE"], script)
        async with AsyncClient(server.address) as client:
            output = await client.generate("x", SamplingParams(n=3), detach_seconds=30)
        assert [choice.token_ids for choice in output.choices] == tokens


async def test_the_prompt_comes_once(server: ServerThread) -> None:
    async def script(request: pb.GenerateRequest, context: fake.Context) -> AsyncIterator[pb.GenerateResponse]:
        async for response in fake.count_up(request, context):
            yield response
            if response.HasField("started"):
                yield pb.GenerateResponse(prompt=pb.Prompt(text="x", token_ids=[120]))

    server.service.script = breaking(3, BREAKS["UNAVAILABLE"], script)
    async with AsyncClient(server.address) as client:
        events = [event async for event in client.stream("x", PARAMS, detach_seconds=30, echo=True)]
    kinds = [pb.Started, pb.Prompt, *[pb.TokenDelta] * 4, pb.Finished]
    assert [type(event) for event in events] == kinds


# --- processes that die ------------------------------------------------------------------------------------------


class Process:
    """A fake server in a process of its own, on the same port each time."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            self.address = f"127.0.0.1:{reserved.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-m", "tests.unit.fake_inference", "--listen", self.address]
        self._process = subprocess.Popen(argv, env=ENV)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def process() -> Iterator[Process]:
    started = Process()
    try:
        yield started
    finally:
        started.kill()


async def test_a_server_that_is_killed_and_comes_back_is_a_pause(process: Process) -> None:
    """Both clients, from before the server is there; every stream loses it once."""
    count, prompts = 1200, [[number] for number in range(8)]
    lengthy = SamplingParams(max_tokens=count)

    async def generate(client: AsyncClient, prompt: list[int]) -> Output:
        return Output.of([event async for event in client.stream(prompt, lengthy, detach_seconds=60)])

    def generate_blocking(begun: Callable[[], object]) -> Output:
        events = []
        with Client(process.address) as client:
            for event in client.stream([99], lengthy, detach_seconds=60):
                events.append(event)
                if len(events) == 20:
                    begun()
        return Output.of(events)

    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with AsyncClient(process.address) as client:
        blocking = asyncio.create_task(
            asyncio.to_thread(generate_blocking, lambda: loop.call_soon_threadsafe(begun.set))
        )
        tasks = [asyncio.create_task(generate(client, prompt)) for prompt in prompts]
        await begun.wait()
        process.kill()
        assert not any(task.done() for task in [blocking, *tasks])
        process.start()
        results = await asyncio.gather(*tasks, blocking)
    for prompt, output in zip([*prompts, [99]], results, strict=True):
        assert output.token_ids == expected_tokens(prompt, count)


# --- how long it is tried ----------------------------------------------------------------------------------------


async def test_the_last_error_is_raised_when_the_server_stays_away(server: ServerThread) -> None:
    server.service.script = breaking(3, BREAKS["UNAVAILABLE"])
    async with AsyncClient(server.address) as client:
        stream = client.stream("x", PARAMS, detach_seconds=0.5)
        seen = [await anext(stream) for _ in range(3)]
        server.service.script = fake.fail(grpc.StatusCode.UNAVAILABLE, "still away", INFO)
        with pytest.raises(duet.Unavailable, match="still away"):
            seen += [event async for event in stream]
    assert len(seen) == 3
    assert len(server.service.requests) >= 3


def test_the_timeout_ends_resuming_too(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(
        grpc.StatusCode.UNAVAILABLE, "away", INFO, details.RetryInfo(retry_delay=Duration(seconds=1))
    )
    with pytest.raises(duet.Unavailable):
        client.generate("x", PARAMS, detach_seconds=3600, timeout_s=2)
    assert 1 <= len(service.requests) <= 2


async def test_a_request_that_breaks_the_server_time_and_again_is_given_up(server: ServerThread) -> None:
    server.service.script = breaking(1, status(grpc.StatusCode.UNAVAILABLE, INFO, NO_DELAY), times=1000)
    async with AsyncClient(server.address) as client:
        with pytest.raises(duet.Unavailable, match="broken"):
            await client.generate("x", PARAMS, detach_seconds=3600)
    assert len(server.service.requests) == MAX_BREAKS


async def test_one_that_gets_on_each_time_is_not(server: ServerThread) -> None:
    count = 10 * MAX_BREAKS
    server.service.script = breaking(2, status(grpc.StatusCode.UNAVAILABLE, INFO, NO_DELAY), times=1000)
    params = SamplingParams(max_tokens=count)
    async with AsyncClient(server.address) as client:
        output = await client.generate("x", params, detach_seconds=3600)
    assert output.token_ids == expected_tokens(list(b"x"), count)
    assert len(server.service.requests) > MAX_BREAKS


async def test_a_full_queue_is_waited_for_as_long_as_the_policy_says(server: ServerThread) -> None:
    full = status(grpc.StatusCode.RESOURCE_EXHAUSTED, INFO, details.RetryInfo(retry_delay=Duration(nanos=30_000_000)))
    server.service.script = breaking(0, full, times=20)
    async with AsyncClient(server.address, retry=Retry(waits_for_queue=True)) as client:
        assert (await client.generate("x", PARAMS, detach_seconds=0.1)).token_ids == UNDISTURBED
    server.service.script = breaking(0, full, times=20)
    async with AsyncClient(server.address) as client:
        with pytest.raises(duet.QueueFull):
            await client.generate("x", PARAMS, detach_seconds=0.1)


def test_llm_outlives_breaks_where_it_is_asked_to(server: ServerThread) -> None:
    with duet.LLM(address=server.address) as llm:
        server.service.script = breaking(2, BREAKS["UNAVAILABLE"], times=3)
        outputs = llm.generate(["x"] * 3, PARAMS, use_tqdm=False, detach_seconds=30)
        assert [output["token_ids"] for output in outputs] == [UNDISTURBED] * 3
        server.service.script = breaking(2, BREAKS["UNAVAILABLE"], times=3)
        with pytest.raises(duet.Unavailable):
            llm.generate(["x"], PARAMS, use_tqdm=False)


# --- streams that nobody wants any more --------------------------------------------------------------------------


def first_token(stream: Iterator[duet.Event]) -> None:
    next(event for event in stream if isinstance(event, pb.TokenDelta))


def test_closing_the_iterator_of_a_detachable_request_cancels_it_by_its_id(
    client: Client, service: FakeInference
) -> None:
    service.script = fake.never_end
    stream = client.stream("x", detach_seconds=30)
    first_token(stream)
    stream.close()  # type: ignore[attr-defined]
    assert service.cancel_calls == [service.requests[0].request_id]
    stream = client.stream("x")
    first_token(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(service.cancel_calls) == 1


async def test_so_does_closing_the_async_iterator_and_cancelling_its_task(server: ServerThread) -> None:
    server.service.script = fake.never_end
    async with AsyncClient(server.address) as client:
        async with contextlib.aclosing(client.stream("x", detach_seconds=30, request_id="first")) as stream:
            while not isinstance(await anext(stream), pb.TokenDelta):
                pass
        assert server.service.cancel_calls == ["first"]
        running = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("x", detach_seconds=30, request_id="second"):
                running.set()

        task = asyncio.create_task(read())
        await running.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert server.service.cancel_calls == ["first", "second"]


def test_an_interrupt_between_two_attempts_cancels_too(
    client: Client, service: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(duet.client, "time", types.SimpleNamespace(sleep=interrupted))
    service.script = breaking(2, BREAKS["UNAVAILABLE"])
    with pytest.raises(KeyboardInterrupt):
        client.generate("x", PARAMS, detach_seconds=30, request_id="mine")
    assert service.cancel_calls == ["mine"]


def test_an_output_that_is_whole_or_failed_is_not_cancelled(client: Client, service: FakeInference) -> None:
    client.generate("x", PARAMS, detach_seconds=30)
    stream = client.stream("x", PARAMS, detach_seconds=30)
    next(event for event in stream if isinstance(event, pb.Finished))
    stream.close()  # type: ignore[attr-defined]
    service.script = fake.fail(grpc.StatusCode.INVALID_ARGUMENT, "no")
    with pytest.raises(duet.InvalidRequest):
        client.generate("x", detach_seconds=30)
    assert service.cancel_calls == []


async def test_a_stream_that_is_left_after_its_client_was_closed_says_nothing(server: ServerThread) -> None:
    server.service.script = fake.never_end
    blocking = Client(server.address)
    stream = blocking.stream("x", detach_seconds=30)
    await asyncio.to_thread(first_token, stream)
    blocking.close()
    await asyncio.to_thread(stream.close)  # type: ignore[attr-defined]
    client = AsyncClient(server.address)
    async_stream = client.stream("x", detach_seconds=30)
    await anext(async_stream)
    await client.close()
    await async_stream.aclose()
    assert server.service.cancel_calls == []
