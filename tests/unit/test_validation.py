"""Every field of a request, in range and out of it."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import ContextLengthExceeded, InvalidRequest
from scheduler_service.frontend import validation
from scheduler_service.frontend.tokenizer import ModelTokenizer, load_model_tokenizer
from tests.small_model import EOS, write_model

MODEL = ipc.ModelInfo(
    "LlamaForCausalLM", "float32", "cpu", "00", vocab_size=400, max_model_len=64, max_cache_tokens=256
)
TIGHT_CACHE = ipc.ModelInfo("LlamaForCausalLM", "float32", "cpu", "00", 400, max_model_len=64, max_cache_tokens=32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return load_model_tokenizer(write_model(Path(tmp_path_factory.mktemp("models")) / "tiny"), None)


def request(**fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "the fox"
    return pb.GenerateRequest(**fields)


def tokens(*ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


REFUSED = [
    (pb.GenerateRequest(), "prompt"),
    (request(text=""), "text"),
    (request(token_ids=tokens()), "token_ids.ids"),
    (request(chat=pb.Chat()), "chat.messages"),
    (request(request_id=""), "request_id"),
    (request(request_id="x" * 129), "request_id"),
    (request(cache_salt="x" * 129), "cache_salt"),
    (request(model="gpt-5"), "model"),
    (request(model=""), "model"),
    (request(resume_offset=0), "resume_offset"),
    (request(detach_seconds=0), "detach_seconds"),
    (request(stop=pb.StopConditions(max_tokens=0)), "stop.max_tokens"),
    (request(stop=pb.StopConditions(min_tokens=0)), "stop.min_tokens"),
    (request(stop=pb.StopConditions(stop_strings=["."])), "stop.stop_strings"),
    (request(stop=pb.StopConditions(stop_token_ids=range(65))), "stop.stop_token_ids"),
    (request(output=pb.OutputOptions(logprobs=0)), "output.logprobs"),
    (request(output=pb.OutputOptions(prompt_logprobs=0)), "output.prompt_logprobs"),
    *(
        (request(sampling=pb.SamplingParams(**{name: value})), f"sampling.{name}")
        for name, values in {
            "temperature": (-0.1, 100.1, math.nan, math.inf, -math.inf),
            "top_p": (0.0, 2.0, -1.0, math.nan, math.inf),
            "min_p": (-0.1, 1.1, math.nan),
            "n": (0, 2),
            "repetition_penalty": (1.0,),
            "frequency_penalty": (0.0,),
            "presence_penalty": (0.0,),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("refused", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_field_out_of_range_or_not_implemented_is_named(refused: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validation.check_fields(refused, "tiny")
    assert caught.value.field == field


@pytest.mark.parametrize(
    "accepted",
    [
        request(),
        request(request_id="x" * 128, model="tiny", priority=-5, cache_salt="salt"),
        request(sampling=pb.SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, n=1, seed=0)),
        request(sampling=pb.SamplingParams(temperature=100, top_k=2**32 - 1, top_p=1e-6, min_p=1, seed=2**64 - 1)),
        request(stop=pb.StopConditions(max_tokens=1, stop_token_ids=range(64), ignore_eos=True)),
    ],
)
def test_the_ends_of_every_range_are_accepted(accepted: pb.GenerateRequest) -> None:
    validation.check_fields(accepted, "tiny")
    submit = build(accepted, [1, 2])
    assert ipc.encode_frame(submit)


def test_an_unknown_model_is_told_the_served_one() -> None:
    with pytest.raises(InvalidRequest, match="'tiny'"):
        validation.check_fields(request(model="gpt-5"), "tiny")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_invalid_request(payload: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        validation.parse(pb.GenerateRequest, payload)


def test_a_string_that_is_not_utf8_is_no_message() -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        validation.parse(pb.GenerateRequest, b"\x1a\x02\xff\xfe")


def test_a_message_over_the_size_limit_is_refused() -> None:
    payload = request(text="x" * validation.MAX_REQUEST_BYTES).SerializeToString()
    with pytest.raises(InvalidRequest, match="16777216"):
        validation.parse(pb.GenerateRequest, payload)


def test_text_and_chat_become_tokens(tokenizer: ModelTokenizer) -> None:
    text_ids = validation.encode_prompt(request(text="the fox"), tokenizer, MODEL)
    assert text_ids == tokenizer.encode("the fox", add_special_tokens=True)
    conversation = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    chat_ids = validation.encode_prompt(request(chat=conversation), tokenizer, MODEL)
    assert chat_ids == tokenizer.encode(tokenizer.render(conversation), add_special_tokens=False)
    assert chat_ids[0] == 1  # the template's own <|im_start|>, recognised


def test_a_prompt_may_fill_the_model_up_to_one_token(tokenizer: ModelTokenizer) -> None:
    assert validation.encode_prompt(request(token_ids=tokens(*range(63))), tokenizer, MODEL) == list(range(63))
    with pytest.raises(ContextLengthExceeded, match="64 tokens and the model holds 64") as caught:
        validation.encode_prompt(request(token_ids=tokens(*range(64))), tokenizer, MODEL)
    assert caught.value.field == "token_ids.ids"


def test_the_kv_cache_limits_where_it_is_smaller(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(ContextLengthExceeded, match="40 tokens and the whole KV cache holds 32"):
        validation.encode_prompt(request(token_ids=tokens(*range(40))), tokenizer, TIGHT_CACHE)


def test_prompt_and_max_tokens_must_fit_together(tokenizer: ModelTokenizer) -> None:
    prompt = tokens(*range(60))
    fits = request(token_ids=prompt, stop=pb.StopConditions(max_tokens=4))
    validation.encode_prompt(fits, tokenizer, MODEL)
    exceeds = request(token_ids=prompt, stop=pb.StopConditions(max_tokens=5))
    with pytest.raises(ContextLengthExceeded, match="max_tokens 5 make 65; the model holds 64") as caught:
        validation.encode_prompt(exceeds, tokenizer, MODEL)
    assert caught.value.field == "stop.max_tokens"


def test_a_chat_of_more_messages_than_tokens_fit_is_refused_without_being_rendered(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelTokenizer, "render", lambda *_: pytest.fail("it was rendered"))
    messages = [pb.ChatMessage(role="user", content="") for _ in range(65)]
    with pytest.raises(ContextLengthExceeded, match="65 messages") as caught:
        validation.encode_prompt(request(chat=pb.Chat(messages=messages)), tokenizer, MODEL)
    assert caught.value.field == "chat.messages"


def test_text_that_cannot_fit_is_refused_without_being_tokenized(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelTokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(ContextLengthExceeded, match="10000000 bytes") as caught:
        validation.encode_prompt(request(text="x" * 10_000_000), tokenizer, MODEL)
    assert caught.value.field == "text"


@pytest.mark.parametrize(
    ("outside", "field"),
    [
        (request(token_ids=tokens(1, 399, 400)), "token_ids.ids[2]"),
        (request(token_ids=tokens(2**32 - 1)), "token_ids.ids[0]"),
        (request(stop=pb.StopConditions(stop_token_ids=[3, 400])), "stop.stop_token_ids[1]"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(
    tokenizer: ModelTokenizer, outside: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary of 400") as caught:
        validation.encode_prompt(outside, tokenizer, MODEL)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("outside", "field"),
    [
        (request(text="the fox"), "text"),
        (request(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="the fox")])), "chat.messages"),
    ],
)
def test_a_tokenizer_that_knows_more_than_the_model_is_reported_by_the_prompts_own_field(
    tokenizer: ModelTokenizer, outside: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary of 2") as caught:
        validation.encode_prompt(outside, tokenizer, msgspec.structs.replace(MODEL, vocab_size=2))
    assert caught.value.field == field


def build(accepted: pb.GenerateRequest, token_ids: list[int], time_remaining_s: float | None = None) -> ipc.Submit:
    return validation.build_submit(
        accepted,
        token_ids,
        stream=7,
        eos_token_ids=[EOS, 0, 400, 2**40],
        vocab_size=400,
        arrival=1.5,
        time_remaining_s=time_remaining_s,
    )


def test_an_end_of_sequence_outside_the_vocabulary_is_not_a_stop() -> None:
    assert build(request(), [5]).stop_token_ids == [0, EOS]


def test_unset_fields_get_the_defaults_of_the_proto() -> None:
    submit = build(request(), [5, 6])
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == [5, 6]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert submit.stop_token_ids == [0, EOS]
    assert (submit.max_tokens, submit.priority, submit.cache_salt, submit.deadline) == (None, 0, "", None)
    assert (submit.stream, submit.arrival) == (7, 1.5)


def test_missing_ids_and_seeds_are_drawn_anew_each_time() -> None:
    submits = [build(request(), [5]) for _ in range(20)]
    assert len({submit.request_id for submit in submits}) == 20
    assert len({submit.sampling.seed for submit in submits}) == 20
    assert max(submit.sampling.seed for submit in submits) > 2**56


def test_zero_is_not_unset() -> None:
    submit = build(request(sampling=pb.SamplingParams(temperature=0, seed=0)), [5])
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.0, 0)


def test_ignoring_the_end_of_sequence_keeps_the_requests_own_stops() -> None:
    stop = pb.StopConditions(stop_token_ids=[9, 0], ignore_eos=True)
    assert build(request(stop=stop), [5]).stop_token_ids == [0, 9]
    stop.ignore_eos = False
    assert build(request(stop=stop), [5]).stop_token_ids == [0, EOS, 9]


def test_a_deadline_is_told_on_the_monotonic_clock() -> None:
    before = time.monotonic()
    deadline = build(request(), [5], time_remaining_s=100.0).deadline
    assert deadline is not None
    assert before + 100 <= deadline <= time.monotonic() + 100
