"""OpenAI's HTTP API through the gateway: its answers are those of our own API."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import ENDLESS, wait_until
from tests.gateway.fleet import HALF, Fleet, ask, same

SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def prompt() -> str:
    return "the quick fox"


def pieces(stream: Any) -> tuple[list[Any], Any]:
    """The chunks with a choice, and the usage in the last one without."""
    *chunks, last = stream
    assert last.choices == []
    return chunks, last.usage


def test_the_model_is_listed(fleet: Fleet):
    assert [model.id for model in fleet.client.models.list()] == [fleet.model]


def test_a_completion_is_our_own_answer(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, 12)
    answer = fleet.complete(prompt, 12)
    assert same(answer.choices[0].text, native.text)
    assert answer.choices[0].finish_reason == "length"
    usage = native.finished[0].usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (usage.prompt_tokens, 12)


def test_a_completion_is_streamed_piece_by_piece(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, 12)
    chunks, usage = pieces(fleet.complete(prompt, 12, stream=True, stream_options={"include_usage": True}))
    assert same("".join(chunk.choices[0].text for chunk in chunks), native.text)
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert usage.completion_tokens == 12


def test_a_chat_is_rendered_as_we_render_it(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, chat=True)
    answer = fleet.chat(prompt)
    assert same(answer.choices[0].message.content, native.text)
    assert answer.usage.prompt_tokens == native.finished[0].usage.prompt_tokens


def test_a_chat_is_streamed_piece_by_piece(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, chat=True)
    chunks, usage = pieces(fleet.chat(prompt, stream=True, stream_options={"include_usage": True}))
    assert same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), native.text)
    assert usage.completion_tokens == 8


def test_a_seed_gives_the_same_tokens_again_and_another_gives_others(fleet: Fleet, prompt: str):
    texts = [fleet.complete(prompt, 16, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6)]
    native = ask(fleet.replicas[0], prompt, 16, sampling=pb.SamplingParams(temperature=1, seed=5))
    assert texts[0] == texts[1] != texts[2]
    assert same(texts[0], native.text)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_those_of_our_own_api(fleet: Fleet, prompt: str, stream: bool):
    native = ask(fleet.replicas[0], prompt, sampling=pb.SamplingParams(temperature=1, seed=7, n=3))
    answer = fleet.complete(prompt, temperature=1, seed=7, n=3, stream=stream)
    texts: dict[int, str] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert sorted(texts) == [0, 1, 2]
    assert all(same(texts[index], native.texts[index]) for index in texts)
    assert len(set(texts.values())) == 3


def test_generation_ends_at_a_stop_string_and_not_later(fleet: Fleet, prompt: str):
    whole = ask(fleet.replicas[0], prompt, 40).text
    pairs = (whole[i : i + 2] for i in range(5, len(whole)))
    stop = next(pair for pair in pairs if pair.isascii() and pair.isalpha() and pair not in whole[:5])
    native = ask(fleet.replicas[0], prompt, 40, stop=pb.StopConditions(stop_strings=[stop]))
    answer = fleet.complete(prompt, 40, stop=[stop])
    assert native.text == whole[: whole.index(stop)]
    assert same(answer.choices[0].text, native.text)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == native.finished[0].usage.output_tokens < 40


def test_generation_ends_at_a_stop_token(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, 12)
    stop = native.token_ids[0][5]
    answer = fleet.complete(prompt, 12, extra_body={"ignore_eos": True, "stop_token_ids": [stop]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == native.token_ids[0].index(stop) + 1
    assert native.text.replace(HALF, "").startswith(answer.choices[0].text.replace(HALF, ""))


def test_log_probabilities_are_our_own(fleet: Fleet, prompt: str):
    native = ask(fleet.replicas[0], prompt, chat=True, output=pb.OutputOptions(logprobs=3))
    answer = fleet.chat(prompt, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) in (7, 8), "of 8, the gateway leaves out a last one that is half a character"
    for entry, ours in zip(entries, native.logprobs, strict=False):
        assert entry.logprob == pytest.approx(ours.logprob)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([top.logprob for top in ours.top])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_conforms_to_a_json_schema(fleet: Fleet, stream: bool):
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = fleet.chat("Who?", 200, temperature=1, seed=3, response_format=response_format, stream=stream)
    if stream:
        content = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        assert answer.choices[0].finish_reason == "stop"
        content = answer.choices[0].message.content
    jsonschema.validate(json.loads(content), SCHEMA)


def test_what_does_not_fit_is_a_bad_request_with_our_own_words(fleet: Fleet, prompt: str):
    with pytest.raises(openai.BadRequestError, match=r"max_tokens 9000 make \d+"):
        fleet.complete(prompt, 9_000)


def test_a_constraint_that_cannot_be_read_is_a_bad_request_with_our_own_words(fleet: Fleet, prompt: str):
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        fleet.complete(prompt, extra_body={"regex": "("})


@pytest.fixture
def endless(fleet: Fleet) -> Iterator[Fleet]:
    """A fleet of which a stream of ENDLESS tokens is asked, which must end before it has them all."""

    def num_tokens() -> int:
        return sum(load.output_tokens_total for load in fleet.loads())

    before = num_tokens()
    yield fleet
    wait_until(lambda: num_running(fleet) == 0)
    assert num_tokens() - before < ENDLESS


def num_running(fleet: Fleet) -> int:
    return sum(load.running_requests for load in fleet.loads())


def test_a_client_that_leaves_its_stream_leaves_no_load(endless: Fleet, prompt: str):
    stream = endless.complete(prompt, ENDLESS, stream=True)
    next(stream)
    assert num_running(endless) == 1
    stream.close()


def test_a_client_that_waits_no_longer_for_its_answer_leaves_no_load(endless: Fleet, prompt: str):
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(endless.complete, prompt, ENDLESS, timeout=1.5)
        wait_until(lambda: num_running(endless) == 1)
        assert isinstance(answer.exception(), openai.APITimeoutError)
