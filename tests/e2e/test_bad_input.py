"""What a client must not ask for: each a clear status that names the field, and nobody else notices."""

import re
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from duet import Client, InvalidRequest, SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import Refusal, System, generate_request, tokens_of
from tests.tiny_llama import MAX_MODEL_LEN

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = float("nan"), float("inf")
PROMPT = pb.TokenIds(ids=[5, 6, 7])

OUT_OF_RANGE = [
    ({"sampling": {"temperature": -1.0}}, "sampling.temperature"),
    ({"sampling": {"temperature": NAN}}, "sampling.temperature"),
    ({"sampling": {"temperature": INF}}, "sampling.temperature"),
    ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
    ({"sampling": {"top_p": 2.0}}, "sampling.top_p"),
    ({"sampling": {"top_p": NAN}}, "sampling.top_p"),
    ({"sampling": {"min_p": -0.5}}, "sampling.min_p"),
    ({"sampling": {"min_p": 1.5}}, "sampling.min_p"),
    ({"sampling": {"min_p": NAN}}, "sampling.min_p"),
    ({"sampling": {"n": 0}}, "sampling.n"),
    ({"sampling": {"n": 129}}, "sampling.n"),
    ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
    ({"sampling": {"repetition_penalty": NAN}}, "sampling.repetition_penalty"),
    ({"sampling": {"frequency_penalty": 2.5}}, "sampling.frequency_penalty"),
    ({"sampling": {"presence_penalty": -2.5}}, "sampling.presence_penalty"),
    ({"sampling": {"logit_bias": {5: 101.0}}}, "sampling.logit_bias[5]"),
    ({"sampling": {"logit_bias": {400: 1.0}}}, "sampling.logit_bias[400]"),
    ({"sampling": {"allowed_token_ids": [400]}}, "sampling.allowed_token_ids[0]"),
    ({"sampling": {"allowed_token_ids": [7], "banned_token_ids": [7]}}, "sampling.allowed_token_ids"),
    ({"sampling": {"banned_token_ids": range(400)}}, "sampling.banned_token_ids"),
    ({"stop": {"max_tokens": 0}}, "stop.max_tokens"),
    ({"stop": {"max_tokens": 3, "min_tokens": 4}}, "stop.min_tokens"),
    ({"stop": {"stop_token_ids": [400]}}, "stop.stop_token_ids[0]"),
    ({"stop": {"stop_strings": ["."] * 17}}, "stop.stop_strings"),
    ({"stop": {"stop_strings": [""]}}, "stop.stop_strings[0]"),
    ({"output": {"logprobs": 21}}, "output.logprobs"),
    ({"output": {"prompt_logprobs": 21}}, "output.prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"constraint": {}}, "constraint"),
    ({"constraint": {"regex": "a"}, "sampling": {"allowed_token_ids": [7]}}, "constraint"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"model": "another"}, "model"),
    ({"model": ""}, "model"),
    ({"detach_seconds": 0.0}, "detach_seconds"),
    ({"detach_seconds": 3600.5}, "detach_seconds"),
    ({"resume_offset": 0}, "resume_offset"),
    ({"request_id": "a", "resume_offset": 0}, "resume_offset"),
    ({"request_id": "a", "detach_seconds": 1.0, "resume_offsets": [0, 0]}, "resume_offsets"),
]

BAD_PROMPTS = [
    ({}, "prompt"),
    ({"text": ""}, "text"),
    ({"token_ids": {}}, "token_ids.ids"),
    ({"token_ids": {"ids": [5, 400]}}, "token_ids.ids[1]"),
    ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids[0]"),
    ({"chat": {}}, "chat.messages"),
    ({"chat": {"messages": [{"content": "Hello"}]}}, "chat.messages[0].role"),
    ({"chat": {"messages": [{"role": "user", "content": "Hello"}, {"role": "user"}]}}, "chat.messages[1].content"),
    ({"chat": {"messages": [{"role": "user", "content": "a", "parts": [{"text": "b"}]}]}}, "chat.messages[0].content"),
    ({"chat": {"messages": [{"role": "user", "parts": [{"text": "a"}, {}]}]}}, "chat.messages[0].parts[1].text"),
]


def assert_invalid(refusal: Refusal, field: str | None, message: str = "") -> None:
    assert (refusal.code, refusal.field) == (INVALID, field), refusal
    assert re.search(message or r"\w+ \w+", refusal.message), refusal
    assert refusal.retry_after_s is None


@pytest.mark.parametrize(("fields", "field"), OUT_OF_RANGE, ids=str)
def test_value_out_of_range_is_refused_by_its_field(server: System, fields: Mapping[str, Any], field: str) -> None:
    request = pb.GenerateRequest(token_ids=PROMPT, **fields)
    assert_invalid(server.refusal(request), field)


@pytest.mark.parametrize(("fields", "field"), BAD_PROMPTS, ids=str)
def test_prompt_that_is_none_is_refused_by_its_field(server: System, fields: Mapping[str, Any], field: str) -> None:
    assert_invalid(server.refusal(pb.GenerateRequest(**fields)), field)


