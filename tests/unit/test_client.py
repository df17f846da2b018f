import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details

import duet
import duet.errors
from duet import AsyncClient, Client, SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import FakeInference, ServerThread, delta, expected_tokens, finished, started


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread() as running:
        yield running


@pytest.fixture
def service(server: ServerThread) -> FakeInference:
    return server.service


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def replay(*responses: pb.GenerateResponse) -> fake.Script:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        for response in responses:
            yield response

    return script


def test_stream_yields_started_then_deltas_then_finished(client: Client) -> None:
    events = list(client.stream([5, 6], SamplingParams(max_tokens=5)))
    assert [type(event) for event in events] == [pb.Started, *[pb.TokenDelta] * 3, pb.Finished]
    assert [event.offset for event in events if isinstance(event, pb.TokenDelta)] == [0, 2, 4]


def test_generate_joins_the_deltas_of_a_stream(client: Client) -> None:
    output = client.generate([5, 6], SamplingParams(max_tokens=5, seed=9), request_id="mine")
    assert output.token_ids == expected_tokens([5, 6], 5)
    assert output.text == "<11><12><13><14><15>"
    assert (output.finish_reason, output.stop_token_id) == ("length", None)
    assert (output.request_id, output.seed, output.prompt_tokens, output.cached_tokens) == ("mine", 9, 2, 1)


async def test_async_client_says_the_same_as_the_blocking_one(server: ServerThread) -> None:
    async with AsyncClient(server.address) as client:
        output = await client.generate("ab", SamplingParams(max_tokens=3))
        assert output.token_ids == expected_tokens(list(b"ab"), 3)
        assert (await client.model()).name == "fake"
        assert (await client.server()).ready
        assert [load.uptime_seconds async for load in client.watch_load()] == [1, 2]
        await client.cancel("some")
        with pytest.raises(duet.UnknownRequest):
            await client.cancel("unknown")
    assert server.service.cancel_calls == ["some", "unknown"]


def test_blocking_client_asks_for_model_server_load_and_cancel(client: Client, service: FakeInference) -> None:
    assert client.model().vocab_size == 1000
    assert client.server().load.total_blocks == 100
    assert [load.output_tokens_total for load in client.watch_load(0.5)] == [10, 40]
    client.cancel("some")
    assert service.cancel_calls == ["some"]
    with pytest.raises(duet.UnknownRequest, match="alive"):
        client.cancel("unknown")


def test_every_sampling_parameter_reaches_the_server(client: Client, service: FakeInference) -> None:
    params = SamplingParams(0.5, 7, 0.25, 0.125, seed=2**64 - 1, max_tokens=1, ignore_eos=True, stop_token_ids=[3, 4])
    client.generate("x", params, priority=-2, cache_salt="s", model="fake", skip_special_tokens=False)
    assert service.requests == [
        pb.GenerateRequest(
            text="x",
            sampling=pb.SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=2**64 - 1),
            stop=pb.StopConditions(max_tokens=1, ignore_eos=True, stop_token_ids=[3, 4]),
            output=pb.OutputOptions(skip_special_tokens=False),
            priority=-2,
            cache_salt="s",
            model="fake",
        )
    ]


