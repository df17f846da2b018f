"""LLM on a fake server."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details

import duet
from duet import SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import FakeInference, ServerThread, expected_tokens


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


def test_choices_are_listed_where_there_are_several(llm: duet.LLM, service: FakeInference) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield fake.started(request)
        for index in reversed(range(request.sampling.n)):
            yield fake.delta(0, [index, *request.token_ids.ids], index)
            yield fake.finished(request, 2, index)

    service.script = script
    outputs = llm.generate([[5], [6]], SamplingParams(n=3), use_tqdm=False)
    for output, prompt in zip(outputs, (5, 6), strict=True):
        assert output["token_ids"] == [0, prompt]
        assert [choice["token_ids"] for choice in output["choices"]] == [[0, prompt], [1, prompt], [2, prompt]]


def test_a_prompt_counts_once_on_the_bar_however_many_choices_it_has(
    llm: duet.LLM, service: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield fake.started(request)
        for index in range(request.sampling.n):
            yield fake.finished(request, 0, index)

    service.script = script
    llm.generate(["a", "b"], SamplingParams(n=3))
    assert "2/2" in capsys.readouterr().err.split("\r")[-1]


def test_a_full_queue_is_waited_for_and_a_server_that_is_gone_is_not(llm: duet.LLM, service: FakeInference) -> None:
    refusals = 0

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal refusals
        refusals += 1
        if refusals <= 12:
            info = details.RetryInfo(retry_delay=Duration(nanos=1_000_000))
            why = details.ErrorInfo(reason="QueueFull", domain="duet")
            await fake.abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", why, info)
        async for response in fake.count_up(request, context):
            yield response

    service.script = script
    assert len(llm.generate("a", SamplingParams(max_tokens=3), use_tqdm=False)[0]["token_ids"]) == 3
    info = details.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    service.script = fake.fail(grpc.StatusCode.UNAVAILABLE, "gone", info)
    with pytest.raises(duet.Unavailable):
        llm.generate("a", use_tqdm=False)


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
