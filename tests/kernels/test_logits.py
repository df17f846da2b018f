"""What changes and reports logits: the definition against transformers and plain loops, the kernels against it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from kernels import reference
from kernels.logits import drop_tokens, keep_masked, keep_tokens, log_probabilities, penalize
from tests.kernels.logits_cases import VOCAB_SIZE, Case, cases
from tests.kernels.sampling_cases import make_logits, shapes

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, OUTPUT = [3, 9, 9, 14, 60], [9, 20, 20, 20, 3, 41]
TOKENS = torch.tensor(PROMPT + OUTPUT)


def some_logits() -> Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 4


def ours(**rules: object) -> Tensor:
    return reference.process_logits(some_logits(), TOKENS, len(PROMPT), **rules)  # pyright: ignore[reportArgumentType]


def by(*processors: theirs.LogitsProcessor) -> Tensor:
    scores = some_logits()[None]
    for processor in processors:
        scores = processor(TOKENS[None], scores)  # pyright: ignore
    return scores[0]


# --- the definition, against transformers' processors where there is one -----------------------------------------


@pytest.mark.parametrize("penalty", [0.3, 1.0, 1.2, 7.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    assert ours(repetition_penalty=penalty).equal(by(theirs.RepetitionPenaltyLogitsProcessor(penalty)))


@pytest.mark.parametrize("min_new_tokens", range(len(OUTPUT) - 1, len(OUTPUT) + 3))
def test_tokens_that_end_are_out_of_the_question_as_long_as_in_transformers(min_new_tokens: int) -> None:
    expected = by(theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), min_new_tokens, [7, 41]))
    assert expected.isinf().any() == (min_new_tokens > len(OUTPUT))
    assert ours(min_total_tokens=len(PROMPT) + min_new_tokens, end_token_ids=[7, 41]).equal(expected)


def test_the_logit_bias_is_transformers_sequence_bias_of_single_tokens() -> None:
    bias = {5: 3.25, 9: -100.0, 69: 0.5}
    sequence_bias = [[[token_id], value] for token_id, value in bias.items()]
    assert ours(logit_bias=bias).equal(by(theirs.SequenceBiasLogitsProcessor(sequence_bias)))  # pyright: ignore


def test_banned_tokens_are_transformers_suppressed_tokens_and_bad_words() -> None:
    expected = by(theirs.SuppressTokensLogitsProcessor([0, 41, 69]))
    assert ours(banned_token_ids=[41, 69, 0, 41]).equal(expected)
    assert expected.equal(by(theirs.NoBadWordsLogitsProcessor([[0], [41], [69]])))


def test_allowed_tokens_are_those_of_transformers_prefix_constraint() -> None:
    expected = by(theirs.PrefixConstrainedLogitsProcessor(lambda batch, tokens: [2, 41, 50], 1))
    assert ours(allowed_token_ids=[50, 2, 41]).equal(expected)
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[[2, 41, 50]] = True
    assert ours(mask=mask).equal(expected)


def test_all_of_them_apply_in_transformers_order_restrictions_first() -> None:
    expected = by(
        theirs.SuppressTokensLogitsProcessor([11]),
        theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), 20, [7]),
        theirs.SequenceBiasLogitsProcessor([[[9], -6.0], [[3], 2.0]]),  # pyright: ignore
        theirs.RepetitionPenaltyLogitsProcessor(1.5),
    )
    assert ours(
        banned_token_ids=[11], min_total_tokens=25, end_token_ids=[7], logit_bias={9: -6.0, 3: 2.0},
        repetition_penalty=1.5,
    ).equal(expected)  # fmt: skip


def test_frequency_and_presence_penalties_are_vllms_and_openais_formula() -> None:
    """vLLM's apply_penalties: logits -= frequency * output_bin_counts; logits -= presence * output_mask."""
    expected = some_logits().tolist()
    for token_id in set(OUTPUT):
        expected[token_id] -= 0.75 * OUTPUT.count(token_id) + 1.5
    actual = ours(frequency_penalty=0.75, presence_penalty=1.5)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-5)
    assert actual[14] == some_logits()[14]  # of the prompt alone


