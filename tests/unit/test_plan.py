"""What of a plan's sampling parameters and masks reaches the runner, and what is refused."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from executor_service.plan import InvalidPlan, Limits, Plan, Sampling, decode_plan
from protos.duet.executor.v1 import executor_pb2 as pb

VOCAB_SIZE = 70
LIMITS = Limits(
    num_slots=4, num_blocks=8, block_size=4, vocab_size=VOCAB_SIZE, max_model_len=32, max_tokens_per_step=16
)


def column(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def mask(*token_ids: int, beyond: Sequence[int] = ()) -> bytes:
    words = [0, 0, 0]
    for token_id in (*token_ids, *beyond):
        words[token_id // 32] |= 1 << token_id % 32
    return np.array(words, dtype="<u4").tobytes()


def decode(limits: Limits = LIMITS, **fields: Any) -> Plan:
    return decode_plan(pb.StepPlan(step_id=1, **fields), limits)


def decode_sequence(sampling: dict[str, Any], limits: Limits = LIMITS, **fields: Any) -> Sampling:
    """Of a sequence of two tokens."""
    sequence = {
        "token_ids": column(1, 2), "num_prompt_tokens": 2, "block_ids": column(0), "max_total_tokens": 9
    } | fields  # fmt: skip
    message = pb.NewSequence(sampling=pb.SamplingParams(**sampling), **sequence)
    return decode(limits, new_sequences=[message]).new_sequences[0].sampling


def test_every_sampling_parameter_arrives() -> None:
    sampling = decode_sequence({
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 2**64 - 1, "choice_index": 7,
        "repetition_penalty": 1.5, "frequency_penalty": -2.0, "presence_penalty": 0.75, "bias_token_ids": column(5, 69),
        "bias_values": floats(-100, 0.5), "allowed_token_ids": column(4, 5, 69), "banned_token_ids": column(4),
        "min_total_tokens": 6, "end_token_ids": column(0, 1), "num_logprobs": 21, "num_prompt_logprobs": 1,
    })  # fmt: skip
    columns = ("bias_token_ids", "bias_values", "allowed_token_ids", "banned_token_ids", "end_token_ids")
    values = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    assert {name: values.pop(name).tolist() for name in columns} == {
        "bias_token_ids": [5, 69], "bias_values": [-100.0, 0.5], "allowed_token_ids": [4, 5, 69],
        "banned_token_ids": [4], "end_token_ids": [0, 1],
    }  # fmt: skip
    assert values == {
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 2**64 - 1, "choice_index": 7,
        "repetition_penalty": 1.5, "frequency_penalty": -2.0, "presence_penalty": 0.75, "min_total_tokens": 6,
        "num_logprobs": 21, "num_prompt_logprobs": 1,
    }  # fmt: skip


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.0}, {"num_logprobs": 3}, {"temperature": 2.0}])
def test_a_repetition_penalty_of_one_or_none_changes_no_logits(sampling: dict[str, Any]) -> None:
    assert decode_sequence(sampling).repetition_penalty == 1
    assert not decode_sequence(sampling).changes_logits


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 0.5},
        {"frequency_penalty": -1.0},
        {"presence_penalty": 1.0},
        {"bias_token_ids": column(3), "bias_values": floats(0.5)},
        {"allowed_token_ids": column(3)},
        {"banned_token_ids": column(3)},
        {"min_total_tokens": 1},
    ],
)
def test_what_may_change_logits_is_said_to(sampling: dict[str, Any]) -> None:
    assert decode_sequence(sampling).changes_logits


ALL_TOKENS = column(*range(VOCAB_SIZE))
REFUSED = [
    *[
        (name, {name: value})
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
        )
        for value in (math.nan, math.inf, -math.inf)
    ],
    ("repetition_penalty", {"repetition_penalty": -0.5}),
    ("choice_index", {"choice_index": 2**31}),
    *[
        (name, {name: value})
        for name in ("bias_token_ids", "allowed_token_ids", "banned_token_ids", "end_token_ids")
        for value in (column(VOCAB_SIZE), column(-1), b"123")
    ],
    ("bias_values", {"bias_token_ids": column(1)}),
    ("bias_values", {"bias_values": floats(1)}),
    ("bias_values", {"bias_token_ids": column(1, 2), "bias_values": floats(1, math.nan)}),
    ("bias_values", {"bias_token_ids": column(1), "bias_values": floats(math.inf)}),
    ("bias_values", {"bias_token_ids": column(1), "bias_values": b"12345"}),
    ("bias_token_ids", {"bias_token_ids": column(1, 1), "bias_values": floats(1, 2)}),
    ("num_logprobs", {"num_logprobs": 22}),
    ("num_prompt_logprobs", {"num_prompt_logprobs": 22}),
    ("no token is allowed", {"allowed_token_ids": column(3, 4), "banned_token_ids": column(4, 3)}),
    ("no token is allowed", {"banned_token_ids": ALL_TOKENS}),
    ("no token is allowed", {"allowed_token_ids": column(3), "end_token_ids": column(3), "min_total_tokens": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("word", "sampling"), REFUSED)
def test_a_malformed_sampling_parameter_is_refused_by_name(word: str, sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan, match=word):
        decode_sequence(sampling)


def test_stop_tokens_count_among_those_that_min_total_tokens_rules_out() -> None:
    sampling = {"allowed_token_ids": column(3, 4), "end_token_ids": column(3), "min_total_tokens": 3}
    assert decode_sequence(sampling).allowed_token_ids.tolist() == [3, 4]
    with pytest.raises(InvalidPlan, match="no token is allowed"):
        decode_sequence(sampling, stop_token_ids=column(4))
    assert decode_sequence(sampling | {"min_total_tokens": 2}, stop_token_ids=column(4))  # it holds two already


def test_prompt_logprobs_take_no_cached_tokens() -> None:
    assert decode_sequence({"num_prompt_logprobs": 1}, num_cached_tokens=0)
    with pytest.raises(InvalidPlan, match="num_prompt_logprobs"):
        decode_sequence({"num_prompt_logprobs": 1}, num_cached_tokens=1)


@pytest.mark.parametrize("name", ["num_logprobs", "num_prompt_logprobs"])
def test_no_more_tokens_are_reported_than_there_are(name: str) -> None:
    tiny = Limits(4, 8, 4, 5, 32, 16)
    assert getattr(decode_sequence({name: 6}, tiny), name) == 6  # the token itself, and all five
    with pytest.raises(InvalidPlan, match=name):
        decode_sequence({name: 7}, tiny)


def test_masks_arrive_as_one_row_of_words_for_each_slot() -> None:
    plan = decode(mask_slots=column(3, 0), masks=mask(0, 33) + mask(31, 69), iterations=1)
    assert plan.mask_slots.tolist() == [3, 0]
    assert plan.masks.view(np.uint32).tolist() == [[1, 2, 0], [2**31, 0, 2**5]]
    assert decode().masks.shape == (0, 3)


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("mask_slots", {"mask_slots": column(4), "masks": mask(1)}),
        ("mask_slots", {"mask_slots": b"1", "masks": mask(1)}),
        ("masks", {"mask_slots": column(0)}),
        ("masks", {"masks": mask(1)}),
        ("masks", {"mask_slots": column(0, 1), "masks": mask(1)}),
        ("masks", {"mask_slots": column(0), "masks": mask(1)[:-1]}),
        ("masks: no token is allowed", {"mask_slots": column(0, 1), "masks": mask(1) + mask()}),
        ("masks: no token is allowed", {"mask_slots": column(0), "masks": mask(beyond=[70, 95])}),
        ("iterations", {"mask_slots": column(0), "masks": mask(1), "iterations": 2}),
    ],
)
def test_a_malformed_mask_is_refused(word: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan, match=word):
        decode(**fields)


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 64])
def test_the_last_token_alone_may_be_allowed_whatever_the_size_of_the_vocabulary(vocab_size: int) -> None:
    limits = Limits(4, 8, 4, vocab_size, 32, 16)
    words = np.zeros(-(-vocab_size // 32), dtype="<u4")
    words[-1] = 1 << (vocab_size - 1) % 32
    assert decode(limits, mask_slots=column(0), masks=words.tobytes()).masks.any()
    words[-1] = 1 << vocab_size % 32  # one further, if there is one in the word
    if vocab_size % 32:
        with pytest.raises(InvalidPlan, match="no token is allowed"):
            decode(limits, mask_slots=column(0), masks=words.tobytes())
