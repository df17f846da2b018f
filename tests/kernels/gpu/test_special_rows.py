"""Rows whose logits are changed or reported, through real plans: the GPU's runner against the CPU's, in float32."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from executor_service.plan import NewSequence, Plan, Sampling
from executor_service.runner.gpu.gpu_runner import GpuRunner
from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.special_sampler import SpecialSampler
from executor_service.runner.runner import Runner, StepOutput
from tests.kernels.gpu.test_gpu_runner import (
    GREEDY,
    PROMPTS,
    SEEDED,
    VOCAB_SIZE,
    chunk,
    column,
    no_cuda,
    oracle,
    plain,
    plan,
    run,
    runner,
    sequence,
    settings,
)

__all__ = ["no_cuda", "oracle", "runner", "settings"]  # fixtures

EVEN = tuple(range(0, VOCAB_SIZE, 2))
STEPS = 5


def asks(sampling: Sampling = GREEDY, **changes: Any) -> Sampling:
    values = dict(changes)
    for name in ("bias_token_ids", "allowed_token_ids", "banned_token_ids", "end_token_ids"):
        if name in values:
            values[name] = column(values[name])
    if "bias_values" in values:
        values["bias_values"] = np.array(values["bias_values"], np.float32)
    return dataclasses.replace(sampling, **values)


EVERYTHING = asks(
    SEEDED, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=-0.2, bias_token_ids=[90, 3, 150],
    bias_values=[2.5, -1.25, 4.0], banned_token_ids=[7, 11], num_logprobs=4,
)  # fmt: skip
FREE = asks(SEEDED, top_k=0, top_p=1.0, min_p=0.0)  # filters take the interpreter long
AGAIN = asks(bias_token_ids=[150, 20], bias_values=[8.0, 7.0])  # so that tokens repeat
# Four sequences at once, for the interpreter's sake.
CASES: dict[str, dict[str, Sampling]] = {
    "penalties": {
        "repetition": asks(AGAIN, repetition_penalty=1.8),
        "repetition of the prompt": asks(repetition_penalty=1.8, bias_token_ids=PROMPTS[0], bias_values=[9.0] * 5),
        "frequency": asks(AGAIN, frequency_penalty=1.5),
        "presence": asks(AGAIN, presence_penalty=1.9),
    },
    "biases and sets": {
        "rewards": asks(frequency_penalty=-1.7, presence_penalty=-2.0, repetition_penalty=0.5),
        "biases": asks(bias_token_ids=[150, 20, 21], bias_values=[3.0, 5.0, 4.5]),
        "allowed": asks(SEEDED, allowed_token_ids=[159, 31, 32, 64, 65, 90]),
        "allowed without filters": asks(FREE, allowed_token_ids=EVEN),
    },
    "the rest": {
        "banned": asks(FREE, banned_token_ids=EVEN),
        "one left": asks(FREE, allowed_token_ids=[31, 33], banned_token_ids=[31]),
        "log-probabilities": asks(FREE, num_logprobs=21),
        "everything": EVERYTHING,
    },
}


def decoding(samplings: Sequence[Sampling], iterations: int = 2, **changes: Any) -> list[Plan]:
    """A sequence from slot 0 on for each of `samplings`, STEPS tokens each."""
    slots, n = range(len(samplings)), len(samplings)
    new = [sequence(slot, PROMPTS[0], [slot], sampling=one, **changes) for slot, one in enumerate(samplings)]
    plans = [plan(1, new, **chunk(slots, [0] * n, [len(PROMPTS[0])] * n, [1] * n))]
    for step in range(2, STEPS + 1, iterations):
        plans.append(plan(step, [], iterations, join_slots=slots if step == 2 else ()))
    return plans


def assert_equal(ours: Sequence[StepOutput], theirs: Sequence[StepOutput]) -> None:
    assert plain(ours) == plain(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.logprobs is None) == (their.logprobs is None)
        if our.logprobs and their.logprobs:
            assert our.logprobs.token_ids.tolist() == their.logprobs.token_ids.tolist()
            assert our.logprobs.ranks.tolist() == their.logprobs.ranks.tolist()
            np.testing.assert_allclose(our.logprobs.logprobs, their.logprobs.logprobs, rtol=1e-4, atol=1e-4)
        assert len(our.prompt_logprobs) == len(their.prompt_logprobs)
        for part, other in zip(our.prompt_logprobs, their.prompt_logprobs, strict=True):
            assert (part.slot, part.start) == (other.slot, other.start)
            assert part.token_ids.tolist() == other.token_ids.tolist()
            assert part.ranks.tolist() == other.ranks.tolist()
            np.testing.assert_allclose(part.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


def tokens_of(outputs: Sequence[StepOutput], slot: int = 0) -> list[int]:
    return [int(token) for output in outputs for token in output.token_ids[output.slots == slot]]


@pytest.fixture
def both(runner: GpuRunner, oracle: Runner) -> Callable[[Sequence[Plan]], list[StepOutput]]:
    """Runs plans on both, which start empty, and returns the outputs that both agree on."""

    def run_both(plans: Sequence[Plan]) -> list[StepOutput]:
        runner.reset()
        oracle.reset()
        ours = run(runner, plans)
        assert_equal(ours, run(oracle, plans))
        return ours

    return run_both


def without(sampling: Sampling) -> Sampling:
    """The same without its penalties, or, where it has none, without what it asks for besides."""
    if sampling.has_penalties and sampling is not EVERYTHING:
        return asks(sampling, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    names = "temperature", "top_k", "top_p", "min_p", "seed", "choice_index"
    return dataclasses.replace(GREEDY, **{name: getattr(sampling, name) for name in names})


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_every_parameter_gives_the_cpus_tokens_and_log_probabilities(
    cases: dict[str, Sampling], both: Any, oracle: Runner
) -> None:
    outputs = both(decoding(list(cases.values())))
    oracle.reset()
    others = run(oracle, decoding([without(sampling) for sampling in cases.values()]))
    for slot, (name, sampling) in enumerate(cases.items()):
        assert len(tokens_of(outputs, slot)) == STEPS
        does_something = tokens_of(outputs, slot) != tokens_of(others, slot)
        assert does_something == sampling.changes_logits, name


@pytest.mark.parametrize("iterations", [1, 4])
def test_a_mixed_batch_gives_each_row_what_it_asks_for_and_the_others_what_they_get_alone(
    iterations: int, both: Any, oracle: Runner
) -> None:
    special = both(decoding([FREE, EVERYTHING, asks(num_logprobs=3), GREEDY], iterations))
    oracle.reset()
    ordinary = run(oracle, decoding([FREE, GREEDY, GREEDY, GREEDY], iterations))
    for slot in (0, 2, 3):
        assert tokens_of(special, slot) == tokens_of(ordinary, slot)
    assert tokens_of(special, 1) != tokens_of(ordinary, 1)
    for output in special:
        assert output.logprobs is not None
        assert len(output.logprobs.token_ids) == 4 + 3
        assert output.logprobs.token_ids[[0, 4]].tolist() == output.token_ids[[1, 2]].tolist()
    assert all(output.logprobs is None for output in ordinary)


def test_min_total_tokens_bans_stop_and_end_tokens_until_it_is_reached(both: Any, oracle: Runner) -> None:
    free = tokens_of(run(oracle, decoding([GREEDY])))
    end, stop = free[0], free[1]
    least = len(PROMPTS[0]) + 3
    pushed = asks(min_total_tokens=least, end_token_ids=[end], bias_token_ids=[end], bias_values=[50.0])
    samplings = [pushed, asks(min_total_tokens=least), asks(min_total_tokens=3)]
    outputs = both(decoding(samplings, stop_token_ids=column([stop])))
    for slot in (0, 1):
        assert stop not in tokens_of(outputs, slot)[:3]
    assert end not in tokens_of(outputs)[:3]
    assert tokens_of(outputs)[3:] == [end] * (STEPS - 3)  # which is no stop token: the sequence goes on
    assert tokens_of(outputs, 2) == [end, stop]


def test_penalties_count_what_was_generated_before_a_preemption(both: Any, oracle: Runner) -> None:
    sampling = asks(AGAIN, repetition_penalty=1.1, frequency_penalty=1.5, presence_penalty=0.5)
    whole = tokens_of(run(oracle, decoding([sampling])))
    known = [*PROMPTS[0], *whole[:2]]
    again = NewSequence(0, column(known), len(PROMPTS[0]), 0, column([2]), sampling, column([]), 64)
    other = dataclasses.replace(again, slot=1, block_ids=column([3]), num_prompt_tokens=len(known))
    n = len(known)
    plans = [plan(1, [again, other], **chunk([0, 1], [0, 0], [n, n], [1, 1])), plan(2, [], 2, join_slots=[0, 1])]
    outputs = both(plans)
    assert tokens_of(outputs, 0) == whole[2:]
    assert tokens_of(outputs, 1) != whole[2:]  # the prompt's: frequency and presence do not count it


def test_a_slot_that_is_taken_again_has_nothing_left_of_what_was_asked_before(both: Any) -> None:
    second = [
        plan(6, [sequence(0, PROMPTS[0], [2])], release_slots=[0, 1], **chunk([0], [0], [5], [1])),
        plan(7, [], STEPS - 1, join_slots=[0]),
    ]
    outputs = both([*decoding([EVERYTHING, GREEDY]), *second])
    assert tokens_of(outputs)[STEPS:] == tokens_of(outputs, 1)[:STEPS]
    assert all(output.logprobs is None for output in outputs[STEPS:])


def masks(*allowed: Sequence[int]) -> NDArray[np.int32]:
    bits = np.zeros((len(allowed), -(-VOCAB_SIZE // 32) * 32), np.uint8)
    for row, tokens in zip(bits, allowed, strict=True):
        row[list(tokens)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def test_masks_hold_for_their_slots_in_their_plan_in_both_phases(both: Any) -> None:
    new = [sequence(slot, PROMPTS[0], [2 * slot, 2 * slot + 1], sampling=one)
           for slot, one in enumerate([GREEDY, FREE, asks(FREE, presence_penalty=0.5)])]  # fmt: skip
    plans = [
        plan(1, new[:2], **chunk([0, 1], [0, 0], [5, 5], [1, 1]), mask_slots=[1, 0]),
        plan(2, new[2:], 1, join_slots=[0, 1], mask_slots=[2, 1], **chunk([2], [0], [5], [1])),
        plan(3, [], 1, join_slots=[2]),
        plan(4, [], 1, mask_slots=[0, 2, 1]),
        plan(5, [], 2),
    ]
    for index, allowed in ((0, [EVEN, [159]]), (1, [[31, 32], [7]]), (3, [[3], EVEN, [127, 128]])):
        plans[index] = dataclasses.replace(plans[index], masks=masks(*allowed))
    outputs = both(plans)
    by_step = [dict(zip(o.slots.tolist(), o.token_ids.tolist(), strict=True)) for o in outputs]
    assert by_step[0][0] == 159
    assert by_step[0][1] in EVEN
    assert by_step[1] == {2: by_step[1][2]}  # the first tokens leave when their prefill phase ends
    assert by_step[1][2] in (31, 32)
    assert by_step[2][1] == 7
    assert by_step[4][0] == 3
    assert by_step[4][1] in (127, 128)
    assert by_step[4][2] in EVEN


def test_a_slot_of_which_a_mask_leaves_nothing_fails_alone(both: Any) -> None:
    plans = decoding([GREEDY, asks(banned_token_ids=[8]), GREEDY], iterations=1)
    plans[2] = dataclasses.replace(plans[2], mask_slots=column([1]), masks=masks([8]))
    outputs = both(plans)
    assert [output.slot_errors for output in outputs] == [[], [], [(1, "no token can be sampled")], [], []]
    assert [len(output.slots) for output in outputs] == [3, 3, 2, 2, 2]


def test_prompts_are_reported_over_chunks_beside_others(both: Any) -> None:
    prompt, asked = PROMPTS[1], asks(num_prompt_logprobs=5, num_logprobs=2)
    new = [
        sequence(0, prompt, [0, 1], sampling=asked), sequence(2, prompt[:1], [4], sampling=asked),
        sequence(1, PROMPTS[2][:12], [2], sampling=asks(num_prompt_logprobs=1)),
    ]  # fmt: skip
    plans = [
        plan(1, new, **chunk([1, 0, 2], [0, 0, 0], [12, 9, 1], [1, 0, 1])),
        plan(2, [], 1, join_slots=[1], **chunk([0], [9], [3], [0])),
        plan(3, [], 1, **chunk([0], [12], [9], [1])),
    ]
    outputs = both(plans)
    parts = [part for output in outputs for part in output.prompt_logprobs]
    assert [(part.slot, part.start, len(part.ranks)) for part in parts] == [
        (1, 1, 11),
        (0, 1, 9),
        (0, 10, 3),
        (0, 13, 8),
    ]
    assert parts[0].token_ids.tolist() == PROMPTS[2][1:12]
    own = np.concatenate([part.token_ids.reshape(-1, 5)[:, 0] for part in parts[1:]])
    assert own.tolist() == prompt[1:]
    assert all(np.isfinite(part.logprobs).all() for part in parts)


def test_what_was_generated_before_a_preemption_is_no_part_of_a_prompt(both: Any) -> None:
    known, num_prompt = PROMPTS[1], 8
    new = NewSequence(1, column(known), num_prompt, 0, column([2, 3]), asks(num_prompt_logprobs=2), column([]), 64)
    outputs = both([plan(1, [new], **chunk([1], [0], [5], [0])), plan(2, [], **chunk([1], [5], [16], [1]))])
    parts = [part for output in outputs for part in output.prompt_logprobs]
    assert [(part.start, len(part.ranks)) for part in parts] == [(1, 5), (6, 2)]


def test_prompts_longer_than_the_rows_at_once_are_reported_in_slices(runner: GpuRunner, both: Any) -> None:
    """The logits of as many rows as there are slots are in memory."""
    assert len(runner._known) < 21
    outputs = both([plan(1, [sequence(1, PROMPTS[1], [2, 3], sampling=asks(num_prompt_logprobs=3))],
                         **chunk([1], [0], [21], [1]))])  # fmt: skip
    assert len(outputs[0].prompt_logprobs[0].ranks) == 20


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_special_row_without_finite_logits_fails_alone(value: float, runner: GpuRunner) -> None:
    """Though the token whose logit is not finite is banned; the tokens of the others are counted as ever."""
    other = asks(presence_penalty=1.0, num_logprobs=2)
    expected = run(runner, decoding([other]))
    runner.reset()
    embedding = runner._graphs._program._model._embedding.weight
    embedding[149] = value
    bad = asks(EVERYTHING, banned_token_ids=range(100, 160), num_prompt_logprobs=2)
    first, second, *rest = decoding([other])
    first.new_sequences.append(sequence(3, [149] * 9, [6], sampling=bad))
    columns = chunk([3, 0], [0, 0], [9, 5], [1, 1])
    first = plan(1, first.new_sequences, **columns)
    outputs = run(runner, [first, dataclasses.replace(second, join_slots=column([0, 3])), *rest])
    assert [output.slot_errors for output in outputs] == [[(3, "non-finite logits")], *([[]] * (STEPS - 1))]
    assert tokens_of(outputs) == tokens_of(expected)
    assert not outputs[0].prompt_logprobs


def test_a_prompt_with_a_logit_that_is_not_finite_fails_its_slot(runner: GpuRunner) -> None:
    """Though the last position's logits are finite: what is told of a prompt must be."""
    sampler = runner._graphs._program._special
    report = sampler.report_prompts

    def spoiled(prompts: PromptRows, compute_logits: Any) -> torch.Tensor:
        told = report(prompts, compute_logits)
        told[2, 21:42] = int(np.float32(np.nan).view(np.int32))
        return told

    sampling = asks(num_prompt_logprobs=2)
    plans = [
        plan(1, [sequence(1, PROMPTS[1], [2, 3], sampling=sampling), sequence(0, PROMPTS[0], [0])],
             **chunk([1, 0], [0, 0], [10, 5], [0, 1])),
        plan(2, [], **chunk([1], [10], [11], [1])),
    ]  # fmt: skip
    sampler.report_prompts = spoiled
    launched = list(runner.execute(plans[0]))
    sampler.report_prompts = report
    launched += runner.execute(plans[1])
    outputs = [pending.wait() for pending in launched]
    assert [output.slot_errors for output in outputs] == [[], [(1, "non-finite logits")]]
    assert [output.slots.tolist() for output in outputs] == [[0], []]
    assert [output.prompt_logprobs for output in outputs] == [[], []]


