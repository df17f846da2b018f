"""What changes the logits of a sequence, through the CPU runner: against transformers' model and processors."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation import logits_process as theirs

from executor_service.plan import InvalidPlan, Sampling
from executor_service.runner.cpu_build import build_cpu_runner
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.runner.runner import STOPPED
from kernels import reference
from tests.unit.runner_harness import (
    ALONE,
    GREEDY,
    VOCAB_SIZE,
    Core,
    chunks,
    column,
    prompt,
    save_tiny_llama,
    sequence,
    tiny_settings,
)

Processor = Callable[..., Tensor]  # of token ids and scores, both [1, any], to scores: as transformers' do
RANDOM = dataclasses.replace(GREEDY, temperature=1.4, top_k=60, top_p=0.95, min_p=0.001, seed=77)
A, B, C = prompt(13, 1), prompt(30, 2), prompt(1, 3)
NUM_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(model_directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared_runner(model_directory: Path) -> CpuRunner:
    return build_cpu_runner(tiny_settings(model_directory), ALONE)


@pytest.fixture
def runner(shared_runner: CpuRunner) -> CpuRunner:
    shared_runner.reset()
    return shared_runner


def expected_tokens(
    oracle: Any, tokens: list[int], sampling: Sampling, processors: list[Processor], num_tokens: int = NUM_TOKENS
) -> list[int]:
    """Sampled one by one from transformers' scores, without a cache."""
    ids = list(tokens)
    numbers = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
    for _ in range(num_tokens):
        with torch.inference_mode():
            scores = oracle(torch.tensor([ids])).logits[:, -1].float()
        for processor in processors:
            scores = processor(torch.tensor([ids]), scores)
        columns = (torch.tensor([number]) for number in (*numbers, sampling.choice_index, len(ids)))
        ids.append(int(reference.sample(scores, *columns)))
    return ids[len(tokens) :]