def test_what_is_not_given_stays_unset(client: Client, service: FakeInference) -> None:
    client.generate("x", SamplingParams(top_k=-1, max_tokens=None))
    (request,) = service.requests
    assert request.sampling.top_k == 0
    assert not request.sampling.HasField("seed")
    assert not request.stop.HasField("max_tokens")
    assert {field.name for field, _ in request.ListFields()} == {"text", "sampling", "stop"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", pb.GenerateRequest(text="")),
        ("héllo", pb.GenerateRequest(text="héllo")),
        ([], pb.GenerateRequest(token_ids=pb.TokenIds())),
        ((1, 2), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))),
        (
            [{"role": "user", "content": "hi"}],
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            pb.GenerateRequest(
                chat=pb.Chat(
                    messages=[
                        pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a"), pb.ContentPart(text="b")]),
                    ]
                )
            ),
        ),
    ],
)
def test_each_kind_of_prompt_is_sent_as_it_is(
    client: Client, service: FakeInference, prompt: Any, expected: pb.GenerateRequest
) -> None:
    client.generate(prompt, SamplingParams(max_tokens=1))
    (request,) = service.requests
    assert request.WhichOneof("prompt") == expected.WhichOneof("prompt")
    request.ClearField("sampling")
    request.ClearField("stop")
    assert request == expected


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("x", SamplingParams(max_tokens=-1), "stop.max_tokens"),
        ("x", SamplingParams(top_k=-2), "sampling.top_k"),
        ("x", SamplingParams(seed=2**64), "sampling.seed"),
        ("x", SamplingParams(temperature="hot"), "sampling.temperature"),  # type: ignore[arg-type]
        ("x", SamplingParams(stop_token_ids=[-1]), "stop.stop_token_ids"),
        ([-1], SamplingParams(), "token_ids.ids"),
        (["a", "b"], SamplingParams(), "token_ids.ids"),
        ("\ud800", SamplingParams(), "text"),
        ({"role": "user", "content": "hi"}, SamplingParams(), "prompt"),
        ([{"role": 5, "content": "hi"}], SamplingParams(), "chat.messages[0].role"),
    ],
)
def test_a_value_that_no_message_can_hold_is_refused_by_its_field(
    client: Client, service: FakeInference, prompt: Any, params: SamplingParams, field: str
) -> None:
    with pytest.raises(duet.InvalidRequest) as caught:
        client.generate(prompt, params)
    assert caught.value.field == field
    assert service.requests == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, duet.InvalidRequest),
        (grpc.StatusCode.ALREADY_EXISTS, duet.DuplicateRequest),
        (grpc.StatusCode.NOT_FOUND, duet.UnknownRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, duet.QueueFull),
        (grpc.StatusCode.UNAVAILABLE, duet.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, duet.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, duet.InternalError),
        (grpc.StatusCode.DATA_LOSS, duet.InternalError),
    ],
)
async def test_each_status_is_one_error_with_the_servers_details(
    server: ServerThread, code: grpc.StatusCode, kind: type[duet.DuetError]
) -> None:
    violation = details.BadRequest.FieldViolation(field="stop.max_tokens", description="too many")
    server.service.script = fake.fail(
        code,
        "the server's words",
        details.ErrorInfo(reason="Why", domain="duet"),
        details.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        details.BadRequest(field_violations=[violation]),
    )

    def check(error: duet.DuetError) -> None:
        assert type(error) is kind
        assert "the server's words" in str(error)
        found = (error.code, error.field, error.reason, error.retry_after_s)
        assert found == (code, "stop.max_tokens", "Why", 1.5)

    with pytest.raises(duet.DuetError) as caught:
        await asyncio.to_thread(lambda: Client(server.address).generate("x"))
    check(caught.value)
    async with AsyncClient(server.address) as client:
        with pytest.raises(duet.DuetError) as caught:
            await client.generate("x")
    check(caught.value)


def test_an_error_without_details_has_none(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.ALREADY_EXISTS, "in use")
    with pytest.raises(duet.DuplicateRequest) as caught:
        client.generate("x")
    assert (caught.value.field, caught.value.reason, caught.value.retry_after_s) == (None, None, None)


def test_grpcs_own_refusal_of_a_large_message_is_no_full_queue(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (25 vs. 24)")
    with pytest.raises(duet.InvalidRequest, match="larger than max") as caught:
        client.generate("x")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)


def test_every_error_is_documented_and_exported() -> None:
    kinds = set(duet.DuetError.__subclasses__())
    assert set(re.findall(r"── (\w+)", duet.errors.__doc__ or "")) == {kind.__name__ for kind in kinds}
    assert all(getattr(duet, kind.__name__) is kind and kind.__name__ in duet.__all__ for kind in kinds)


@pytest.mark.parametrize("case", ["gap", "repeat", "no finish", "no start", "after finish", "nothing", "two starts"])
def test_a_stream_that_is_not_whole_is_an_error(client: Client, service: FakeInference, case: str) -> None:
    request = pb.GenerateRequest(text="x")
    first, second, end = delta(0, [1, 2]), delta(2, [3]), finished(request, 3)
    begin = started(request)
    streams = {
        "gap": [begin, first, delta(3, [3]), end],
        "repeat": [begin, first, first, end],
        "no finish": [begin, first, second],
        "no start": [first, second, end],
        "after finish": [begin, first, end, second],
        "nothing": [],
        "two starts": [begin, begin, end],
    }
    service.script = replay(*streams[case])
    with pytest.raises(duet.StreamCut):
        client.generate("x")
    service.script = replay(begin, first, second, end)
    assert client.generate("x").token_ids == [1, 2, 3]


def test_closing_the_iterator_cancels_the_request(client: Client, service: FakeInference) -> None:
    service.script = fake.never_end
    stream = client.stream("x")
    for event in stream:
        if isinstance(event, pb.TokenDelta):
            break
    assert not service.cut_calls.acquire(blocking=False)
    stream.close()  # type: ignore[attr-defined]
    assert service.cut_calls.acquire(timeout=30)


