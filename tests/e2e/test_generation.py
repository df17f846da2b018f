"""What comes back: tokens, text, counts, reasons."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from duet import Output, SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import System
from tests.small_model import EOS

HELLO = "The quick brown 世界 fox 😀 jumps"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def test_texts_joined_are_the_decoded_tokens_and_never_half_a_character(server: System, tokenizer: Tokenizer) -> None:
    """Random weights make random bytes: most of what is generated is no character."""
    for skip in (True, False):
        params = SamplingParams(temperature=1.5, seed=4, max_tokens=200, ignore_eos=True, skip_special_tokens=skip)
        output = server.client.generate(HELLO, params)
        assert len(output.token_ids) == 200
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=skip)
        assert "\ufffd" in output.text


def test_real_characters_are_streamed_whole(server: System, tokenizer: Tokenizer) -> None:
    """Token by token, as the model makes them: the text so far is always the beginning of the whole text."""
    params = SamplingParams(temperature=1.5, seed=4, max_tokens=300, ignore_eos=True)
    text, token_ids = "", []
    for event in server.client.stream(HELLO, params):
        if isinstance(event, pb.TokenDelta):
            assert event.offset == len(token_ids)
            token_ids += event.token_ids
            text += event.text
            assert text == tokenizer.decode(token_ids)


def test_text_and_its_token_ids_are_the_same_prompt(server: System, tokenizer: Tokenizer) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ids = tokenizer.encode(HELLO).ids
    from_text, from_ids = server.client.generate(HELLO, greedy), server.client.generate(ids, greedy)
    assert from_text.token_ids == from_ids.token_ids
    assert from_text.prompt_tokens == from_ids.prompt_tokens == len(ids)


def test_chat_is_rendered_with_the_models_template_and_its_parts_joined(server: System, tokenizer: Tokenizer) -> None:
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello, 世界!<|im_end|>\n<|im_start|>assistant\n"
    )
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = server.client.generate(tokenizer.encode(rendered).ids, greedy)
    system = {"role": "system", "content": "Be brief."}
    whole = {"role": "user", "content": "Hello, 世界!"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "世界!"}]}
    for chat in ([system, whole], [system, parts]):
        output = server.client.generate(chat, greedy)
        assert (output.token_ids, output.prompt_tokens) == (expected.token_ids, expected.prompt_tokens)


def test_same_seed_gives_the_same_tokens_and_another_seed_others(server: System) -> None:
    def generate(seed: int | None) -> Output:
        return server.client.generate(HELLO, SamplingParams(temperature=1, seed=seed, max_tokens=30, ignore_eos=True))

    first = generate(7)
    assert generate(7).token_ids == first.token_ids
    assert generate(8).token_ids != first.token_ids
    drawn = generate(None)
    assert generate(None).seed != drawn.seed
    assert generate(drawn.seed).token_ids == drawn.token_ids, "the server tells the seed that it drew"
    assert generate(2**64 - 1).seed == 2**64 - 1


def test_seeded_tokens_do_not_depend_on_what_else_runs(server: System) -> None:
    params = SamplingParams(temperature=1, seed=7, max_tokens=40, ignore_eos=True)
    alone = server.client.generate(HELLO, params).token_ids
    with server.endless(), server.endless():
        assert server.client.generate(HELLO, params).token_ids == alone


def test_sampling_parameters_narrow_the_choice(server: System) -> None:
    free = SamplingParams(temperature=1, seed=3, max_tokens=20, ignore_eos=True)
    greedy = server.client.generate(HELLO, dataclasses.replace(free, temperature=0)).token_ids
    assert server.client.generate(HELLO, free).token_ids != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert server.client.generate(HELLO, dataclasses.replace(free, **narrow)).token_ids == greedy, narrow


def test_stop_token_ends_the_stream_is_counted_and_is_not_spoken(server: System, tokenizer: Tokenizer) -> None:
    free = server.client.generate(HELLO, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)).token_ids
    stop = free[9]
    end = free.index(stop) + 1
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[399, stop])
    output = server.client.generate(HELLO, params)
    assert output.token_ids == free[:end]
    assert (output.finish_reason, output.stop_token_id) == ("stop", stop)
    assert output.text == tokenizer.decode(free[: end - 1])


def test_end_of_sequence_ends_the_stream_unless_it_is_ignored(server: System) -> None:
    def generate(seed: int, *, ignore_eos: bool) -> Output:
        params = SamplingParams(temperature=3, seed=seed, max_tokens=200, ignore_eos=ignore_eos)
        return server.client.generate(HELLO, params)

    free = (generate(seed, ignore_eos=True) for seed in itertools.count())
    seed, tokens = next((seed, one.token_ids) for seed, one in enumerate(free) if {0, EOS} & set(one.token_ids))
    end = min(tokens.index(token) for token in {0, EOS} & set(tokens))
    output = generate(seed, ignore_eos=False)
    assert (len(tokens), output.token_ids) == (200, tokens[: end + 1])
    assert (output.finish_reason, output.stop_token_id) == ("stop", tokens[end])


def test_prefix_is_shared_only_within_a_salt(server: System) -> None:
    prompt = list(range(100, 171))  # 71 tokens: four whole blocks of 16, and seven more

    def cached(salt: str | None) -> int:
        params = SamplingParams(temperature=0, max_tokens=2)
        return server.client.generate(prompt, params, **({} if salt is None else {"cache_salt": salt})).cached_tokens

    assert [cached("mine"), cached("mine")] == [0, 64]
    assert [cached("yours"), cached("yours")] == [0, 64]
    assert [cached(None), cached(""), cached("mine")] == [0, 64, 64]


def test_answer_over_a_cached_prefix_is_the_same(server: System) -> None:
    prompt = list(range(200, 300))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    cold, warm = server.client.generate(prompt, params), server.client.generate(prompt, params)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 96)
    assert warm.token_ids == cold.token_ids


def test_first_event_tells_id_counts_and_seed(server: System) -> None:
    request = pb.GenerateRequest(text=HELLO, stop=pb.StopConditions(max_tokens=1))
    started, *_ = list(server.stub.Generate(request))
    assert len(started.started.request_id) >= 8
    assert started.started.prompt_tokens > 0
    named = pb.GenerateRequest(text=HELLO, request_id="named", sampling=pb.SamplingParams(seed=5))
    named.stop.max_tokens = 1
    started, *_ = list(server.stub.Generate(named))
    assert (started.started.request_id, started.started.seed) == ("named", 5)