def test_an_ordinary_step_launches_nothing_for_special_rows(
    runner: GpuRunner, oracle: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not behind min_total_tokens, nor where a special sequence samples nothing yet, nor in a slot that one had."""
    early = asks(min_total_tokens=7, end_token_ids=[3])
    waiting = sequence(3, PROMPTS[0], [8], sampling=EVERYTHING)
    plans = [
        plan(1, [sequence(1, PROMPTS[0], [2], sampling=early), waiting], **chunk([1], [0], [5], [1])),
        plan(2, [], 1, join_slots=[1]),
        plan(3, [], 1, **chunk([3], [0], [3], [0])),
        plan(4, [sequence(3, PROMPTS[0], [9])], 1, release_slots=[3], **chunk([3], [0], [5], [1])),
        plan(5, [], 1, join_slots=[3]),
    ]
    special = run(runner, plans[:2])
    launches: list[str] = []
    for name in ("keep", "sample", "report_prompts"):
        monkeypatch.setattr(SpecialSampler, name, lambda *_, name=name: launches.append(name))
    ordinary = run(runner, plans[2:])
    assert plain([*special, *ordinary]) == plain(run(oracle, plans))
    assert launches == []
    mask = masks([5])
    with pytest.raises(AttributeError):  # the patched sampler returns nothing
        run(runner, [dataclasses.replace(plan(6, [], 1), mask_slots=column([1]), masks=mask)])
    assert launches == ["keep", "sample"]
