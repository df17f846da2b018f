"""A request against the model: its prompt as tokens, and the token ids that it names."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import ContextLengthExceeded, InvalidRequest
from scheduler_service.frontend.prompt import check_token_ids, encode_prompt
from scheduler_service.frontend.tokenizer import ModelTokenizer, load_model_tokenizer
from tests.small_model import write_model

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


def test_text_and_chat_become_tokens(tokenizer: ModelTokenizer) -> None:
    text_ids = encode_prompt(request(text="the fox"), tokenizer, MODEL)
    assert text_ids == tokenizer.encode("the fox", add_special_tokens=True)
    conversation = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    chat_ids = encode_prompt(request(chat=conversation), tokenizer, MODEL)
    assert chat_ids == tokenizer.encode(tokenizer.render(conversation), add_special_tokens=False)
    assert chat_ids[0] == 1  # the template's own <|im_start|>, recognised


def test_a_prompt_may_fill_the_model_up_to_one_token(tokenizer: ModelTokenizer) -> None:
    assert encode_prompt(request(token_ids=tokens(*range(63))), tokenizer, MODEL) == list(range(63))
    with pytest.raises(ContextLengthExceeded, match="64 tokens and the model holds 64") as caught:
        encode_prompt(request(token_ids=tokens(*range(64))), tokenizer, MODEL)
    assert caught.value.field == "token_ids.ids"


def test_the_kv_cache_limits_where_it_is_smaller(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(ContextLengthExceeded, match="40 tokens and the whole KV cache holds 32"):
        encode_prompt(request(token_ids=tokens(*range(40))), tokenizer, TIGHT_CACHE)


def test_prompt_and_max_tokens_must_fit_together(tokenizer: ModelTokenizer) -> None:
    prompt = tokens(*range(60))
    fits = request(token_ids=prompt, stop=pb.StopConditions(max_tokens=4))
    encode_prompt(fits, tokenizer, MODEL)
    exceeds = request(token_ids=prompt, stop=pb.StopConditions(max_tokens=5))
    with pytest.raises(ContextLengthExceeded, match="max_tokens 5 make 65; the model holds 64") as caught:
        encode_prompt(exceeds, tokenizer, MODEL)
    assert caught.value.field == "stop.max_tokens"


def test_a_chat_of_more_messages_than_tokens_fit_is_refused_without_being_rendered(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelTokenizer, "render", lambda *_: pytest.fail("it was rendered"))
    messages = [pb.ChatMessage(role="user", content="") for _ in range(65)]
    with pytest.raises(ContextLengthExceeded, match="65 messages") as caught:
        encode_prompt(request(chat=pb.Chat(messages=messages)), tokenizer, MODEL)
    assert caught.value.field == "chat.messages"


def test_text_that_cannot_fit_is_refused_without_being_tokenized(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelTokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(ContextLengthExceeded, match="10000000 bytes") as caught:
        encode_prompt(request(text="x" * 10_000_000), tokenizer, MODEL)
    assert caught.value.field == "text"


@pytest.mark.parametrize(
    ("outside", "field"),
    [
        (request(token_ids=tokens(1, 399, 400)), "token_ids.ids[2]"),
        (request(token_ids=tokens(2**32 - 1)), "token_ids.ids[0]"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(
    tokenizer: ModelTokenizer, outside: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary of 400") as caught:
        encode_prompt(outside, tokenizer, MODEL)
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
        encode_prompt(outside, tokenizer, msgspec.structs.replace(MODEL, vocab_size=2))
    assert caught.value.field == field


def test_min_tokens_must_fit_where_max_tokens_is_unset(tokenizer: ModelTokenizer) -> None:
    prompt = tokens(*range(60))
    encode_prompt(request(token_ids=prompt, stop=pb.StopConditions(min_tokens=4)), tokenizer, MODEL)
    with pytest.raises(ContextLengthExceeded, match="min_tokens 5 make 65; the model holds 64") as caught:
        encode_prompt(request(token_ids=prompt, stop=pb.StopConditions(min_tokens=5)), tokenizer, MODEL)
    assert caught.value.field == "stop.min_tokens"


@pytest.mark.parametrize("count", [1, 3, 200])
def test_truncation_keeps_the_end_of_the_prompt(tokenizer: ModelTokenizer, count: int) -> None:
    whole = [*range(40)]
    kept = encode_prompt(request(token_ids=tokens(*whole), truncate_prompt_tokens=count), tokenizer, MODEL)
    assert kept == whole[-count:]
    text = "the quick brown fox"
    whole = tokenizer.encode(text, add_special_tokens=True)
    assert encode_prompt(request(text=text, truncate_prompt_tokens=count), tokenizer, MODEL) == whole[-count:]


def test_a_prompt_of_any_length_fits_once_it_is_truncated(tokenizer: ModelTokenizer) -> None:
    text = "the fox " * 1000
    assert len(encode_prompt(request(text=text, truncate_prompt_tokens=63), tokenizer, MODEL)) == 63
    with pytest.raises(ContextLengthExceeded, match="the prompt has 64 tokens"):
        encode_prompt(request(text=text, truncate_prompt_tokens=64), tokenizer, MODEL)


def test_a_token_outside_the_vocabulary_is_named_even_where_truncation_drops_it(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_prompt(request(token_ids=tokens(400, 1, 2), truncate_prompt_tokens=1), tokenizer, MODEL)
    assert caught.value.field == "token_ids.ids[0]"


# --- token ids beside the prompt ---------------------------------------------------------------------------------

EOS_TOKEN_IDS = [2, 0, 2**40]  # of a vocabulary of 400; models name ends of sequence that they cannot generate
REFUSED = [
    (request(stop=pb.StopConditions(stop_token_ids=[3, 400])), "stop.stop_token_ids[1]"),
    (request(sampling=pb.SamplingParams(allowed_token_ids=[400])), "sampling.allowed_token_ids[0]"),
    (request(sampling=pb.SamplingParams(banned_token_ids=[1, 2, 2**32 - 1])), "sampling.banned_token_ids[2]"),
    (request(sampling=pb.SamplingParams(logit_bias={5: 1.0, 400: 1.0})), "sampling.logit_bias[400]"),
    (
        request(sampling=pb.SamplingParams(allowed_token_ids=[5, 6], banned_token_ids=[6, 5, 7])),
        "sampling.allowed_token_ids",
    ),
    (request(sampling=pb.SamplingParams(banned_token_ids=range(400))), "sampling.banned_token_ids"),
    (
        request(sampling=pb.SamplingParams(allowed_token_ids=[0, 2]), stop=pb.StopConditions(min_tokens=1)),
        "stop.min_tokens",
    ),
    (
        request(
            sampling=pb.SamplingParams(allowed_token_ids=[2, 5, 6], banned_token_ids=[6]),
            stop=pb.StopConditions(min_tokens=1, stop_token_ids=[5], ignore_eos=True),
        ),
        "stop.min_tokens",
    ),
    (
        request(sampling=pb.SamplingParams(banned_token_ids=[1, *range(3, 400)]), stop=pb.StopConditions(min_tokens=1)),
        "stop.min_tokens",
    ),
]


@pytest.mark.parametrize(("refused", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_token_ids_outside_the_vocabulary_or_none_left_are_named(refused: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_token_ids(refused, EOS_TOKEN_IDS, 400)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "accepted",
    [
        request(),
        request(sampling=pb.SamplingParams(allowed_token_ids=[399], banned_token_ids=range(399))),
        request(sampling=pb.SamplingParams(banned_token_ids=range(399), logit_bias={399: -100.0})),
        request(sampling=pb.SamplingParams(allowed_token_ids=[0, 2]), stop=pb.StopConditions(min_tokens=0)),
        request(sampling=pb.SamplingParams(allowed_token_ids=[0, 5]), stop=pb.StopConditions(min_tokens=1)),
        request(stop=pb.StopConditions(min_tokens=1, stop_token_ids=[399])),
    ],
)
def test_token_ids_of_which_one_is_left_are_accepted(accepted: pb.GenerateRequest) -> None:
    check_token_ids(accepted, EOS_TOKEN_IDS, 400)