def frequency_and_presence(num_prompt_tokens: int, frequency: float, presence: float) -> Processor:
    """As OpenAI and vLLM define them, in plain loops."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        scores, output = scores.clone(), ids[0, num_prompt_tokens:].tolist()
        for token_id in set(output):
            scores[0, token_id] -= output.count(token_id) * frequency
            scores[0, token_id] -= presence
        return scores

    return process


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


EVEN = list(range(0, VOCAB_SIZE, 2))
# What the sampling has, and processors that do the same to the prompt A.
RULES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "repetition": ({"repetition_penalty": 1.75}, [theirs.RepetitionPenaltyLogitsProcessor(1.75)]),
    "repetition below 1": ({"repetition_penalty": 0.5}, [theirs.RepetitionPenaltyLogitsProcessor(0.5)]),
    "frequency": ({"frequency_penalty": 1.5}, [frequency_and_presence(len(A), 1.5, 0)]),
    "frequency below 0": ({"frequency_penalty": -2.0}, [frequency_and_presence(len(A), -2, 0)]),
    "presence": ({"presence_penalty": 2.0}, [frequency_and_presence(len(A), 0, 2)]),
    "bias": (
        {"bias_token_ids": column([150, 7, 30]), "bias_values": floats(6.5, -100, 6)},
        [theirs.SequenceBiasLogitsProcessor([[[150], 6.5], [[7], -100.0], [[30], 6.0]])],  # pyright: ignore
    ),
    "allowed": (
        {"allowed_token_ids": column(EVEN)},
        [theirs.PrefixConstrainedLogitsProcessor(lambda batch, ids: EVEN, 1)],
    ),
    "banned": ({"banned_token_ids": column(EVEN)}, [theirs.SuppressTokensLogitsProcessor(EVEN)]),
    "minimum": (
        {"min_total_tokens": len(A) + 16, "end_token_ids": column(EVEN)},
        [theirs.MinNewTokensLengthLogitsProcessor(len(A), 16, EVEN)],
    ),
}
RULES["all"] = (
    RULES["repetition"][0] | RULES["frequency"][0] | RULES["presence"][0] | RULES["bias"][0] | RULES["minimum"][0]
    | {"allowed_token_ids": column(range(20, 160)), "banned_token_ids": column([21, 33, 100])},
    [
        theirs.SuppressTokensLogitsProcessor([*range(20), 21, 33, 100]), *RULES["minimum"][1], *RULES["bias"][1],
        *RULES["repetition"][1], frequency_and_presence(len(A), 1.5, 2),
    ],
)  # fmt: skip
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
BOTH = pytest.mark.parametrize("basis", [GREEDY, RANDOM], ids=["greedy", "random"])


def sampling_of(rule: str, basis: Sampling) -> Sampling:
    return dataclasses.replace(basis, **RULES[rule][0])


def start(core: Core, sampling: Sampling, **changes: Any) -> None:
    """Prefill A in slot 0, and let it decode from the next plan on."""
    core.run([sequence(0, A, [0, 1, 2, 3, 4], sampling=sampling, **changes)], **chunks((0, 0, 13, 1)))


# --- every rule --------------------------------------------------------------------------------------------------


@BOTH
@EVERY_RULE
def test_tokens_are_those_of_transformers_processors(
    runner: CpuRunner, oracle: LlamaForCausalLM, rule: str, basis: Sampling
) -> None:
    core, sampling = Core(runner), sampling_of(rule, basis)
    start(core, sampling)
    core.run(join_slots=[0], iterations=NUM_TOKENS - 1)
    assert core.tokens[0] == expected_tokens(oracle, A, sampling, RULES[rule][1])
    assert core.tokens[0] != expected_tokens(oracle, A, basis, [])  # the rule does something


@BOTH
@EVERY_RULE
def test_a_preempted_sequence_resumes_with_identical_tokens(runner: CpuRunner, rule: str, basis: Sampling) -> None:
    core, sampling = Core(runner), sampling_of(rule, basis)
    start(core, sampling)
    core.run(join_slots=[0], iterations=NUM_TOKENS - 1)
    core.run(release_slots=[0])
    for num_before in (1, 4, 18):
        known = A + core.tokens[0][:num_before]
        again = sequence(3, known, [30, 31, 32, 33, 34], sampling=sampling, num_prompt_tokens=13)
        core.run([again], **chunks((3, 0, len(known), 1)))
        core.run(join_slots=[3], iterations=NUM_TOKENS - num_before - 1)
        core.run(release_slots=[3])
        assert core.tokens.pop(3) == core.tokens[0][num_before:]


@EVERY_RULE
def test_the_other_rows_of_a_batch_sample_what_they_did(runner: CpuRunner, rule: str) -> None:
    runs = []
    for sampling in (GREEDY, sampling_of(rule, RANDOM)):
        runner.reset()
        core = Core(runner)
        core.run(
            [sequence(0, A, [0, 1, 2], sampling=sampling), sequence(1, B, [3, 4, 5, 6, 7], sampling=RANDOM),
             sequence(2, C, [8, 9])],
            **chunks((1, 0, 30, 1), (0, 0, 13, 1), (2, 0, 1, 1)),
        )  # fmt: skip
        core.run(join_slots=[0, 1, 2], iterations=8)
        runs.append(core.tokens)
    assert runs[0].pop(0) != runs[1].pop(0)
    assert runs[0] == runs[1]


# --- minimum, stop tokens, state ---------------------------------------------------------------------------------


def test_a_stop_token_is_out_of_the_question_until_the_minimum_and_then_ends(
    runner: CpuRunner, oracle: LlamaForCausalLM
) -> None:
    sampling = dataclasses.replace(GREEDY, min_total_tokens=len(A) + 4)
    core = Core(runner)
    start(core, sampling, stop_token_ids=column(EVEN))
    core.run(join_slots=[0], iterations=NUM_TOKENS)
    expected = expected_tokens(oracle, A, sampling, [theirs.MinNewTokensLengthLogitsProcessor(len(A), 4, EVEN)])
    stop = next(index for index in range(4, NUM_TOKENS) if expected[index] in EVEN)
    assert core.tokens[0] == expected[: stop + 1]
    assert core.reasons[0] == STOPPED


def test_the_host_keeps_something_only_of_slots_that_need_it_and_only_as_long(runner: CpuRunner) -> None:
    core, slots = Core(runner), runner._slots
    minimum = dataclasses.replace(GREEDY, min_total_tokens=16, end_token_ids=column([3]))
    reached = dataclasses.replace(GREEDY, min_total_tokens=13, end_token_ids=column([3]))
    penalized, reported = sampling_of("presence", GREEDY), dataclasses.replace(GREEDY, num_logprobs=1)
    of_prompt = dataclasses.replace(GREEDY, num_prompt_logprobs=1)
    samplings = [GREEDY, minimum, reached, penalized, reported, of_prompt]
    for slot, sampling in enumerate(samplings):
        core.run([sequence(slot, A, [slot * 3 + block for block in range(3)], sampling=sampling)])
    assert slots.special.keys() == {1, 3, 4}
    assert [slot for slot in slots.special if slots.special[slot]._counts] == [3]
    assert slots.prompt_reports.keys() == {5}
    for slot in range(6):
        core.run(**chunks((slot, 0, 13, 1)))
    assert not slots.prompt_reports
    core.run(join_slots=range(6), iterations=2)
    assert slots.special.keys() == {3, 4}  # slot 1 holds 16 tokens
    core.run(release_slots=range(6))
    assert not slots.special


# --- masks -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("rules", [{}, RULES["repetition"][0] | RULES["bias"][0]], ids=["alone", "beside rules"])
def test_a_mask_restricts_the_one_step_of_its_plan(
    runner: CpuRunner, oracle: LlamaForCausalLM, basis: Sampling, rules: dict[str, Any]
) -> None:
    sampling = dataclasses.replace(basis, **rules)
    masks = [range(40), EVEN, None, [159], None, [31, 32, 64]]
    core = Core(runner)
    core.run([sequence(0, A, [0, 1, 2], sampling=sampling)], masks={0: masks[0] or ()}, **chunks((0, 0, 13, 1)))
    for step, mask in enumerate(masks[1:]):
        core.run(join_slots=[] if step else [0], iterations=1, masks=None if mask is None else {0: mask})

    def constrain(ids: Tensor, scores: Tensor) -> Tensor:
        allowed = masks[ids.shape[1] - len(A)]
        return theirs.PrefixConstrainedLogitsProcessor(lambda batch, ids: list(allowed or range(160)), 1)(ids, scores)  # pyright: ignore

    processors = [constrain, *(RULES["bias"][1] + RULES["repetition"][1] if rules else [])]
    assert core.tokens[0] == expected_tokens(oracle, A, sampling, processors, len(masks))


def test_a_plan_masks_first_tokens_and_decoding_slots_and_leaves_the_others(runner: CpuRunner) -> None:
    free, masked = Core(runner), Core(runner)
    for core in (free, masked):
        runner.reset()
        core.run([sequence(0, A, [0, 1, 2]), sequence(1, B, [3, 4, 5, 6])], **chunks((0, 0, 13, 1), (1, 0, 30, 1)))
        masks = {2: [5], 0: [6]} if core is masked else None
        prefill = chunks((2, 0, 1, 1), (3, 0, 13, 1))
        new = [sequence(2, C, [8]), sequence(3, A, [9, 10, 11])]
        core.run(new, join_slots=[0, 1], iterations=1, masks=masks, **prefill)
    assert [masked.tokens[slot][-1] for slot in (0, 2)] == [6, 5]
    assert [masked.tokens[slot][-1] for slot in (1, 3)] == [free.tokens[slot][-1] for slot in (1, 3)]


@pytest.mark.parametrize(
    ("masks", "columns"),
    [
        ({1: [5]}, {"join_slots": [0], "iterations": 1}),  # does not decode
        ({0: [5]}, {"join_slots": [0]}),  # the decode set rests
        ({0: [5]}, {"leave_slots": [0], "join_slots": [0], "iterations": 1}),
        ({1: [5]}, {"iterations": 1, **chunks((1, 13, 2, 0))}),  # the chunk samples nothing
        ({3: [5]}, {"iterations": 1}),  # an empty slot
    ],
)
def test_a_mask_for_a_slot_that_does_not_sample_is_refused(
    runner: CpuRunner, masks: dict[int, list[int]], columns: dict[str, Any]
) -> None:
    core = Core(runner)
    new = [sequence(0, A, [0, 1, 2]), sequence(1, B, [3, 4, 5, 6])]
    core.run(new, **chunks((0, 0, 13, 1), (1, 0, 13, 0)))
    with pytest.raises(InvalidPlan, match="mask"):
        core.run(masks=masks, **columns)


# --- what leaves nothing -----------------------------------------------------------------------------------------


def test_a_row_whose_mask_and_rules_leave_nothing_fails_alone(runner: CpuRunner) -> None:
    """No core sends both; whatever does must not harm the others."""
    core = Core(runner)
    sampling = dataclasses.replace(RANDOM, allowed_token_ids=column([3, 4]), num_logprobs=2)
    other = dataclasses.replace(GREEDY, num_logprobs=3)
    new = [sequence(0, A, [0, 1, 2], sampling=sampling), sequence(1, C, [3, 4], sampling=other)]
    core.run(new, **chunks((0, 0, 13, 1), (1, 0, 1, 1)))
    (output,) = core.run(join_slots=[0, 1], iterations=1, masks={0: [5]})
    assert output.slot_errors == [(0, "no token can be sampled")]
    assert output.slots.tolist() == [1]
    assert len(core.logprobs[1][-1].token_ids) == 3
    (output,) = core.run(iterations=1)
    assert output.slots.tolist() == [1]


def test_a_row_whose_logits_overflow_fails_alone(runner: CpuRunner) -> None:
    core = Core(runner)
    largest = float(np.finfo(np.float32).max)
    sampling = dataclasses.replace(
        RANDOM, bias_token_ids=column([5]), bias_values=floats(largest), frequency_penalty=-largest
    )
    core.run([sequence(0, A, [0, 1, 2], sampling=sampling)], **chunks((0, 0, 13, 1)))
    core.run([sequence(1, C, [3, 4])], **chunks((1, 0, 1, 1)))
    (output,) = core.run(join_slots=[0, 1], iterations=1)
    assert (output.slot_errors, output.slots.tolist()) == ([(0, "no token can be sampled")], [1])
