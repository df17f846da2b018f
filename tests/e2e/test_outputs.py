"""Choices, stop strings, log-probabilities and echoes of a running pair of services."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from duet import SamplingParams
from tests.e2e.system import System

HELLO = "The quick brown fox jumps over the lazy dog, and the scheduler sends one plan for every step of the way."
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=5, max_tokens=30, ignore_eos=True)
CLOSE = 2e-3  # between logarithms of probabilities that were computed in chunks of other sizes, in float32


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


# --- stop strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_first_stands(server: System, tokenizer: Tokenizer, include: bool) -> None:
    """Cut out of what comes without it, of one character and of several tokens."""
    whole = server.client.generate(HELLO, GREEDY)
    for start, length in itertools.product((0, 7, 20), (1, 6)):
        stop = whole.text[start : start + length]
        params = dataclasses.replace(GREEDY, stop=stop, include_stop_str_in_output=include)
        output = server.client.generate(HELLO, params)
        end = whole.text.find(stop) + len(stop)
        assert output.text == whole.text[: end if include else end - len(stop)]
        assert (output.finish_reason, output.stop_string, output.stop_token_id) == ("stop", stop, None)
        count = len(output.token_ids)
        assert output.token_ids == whole.token_ids[:count]
        assert output.output_tokens == count
        assert len(tokenizer.decode(whole.token_ids[:count])) >= end


def test_a_stop_string_that_never_comes_changes_nothing(server: System) -> None:
    whole = server.client.generate(HELLO, GREEDY)
    output = server.client.generate(HELLO, dataclasses.replace(GREEDY, stop=["\x00never", whole.text + "!"]))
    assert (output.text, output.token_ids) == (whole.text, whole.token_ids)
    assert (output.finish_reason, output.stop_string) == ("length", None)


# --- choices -----------------------------------------------------------------------------------------------------


def test_choices_differ_by_their_noise_alone_and_the_first_is_that_of_a_single_one(server: System) -> None:
    alone = server.client.generate(HELLO, SEEDED)
    output = server.client.generate(HELLO, dataclasses.replace(SEEDED, n=4))
    assert output.token_ids == alone.token_ids
    assert len({tuple(choice.token_ids) for choice in output.choices}) == 4
    again = server.client.generate(HELLO, dataclasses.replace(SEEDED, n=4))
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in output.choices]
    greedy = server.client.generate(HELLO, dataclasses.replace(GREEDY, n=3))
    assert len({choice.text for choice in greedy.choices}) == 1


def test_choices_share_the_full_blocks_of_their_prompt(server: System) -> None:
    """A prompt of 40 tokens holds two full blocks of 16; the first choice computes them."""
    prompt = [6, *range(20, 59)]
    params = dataclasses.replace(SEEDED, n=3, max_tokens=4)
    output = server.client.generate(prompt, params, cache_salt="shared")
    assert [choice.cached_tokens for choice in output.choices] == [0, 32, 32]


def test_choices_end_by_themselves(server: System) -> None:
    free = server.client.generate(HELLO, dataclasses.replace(SEEDED, n=3))
    last = free.choices[1].text[10:14]
    output = server.client.generate(HELLO, dataclasses.replace(SEEDED, n=3, stop=last))
    for choice, whole in zip(output.choices, free.choices, strict=True):
        cut = whole.text.find(last)
        assert choice.text == (whole.text if cut < 0 else whole.text[:cut])
    assert output.choices[1].stop_string == last


# --- log-probabilities and the prompt ----------------------------------------------------------------------------


def reference(model: Path, token_ids: list[int]) -> torch.Tensor:  # [num_tokens - 1, vocab_size] float32
    """transformers' logarithms of the probabilities of each token but the first."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(loaded(torch.tensor([token_ids])).logits[0, :-1], dim=-1)


def test_log_probabilities_are_those_of_transformers(server: System, tiny_model: Path, tokenizer: Tokenizer) -> None:
    """Of what was sampled at another temperature, penalised and biased: the model's own, before all of that."""
    params = dataclasses.replace(
        SEEDED, temperature=1.5, repetition_penalty=1.3, logit_bias={7: 2.0}, logprobs=3, prompt_logprobs=2
    )
    output = server.client.generate(HELLO, params)
    assert output.logprobs is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_token_ids == tokenizer.encode(HELLO).ids
    rows = reference(tiny_model, [*output.prompt_token_ids, *output.token_ids])
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    token_ids = [*output.prompt_token_ids[1:], *output.token_ids]
    for position, (row, entry, token_id) in enumerate(zip(rows, entries, token_ids, strict=True)):
        assert entry is not None
        num_top = 2 if position < len(output.prompt_logprobs) - 1 else 3
        assert next(iter(entry)) == token_id
        assert entry[token_id].logprob == pytest.approx(float(row[token_id]), abs=CLOSE)
        likelier = int((row > row[token_id] + CLOSE).sum())
        assert likelier + 1 <= entry[token_id].rank <= int((row > row[token_id] - CLOSE).sum()) + 1
        top = sorted((one for one in entry.values()), key=lambda one: one.rank)[:num_top]
        assert [one.logprob for one in top] == pytest.approx(row.topk(num_top).values.tolist(), abs=CLOSE)
    assert output.cumulative_logprob == pytest.approx(
        sum(entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs, strict=True))
    )


def test_a_prompt_with_log_probabilities_takes_nothing_from_the_cache_and_changes_no_token(server: System) -> None:
    plain = server.client.generate(HELLO, GREEDY)
    warm = server.client.generate(HELLO, GREEDY)
    assert warm.cached_tokens > 0
    output = server.client.generate(HELLO, dataclasses.replace(GREEDY, prompt_logprobs=0, n=2))
    assert output.token_ids == plain.token_ids
    assert output.cached_tokens == 0


def test_an_echo_is_the_prompt_that_was_continued(server: System, tokenizer: Tokenizer) -> None:
    params = dataclasses.replace(GREEDY, truncate_prompt_tokens=9)
    output = server.client.generate(HELLO, params, echo=True)
    assert output.prompt_token_ids == tokenizer.encode(HELLO).ids[-9:]
    assert output.prompt == tokenizer.decode(output.prompt_token_ids)
    assert output.prompt_tokens == 9
    assert server.client.generate(output.prompt_token_ids, GREEDY).token_ids == output.token_ids


def test_times_are_told(server: System) -> None:
    output = server.client.generate(HELLO, GREEDY)
    assert output.time_to_first_token_s is not None
    assert 0 <= output.queue_time_s < output.time_to_first_token_s < 60