@pytest.mark.parametrize("method", ["Generate", "Cancel", "GetModel", "GetServer", "WatchLoad"])
def test_bytes_that_are_no_message_are_an_invalid_argument(server: System, method: str) -> None:
    for payload in (b"\xff" * 40, b"\x1a\x7fshort", b"\x00"):
        assert_invalid(server.refusal(payload, method), None, "no .*Request message")


@pytest.mark.parametrize(
    "payload",
    [
        b"\x1a\x03a\xff\xfe",  # text
        b"\x0a\x02\xc3\x28" + b"\x1a\x01a",  # request_id
        b"\x2a\x0d\x0a\x0b\x0a\x04user\x12\x03\xed\xa0\x80",  # chat.messages[0].content: half of a surrogate pair
    ],
    ids=["text", "request_id", "content"],
)
def test_bytes_that_are_not_utf8_where_text_is_due_are_an_invalid_argument(server: System, payload: bytes) -> None:
    assert_invalid(server.refusal(payload), None, "UTF-8")


def test_prompt_longer_than_the_model_is_refused_however_it_comes(server: System) -> None:
    ids = generate_request([5] * MAX_MODEL_LEN, max_tokens=1)
    text = generate_request("x1" * MAX_MODEL_LEN, max_tokens=1)
    chat = pb.GenerateRequest(chat={"messages": [{"role": "user", "content": "x1" * MAX_MODEL_LEN}]})  # pyright: ignore
    for request, field in ((ids, "token_ids.ids"), (text, "text"), (chat, "chat.messages")):
        refusal = server.refusal(request)
        assert_invalid(refusal, field, rf"the model.*{MAX_MODEL_LEN}|{MAX_MODEL_LEN}.*the model")
        assert refusal.reason == "ContextLengthExceeded"


def test_prompt_longer_than_the_whole_kv_cache_is_refused(narrow_server: System) -> None:
    refusal = narrow_server.refusal(generate_request([5] * 8_100, max_tokens=1))
    assert_invalid(refusal, "token_ids.ids", "the whole KV cache holds 8000")


def test_prompt_and_max_tokens_longer_than_the_room_are_refused(server: System, narrow_server: System) -> None:
    just_too_long = server.refusal(generate_request([5] * 100, max_tokens=MAX_MODEL_LEN - 99))
    assert_invalid(just_too_long, "stop.max_tokens", f"the model holds {MAX_MODEL_LEN}")
    just_too_long = narrow_server.refusal(generate_request([5] * 100, max_tokens=7_901))
    assert_invalid(just_too_long, "stop.max_tokens", "the whole KV cache holds 8000")
    most = server.refusal(generate_request([5], max_tokens=2**32 - 1))
    assert_invalid(most, "stop.max_tokens")


def test_longest_prompt_gets_as_many_tokens_as_fit(server: System) -> None:
    prompt = pb.TokenIds(ids=[5] * (MAX_MODEL_LEN - 2))
    for stop, num_tokens in ((pb.StopConditions(ignore_eos=True), 2), (pb.StopConditions(max_tokens=1), 1)):
        responses = list(server.stub.Generate(pb.GenerateRequest(token_ids=prompt, stop=stop)))
        assert len(tokens_of(iter(responses))) == num_tokens
        assert responses[-1].finished.reason == pb.FINISH_REASON_LENGTH


def test_ten_megabytes_of_text_are_refused_as_too_long(server: System) -> None:
    for word in ("a", "the quick brown fox ", "你好"):
        text = word * (10_000_000 // len(word.encode()))
        assert_invalid(server.refusal(generate_request(text, max_tokens=1)), "text", "cannot fit|holds")


def test_message_over_sixteen_mebibytes_is_an_invalid_argument(server: System) -> None:
    refusal = server.refusal(generate_request("a" * (17 << 20), max_tokens=1))
    assert_invalid(refusal, None, f"at most {16 << 20}")


def test_message_that_grpc_itself_does_not_take_leaves_the_server_unharmed(server: System) -> None:
    refusal = server.refusal(generate_request("a" * (32 << 20), max_tokens=1))
    assert refusal.code in (INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_interval_out_of_range_is_refused(server: System) -> None:
    for seconds in (0.0, -1.0, NAN, 61.0):
        refusal = server.refusal(pb.WatchLoadRequest(interval_seconds=seconds).SerializeToString(), "WatchLoad")
        assert_invalid(refusal, "interval_seconds")


def test_cancel_without_an_id_is_refused(server: System) -> None:
    assert_invalid(server.refusal(b"", "Cancel"), "request_id")


def test_unknown_method_is_unimplemented(server: System) -> None:
    assert server.refusal(b"", "Train").code is grpc.StatusCode.UNIMPLEMENTED


def test_the_client_says_which_field_was_at_fault(server: System) -> None:
    with Client(server.address) as client:
        with pytest.raises(InvalidRequest, match="temperature") as caught:
            client.generate("Hello", SamplingParams(temperature=-1))
        assert caught.value.field == "sampling.temperature"
        with pytest.raises(InvalidRequest) as caught:
            client.generate([{"role": "user", "content": None}])
        assert caught.value.field == "chat.messages[0].content"