def test_the_repetition_penalty_comes_before_the_other_two() -> None:
    expected = ours(repetition_penalty=1.5)[9] - 0.5 * OUTPUT.count(9) - 0.25
    actual = ours(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25)[9]
    assert actual.item() == pytest.approx(expected.item(), abs=1e-5)


def test_log_probabilities_are_torch_log_softmax_and_ranks_a_count() -> None:
    logits, own = make_logits("few values", 4, 50, 3), torch.tensor([0, 7, 49, 7])
    token_ids, logprobs, ranks = reference.log_probabilities(logits, own, 6)
    for row, token_id in enumerate(own.tolist()):
        values = logits[row].tolist()
        order = sorted(range(50), key=lambda index: (-values[index], index))
        assert token_ids[row].tolist() == [token_id, *order[:6]]
        assert ranks[row] == 1 + sum(value > values[token_id] for value in values)
        total = math.log(math.fsum(math.exp(value) for value in values))
        assert logprobs[row].tolist() == pytest.approx([values[index] - total for index in token_ids[row]], abs=1e-5)


# --- the kernels, against the definition -------------------------------------------------------------------------


def words(mask: Tensor) -> np.ndarray:
    """As a plan carries it, with bits of no token set."""
    bits = np.ones(-(-len(mask) // 32) * 32, dtype=np.uint8)
    bits[: len(mask)] = mask.numpy()
    return np.packbits(bits, bitorder="little").view("<i4")


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_rows_are_changed_as_the_definition_says(case: Case) -> None:
    tokens, rules, logits = torch.tensor(case.token_ids), case.rules, case.logits
    expected = reference.process_logits(logits, tokens, case.num_prompt_tokens, **rules)
    if rules["mask"] is not None:
        keep_masked(logits, words(rules["mask"]))
    if rules["allowed_token_ids"]:
        keep_tokens(logits, torch.tensor(rules["allowed_token_ids"]))
    drop_tokens(logits, torch.tensor(rules["banned_token_ids"], dtype=torch.int64))
    if len(tokens) < rules["min_total_tokens"]:
        drop_tokens(logits, torch.tensor(rules["end_token_ids"], dtype=torch.int64))
    for token_id, bias in rules["logit_bias"].items():
        logits[token_id] += bias
    distinct = tokens.unique()
    counts = (distinct[:, None] == tokens[case.num_prompt_tokens :]).sum(-1).float()
    penalties = rules["repetition_penalty"], rules["frequency_penalty"], rules["presence_penalty"]
    penalize(logits, distinct, counts, *penalties)
    assert logits.equal(expected)


@settings(max_examples=300, deadline=None)
@given(
    num_rows=st.integers(1, 4),
    vocab_size=st.sampled_from([1, 2, 20, 21, 22, 300, 4000]),
    num_likeliest=st.sampled_from([0, 1, 5, 20]),
    shape=shapes,
    seed=st.integers(0, 2**32),
)
def test_log_probabilities_are_those_of_the_definition(
    num_rows: int, vocab_size: int, num_likeliest: int, shape: str, seed: int
) -> None:
    logits, num_likeliest = make_logits(shape, num_rows, vocab_size, seed), min(num_likeliest, vocab_size)
    own = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    actual = log_probabilities(logits, own, num_likeliest)
    token_ids, logprobs, ranks = reference.log_probabilities(logits, own, num_likeliest)
    assert actual[0].tolist() == token_ids.tolist()
    torch.testing.assert_close(actual[1], logprobs, rtol=1e-6, atol=1e-5)
    assert actual[2].tolist() == ranks.tolist()
    assert logits.equal(before)
