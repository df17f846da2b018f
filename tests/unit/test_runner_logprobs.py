"""Log-probabilities that the CPU runner reports, against log_softmax of transformers' logits."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from executor_service.plan import NewSequence
from executor_service.runner import prompt_report
from executor_service.runner.cpu_build import build_cpu_runner
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.runner.cpu_steps import ComputeLogits
from executor_service.runner.step_inputs import PrefillInputs
from tests.unit.runner_harness import (
    ALONE,
    GREEDY,
    VOCAB_SIZE,
    Core,
    Reported,
    chunks,
    column,
    prompt,
    save_tiny_llama,
    sequence,
    tiny_settings,
)

RANDOM = dataclasses.replace(GREEDY, temperature=2.0, seed=5, num_logprobs=21)
A, B, C = prompt(13, 1), prompt(30, 2), prompt(1, 3)


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


def log_softmax(oracle: LlamaForCausalLM, tokens: Sequence[int]) -> Tensor:
    """Of what follows each token: [num_tokens, VOCAB_SIZE] float32."""
    with torch.inference_mode():
        return oracle(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)


def check(reported: Sequence[Reported], expected: Tensor, tokens: Sequence[int], width: int) -> None:
    """expected: [len(tokens), VOCAB_SIZE]; the random weights leave no two logits near each other."""
    assert len(reported) == len(expected) == len(tokens)
    for position, values, token in zip(reported, expected, tokens, strict=True):
        likeliest = values.topk(width - 1).indices.tolist()
        assert position.token_ids == [token, *likeliest]
        torch.testing.assert_close(
            torch.tensor(position.logprobs), values[[token, *likeliest]], rtol=0, atol=1e-4
        )  # fmt: skip
        assert position.rank == int((values > values[token]).sum()) + 1


# --- of sampled tokens -------------------------------------------------------------------------------------------


def test_sampled_tokens_are_reported_with_the_models_own_probabilities_whatever_changes_them(
    runner: CpuRunner, oracle: LlamaForCausalLM
) -> None:
    core = Core(runner)
    sampling = dataclasses.replace(
        RANDOM, top_k=50, presence_penalty=2.0, repetition_penalty=1.5, banned_token_ids=column(range(0, 160, 3))
    )
    core.run([sequence(0, A, [0, 1, 2], sampling=sampling)], **chunks((0, 0, 13, 1)))
    core.run(join_slots=[0], iterations=6)
    core.run(iterations=1, masks={0: range(40)})
    tokens = core.tokens[0]
    check(core.logprobs[0], log_softmax(oracle, A + tokens)[12:-1], tokens, width=21)
    assert any(reported.rank > 1 for reported in core.logprobs[0])


def test_each_slot_of_a_step_gets_as_many_as_it_asked_for(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core, widths = Core(runner), [0, 1, 4, 21]
    prompts = [A, B, C, A + C]
    new = [
        sequence(slot, tokens, range(slot * 5, slot * 5 + 5), sampling=dataclasses.replace(GREEDY, num_logprobs=width))
        for slot, (tokens, width) in enumerate(zip(prompts, widths, strict=True))
    ]
    core.run(new, **chunks((3, 0, 14, 1), (1, 0, 30, 1), (0, 0, 13, 1)))
    core.run(**chunks((2, 0, 1, 1)), join_slots=[3, 1, 0], iterations=1)
    core.run(join_slots=[2], iterations=3)
    assert core.logprobs.keys() == {1, 2, 3}
    for slot in (1, 2, 3):
        known, tokens = prompts[slot], core.tokens[slot]
        check(core.logprobs[slot], log_softmax(oracle, known + tokens)[len(known) - 1 : -1], tokens, widths[slot])


def test_reporting_changes_no_token(runner: CpuRunner) -> None:
    runs = []
    for num_logprobs in (0, 5):
        runner.reset()
        core = Core(runner)
        sampling = dataclasses.replace(RANDOM, num_logprobs=num_logprobs)
        core.run([sequence(0, A, [0, 1, 2], sampling=sampling)], **chunks((0, 0, 13, 1)))
        core.run(join_slots=[0], iterations=8)
        runs.append(core.tokens[0])
    assert runs[0] == runs[1]


# --- of prompts --------------------------------------------------------------------------------------------------


def asking(slot: int, tokens: list[int], width: int = 4, num_prompt_tokens: int | None = None) -> NewSequence:
    return sequence(
        slot, tokens, range(slot * 6, slot * 6 + 6), num_prompt_tokens=num_prompt_tokens or len(tokens),
        sampling=dataclasses.replace(GREEDY, num_prompt_logprobs=width),
    )  # fmt: skip


@pytest.mark.parametrize("ends", [[30], [11, 30], [1, 2, 29, 30]])
def test_prompts_are_reported_however_they_are_cut(
    runner: CpuRunner, oracle: LlamaForCausalLM, ends: list[int]
) -> None:
    core = Core(runner)
    for begin, end in zip([0, *ends], ends, strict=False):
        core.run([asking(0, B)] if not begin else [], **chunks((0, begin, end - begin, int(end == 30))))
        assert len(core.prompt_logprobs.get(0, [])) == min(end, 29)
    core.run(join_slots=[0], iterations=3)
    check(core.prompt_logprobs[0], log_softmax(oracle, B)[:-1], B[1:], width=4)


def test_prompts_side_by_side_are_reported_each_as_asked(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core = Core(runner)
    new = [asking(0, B, 21), sequence(1, A, [30, 31, 32]), asking(2, A, 1), asking(3, C, 3)]
    (output,) = core.run(new, **chunks((2, 0, 13, 1), (1, 0, 13, 1), (3, 0, 1, 1), (0, 0, 30, 1)))
    assert [part.slot for part in output.prompt_logprobs] == [2, 0]  # a prompt of one token has none
    check(core.prompt_logprobs[0], log_softmax(oracle, B)[:-1], B[1:], width=21)
    check(core.prompt_logprobs[2], log_softmax(oracle, A)[:-1], A[1:], width=1)
    plain = Core(runner)
    runner.reset()
    plain.run([sequence(1, A, [30, 31, 32])], **chunks((1, 0, 13, 1)))
    assert plain.tokens[1] == core.tokens[1]


@pytest.mark.parametrize("ends", [[13], [7, 13], [9, 13], [10, 13]])
def test_tokens_generated_before_a_preemption_are_not_of_the_prompt(
    runner: CpuRunner, oracle: LlamaForCausalLM, ends: list[int]
) -> None:
    core = Core(runner)
    for begin, end in zip([0, *ends], ends, strict=False):
        new = [asking(0, A, num_prompt_tokens=9)] if not begin else []
        core.run(new, **chunks((0, begin, end - begin, int(end == 13))))
    check(core.prompt_logprobs[0], log_softmax(oracle, A)[:8], A[1:9], width=4)


def change_logits(
    runner: CpuRunner, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """change: (rows, their logits) of a prefill -> other logits."""
    prefill = runner._steps.prefill

    def changed_prefill(inputs: PrefillInputs) -> ComputeLogits:
        compute = prefill(inputs)
        return lambda rows: change(rows, compute(rows))

    monkeypatch.setattr(runner._steps, "prefill", changed_prefill)


def test_logits_of_a_prompt_are_computed_for_a_few_rows_at_once(
    runner: CpuRunner, oracle: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(rows: Tensor, logits: Tensor) -> Tensor:
        asked.append(len(rows))
        return logits

    change_logits(runner, monkeypatch, note)
    monkeypatch.setattr(prompt_report, "_MAX_LOGITS", 7 * VOCAB_SIZE)
    core = Core(runner)
    core.run([asking(0, B)], **chunks((0, 0, 30, 1)))
    assert asked == [7, 7, 7, 7, 1, 1]  # of 29 positions, and of the first token
    check(core.prompt_logprobs[0], log_softmax(oracle, B)[:-1], B[1:], width=4)


def test_a_prompt_with_a_logit_that_is_not_finite_fails_its_slot_alone(
    runner: CpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_bad = True

    def spoil(rows: Tensor, logits: Tensor) -> Tensor:
        if is_bad:
            logits[-1, 3] = torch.inf
        return logits

    change_logits(runner, monkeypatch, spoil)
    core = Core(runner)
    core.run([asking(0, B), sequence(1, A, [30, 31, 32])], **chunks((0, 0, 11, 0), (1, 0, 5, 0)))
    is_bad = False
    (output,) = core.run(**chunks((0, 11, 19, 1), (1, 5, 8, 1)))
    assert output.slot_errors == [(0, "non-finite logits")]
    assert (output.slots.tolist(), output.prompt_logprobs) == ([1], [])
    (output,) = core.run(join_slots=[0, 1], iterations=1)
    assert output.slots.tolist() == [1]