async def test_closing_the_async_iterator_cancels_the_request(server: ServerThread) -> None:
    server.service.script = fake.never_end
    async with AsyncClient(server.address) as client:
        async with contextlib.aclosing(client.stream("x")) as stream:
            async for event in stream:
                if isinstance(event, pb.TokenDelta):
                    break
        assert await asyncio.to_thread(server.service.cut_calls.acquire, timeout=30)


def test_timeout_ends_a_stream(client: Client, service: FakeInference) -> None:
    service.script = fake.never_end
    with pytest.raises(duet.DeadlineExceeded):
        client.generate("x", timeout_s=0.2)


def test_error_of_an_address_where_nothing_listens_names_it() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(duet.Unavailable, match=r"no connection to 127\.0\.0\.1:1:"):
        client.server()


def test_a_proxy_in_the_environment_is_not_used(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(server.address) as client:
        assert client.server().ready


# --- LLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(server: ServerThread) -> Iterator[duet.LLM]:
    with duet.LLM(address=server.address) as connected:
        yield connected


def test_outputs_come_in_the_order_of_the_prompts(llm: duet.LLM) -> None:
    prompts = ["later", [1, 2, 3], "sooner"]  # the first one takes the longest
    params = [SamplingParams(max_tokens=count) for count in (9, 5, 1)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [expected_tokens(list(b"later"), 9), expected_tokens([1, 2, 3], 5), expected_tokens(list(b"sooner"), 1)]
    assert [output["token_ids"] for output in outputs] == expected
    assert outputs[2]["text"] == f"<{expected[2][0]}>"
    assert [output["prompt_tokens"] for output in outputs] == [5, 3, 6]
    assert {output["finish_reason"] for output in outputs} == {"length"}


def test_one_sampling_params_counts_for_all_prompts(llm: duet.LLM) -> None:
    outputs = llm.generate(["a", "b"], SamplingParams(max_tokens=3), use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [3, 3]
    assert len(llm.generate("a", use_tqdm=False)[0]["token_ids"]) == 64
    assert len(llm.generate([4, 5], use_tqdm=False)) == 1
    assert llm.generate([], use_tqdm=False) == []


def test_sampling_params_of_another_number_than_prompts_are_refused(llm: duet.LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)


def test_many_prompts_are_sent_a_few_hundred_at_a_time(llm: duet.LLM, service: FakeInference) -> None:
    all_run = asyncio.Event()

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if service.running == 256:
            all_run.set()
        await all_run.wait()
        async for response in fake.count_up(request, context):
            yield response

    service.script = script
    outputs = llm.generate([[number] for number in range(600)], SamplingParams(max_tokens=2), use_tqdm=False)
    assert [output["token_ids"][0] for output in outputs] == list(range(600))
    assert service.most_running == 256


def test_first_error_ends_the_other_requests_and_is_raised(llm: duet.LLM, service: FakeInference) -> None:
    all_run = asyncio.Event()

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if service.running == 3:
            all_run.set()
        if request.text == "bad":
            await all_run.wait()
            await fake.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "bad prompt")
        async for response in fake.never_end(request, context):
            yield response

    service.script = script
    with pytest.raises(duet.InvalidRequest, match="bad prompt"):
        llm.generate(["good", "bad", "good"], use_tqdm=False)
    assert all(service.cut_calls.acquire(timeout=30) for _ in range(2))


async def test_llm_works_where_an_event_loop_runs_already(llm: duet.LLM) -> None:
    assert llm.generate(["a"], SamplingParams(max_tokens=1), use_tqdm=False)[0]["token_ids"] == [97]


def test_progress_bar_shows_prefill_and_decode_rates(llm: duet.LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=4))
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"2/2 .*prefill \d+ tok/s, decode [1-9]\d* tok/s", last)


def test_close_leaves_no_thread_and_may_be_repeated(server: ServerThread) -> None:
    before = set(threading.enumerate())  # other tests' clients may be alive
    llm = duet.LLM(address=server.address)
    (started,) = (thread for thread in threading.enumerate() if thread not in before and thread.name == "duet-client")
    llm.close()
    llm.close()
    assert not started.is_alive()


def test_llm_takes_a_model_or_an_address() -> None:
    for arguments in ({}, {"model": "m", "address": "a:1"}, {"address": "a:1", "num_blocks": 5}):
        with pytest.raises(TypeError):
            duet.LLM(**arguments)  # type: ignore[arg-type]
