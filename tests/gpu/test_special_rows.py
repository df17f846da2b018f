"""Rows whose logits are changed before sampling or reported after it, on a GPU: transformers' logits and the plain
definitions in kernels/reference.py as the oracle, in float32 up to near ties.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from executor_service.config import ExecutorConfig
from executor_service.plan import Plan, Sampling
from executor_service.runner.gpu.build import build_gpu_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner
from executor_service.runner.runner import PromptLogprobs, StepOutput
from kernels import reference
from tests.gpu.test_gpu_executor import (
    ALONE,
    GREEDY,
    MODELS,
    NEAR_TIE,
    SAMPLED,
    SETTINGS,
    batch_plans,
    column,
    directory,
    plan,
    random_prompts,
    runner,
    theirs,
)

__all__ = ["MODELS", "directory", "runner"]  # fixtures and what they are made of

VOCAB_SIZE, STEPS = 5000, 24
FREE = dataclasses.replace(SAMPLED, top_k=0, top_p=1.0, min_p=0.0)
COLUMNS = ("bias_token_ids", "allowed_token_ids", "banned_token_ids", "end_token_ids")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


def asks(**changes: Any) -> dict[str, Any]:
    """Fields of Sampling."""
    arrays = {name: column(changes[name]) for name in COLUMNS if name in changes}
    if "bias_values" in changes:
        arrays["bias_values"] = np.array(changes["bias_values"], np.float32)
    return changes | arrays


PUSHED = {"bias_token_ids": range(100, 110), "bias_values": [9.0 - token / 4 for token in range(10)]}  # they repeat
CASES = {
    "nothing": {},
    "repetition": asks(repetition_penalty=1.7, **PUSHED),
    "repetition below 1": asks(repetition_penalty=0.7),
    "frequency": asks(frequency_penalty=0.9, **PUSHED),
    "presence": asks(presence_penalty=1.3, **PUSHED),
    "rewards": asks(presence_penalty=-1.5, frequency_penalty=-0.4),
    "a thousand biases": asks(bias_token_ids=range(0, 5000, 5), bias_values=[token / 250 - 2 for token in range(1000)]),
    "allowed": asks(allowed_token_ids=[*range(31, 70), 4999]),
    "banned": asks(banned_token_ids=range(4000)),
    "an end too early": asks(end_token_ids=range(2500), min_total_tokens=75),
    "log-probabilities": asks(num_logprobs=21),
    "its own alone": asks(num_logprobs=1),
    "everything": asks(
        repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=-0.3, banned_token_ids=[101, 103],
        end_token_ids=[100, 7], min_total_tokens=80, num_logprobs=6, **PUSHED,
    ),
}  # fmt: skip


def run(runner: GpuRunner, plans: Sequence[Plan]) -> list[StepOutput]:
    """Everything is launched before a result is waited for, and no launch waits for the device."""
    runner.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [pending for one in plans for pending in runner.execute(one)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [pending.wait() for pending in launched]


def plans_of(
    prompts: Sequence[list[int]], samplings: Sequence[Sampling], steps: int = STEPS, block_size: int = 64
) -> list[Plan]:
    """As batch_plans, each sequence with a sampling of its own."""
    first, *rest = batch_plans(prompts, steps, GREEDY, block_size)
    new = [
        dataclasses.replace(sequence, sampling=dataclasses.replace(sampling, choice_index=sequence.slot))
        for sequence, sampling in zip(first.new_sequences, samplings, strict=True)
    ]
    return [dataclasses.replace(first, new_sequences=new), *rest]


def tokens_by_slot(outputs: Sequence[StepOutput], num_slots: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(num_slots)]
    for output in outputs:
        assert not output.slot_errors
        for slot, token in zip(output.slots.tolist(), output.token_ids.tolist(), strict=True):
            tokens[slot].append(token)
    return tokens


@torch.inference_mode()
def raw_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), VOCAB_SIZE] float32: those of position i are for token i + 1."""
    return model(torch.tensor([tokens], device="cuda")).logits[0].float().cpu()


def scores(raw: torch.Tensor, sampling: Sampling, known: list[int], num_prompt: int, mask: Any = None) -> torch.Tensor:
    """[VOCAB_SIZE] float64, of which the largest is chosen; the sampling has no filters."""
    biases = dict(zip(sampling.bias_token_ids.tolist(), sampling.bias_values.tolist(), strict=True))
    processed = reference.process_logits(
        raw, torch.tensor(known), num_prompt, mask=mask, allowed_token_ids=sampling.allowed_token_ids.tolist(),
        banned_token_ids=sampling.banned_token_ids.tolist(), end_token_ids=sampling.end_token_ids.tolist(),
        min_total_tokens=sampling.min_total_tokens, logit_bias=biases, repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty, presence_penalty=sampling.presence_penalty,
    )  # fmt: skip
    if sampling.temperature == 0:
        return processed.double()
    seed, choice_index, position = (torch.tensor(one) for one in (sampling.seed, sampling.choice_index, len(known)))
    noise = reference.gumbel_noise(seed, choice_index, position, torch.arange(len(raw)))
    return processed.double() / sampling.temperature + noise


def assert_chosen(model: Any, sampling: Sampling, prompt: list[int], tokens: list[int], masks: Any = None) -> None:
    """Each token has the best score of its step, up to a near tie."""
    raw = raw_logits(model, prompt + tokens)
    for step, token in enumerate(tokens):
        known, mask = prompt + tokens[:step], None if masks is None else masks[step]
        values = scores(raw[len(known) - 1], sampling, known, len(prompt), mask)
        assert values.max() - values[token] < NEAR_TIE / (sampling.temperature or 1), f"step {step}"


def assert_reported(raw: torch.Tensor, token_ids: np.ndarray, logprobs: np.ndarray, rank: int) -> None:
    """Of one position, up to near ties. raw: [VOCAB_SIZE]."""
    tokens = torch.from_numpy(token_ids).long()
    torch.testing.assert_close(torch.from_numpy(logprobs), raw.log_softmax(-1)[tokens], rtol=0, atol=NEAR_TIE)
    own = raw[tokens[0]]
    assert (raw > own + NEAR_TIE).sum() + 1 <= rank <= (raw > own - NEAR_TIE).sum() + 1
    likeliest = raw.topk(len(tokens) - 1).values
    torch.testing.assert_close(raw[tokens[1:]], likeliest, rtol=0, atol=NEAR_TIE)
    assert len(set(token_ids[1:].tolist())) == len(token_ids) - 1


def reported(outputs: Sequence[StepOutput], widths: dict[int, int]) -> Iterator[tuple[int, Any, Any, int]]:
    """Slot, tokens, log-probabilities and rank of each token that was reported, step by step."""
    for output in outputs:
        assert output.logprobs is not None
        ends = np.cumsum([widths[slot] for slot in output.slots.tolist() if widths[slot]])
        assert len(output.logprobs.token_ids) == len(output.logprobs.logprobs) == ends[-1]
        parts = zip(
            [slot for slot in output.slots.tolist() if widths[slot]], np.split(output.logprobs.token_ids, ends[:-1]),
            np.split(output.logprobs.logprobs, ends[:-1]), output.logprobs.ranks.tolist(), strict=True,
        )  # fmt: skip
        yield from parts


@pytest.mark.parametrize("base", [GREEDY, FREE], ids=["greedy", "sampled"])
def test_every_parameter_does_what_is_defined_in_one_mixed_batch(
    base: Sampling, runner: GpuRunner, directory: Path
) -> None:
    model, prompts = theirs(directory, torch.float32), random_prompts(len(CASES), 60, seed=21)
    samplings = [dataclasses.replace(base, choice_index=slot, **changes) for slot, changes in enumerate(CASES.values())]
    outputs = run(runner, plans_of(prompts, samplings))
    tokens = tokens_by_slot(outputs, len(prompts))
    for name, sampling, prompt, chosen in zip(CASES, samplings, prompts, tokens, strict=True):
        assert len(chosen) == STEPS + 1
        try:
            assert_chosen(model, sampling, prompt, chosen)
        except AssertionError as error:
            raise AssertionError(name) from error
    widths = {slot: sampling.num_logprobs for slot, sampling in enumerate(samplings)}
    raws = [raw_logits(model, prompt + chosen) for prompt, chosen in zip(prompts, tokens, strict=True)]
    steps = dict.fromkeys(range(len(prompts)), 0)
    for slot, token_ids, logprobs, rank in reported(outputs, widths):
        assert token_ids[0] == tokens[slot][steps[slot]]
        assert_reported(raws[slot][len(prompts[slot]) - 1 + steps[slot]], token_ids, logprobs, rank)
        steps[slot] += 1
    assert {steps[slot] for slot, width in widths.items() if width} == {STEPS + 1}


def test_rows_beside_special_ones_get_the_bits_that_they_get_without_them(runner: GpuRunner) -> None:
    prompts = random_prompts(23, 60, seed=22)
    samplings = [(SAMPLED, FREE, GREEDY)[slot % 3] for slot in range(23)]
    special = [
        dataclasses.replace(one, **CASES["everything"]) if slot % 4 == 0 else one for slot, one in enumerate(samplings)
    ]
    layout, tokens, bits = runner.rings.layout, [], []
    for these in (samplings, special):
        start = runner.rings.num_launched
        tokens.append(tokens_by_slot(run(runner, plans_of(prompts, these)), 23))
        steps = [step % len(runner.rings.results) for step in range(start, start + STEPS + 1)]
        bits.append(runner.rings.results[steps][:, layout.result(2)][:, :23].clone())
    others = [slot for slot in range(23) if slot % 4]
    assert [tokens[0][slot] for slot in others] == [tokens[1][slot] for slot in others]
    assert torch.equal(bits[0][:, others], bits[1][:, others])
    assert tokens[0][0] != tokens[1][0]


def test_masks_of_single_steps_hold_for_their_rows_alone(runner: GpuRunner, directory: Path) -> None:
    model, prompts = theirs(directory, torch.float32), random_prompts(10, 60, seed=23)
    samplings = [dataclasses.replace((GREEDY, FREE)[slot % 2], choice_index=slot) for slot in range(10)]
    first, join, rest = plans_of(prompts, samplings, steps=9)
    plans = [first, join, *(plan(3 + step, [], 1) for step in range(rest.iterations))]
    ordinary = tokens_by_slot(run(runner, plans), 10)
    masked = column([7, 0, 2, 9])
    allowed = np.random.default_rng(0).random((len(plans), len(masked), VOCAB_SIZE)) < 0.01
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 0), (0, -VOCAB_SIZE % 32))), axis=-1, bitorder="little")
    plans = [
        dataclasses.replace(one, mask_slots=masked, masks=words[index].view(np.int32))
        for index, one in enumerate(plans)
    ]
    tokens = tokens_by_slot(run(runner, plans), 10)
    for index, slot in enumerate(masked.tolist()):
        masks = torch.from_numpy(allowed[:, index])
        assert all(masks[step, token] for step, token in enumerate(tokens[slot]))
        assert_chosen(model, samplings[slot], prompts[slot], tokens[slot], masks)
    others = sorted(set(range(10)) - set(masked.tolist()))
    assert [tokens[slot] for slot in others] == [ordinary[slot] for slot in others]


def test_prompts_are_reported_over_chunks(runner: GpuRunner, directory: Path) -> None:
    """In slices of as many rows as there are slots."""
    model, (long, short) = theirs(directory, torch.float32), ([*range(2, 332)], random_prompts(1, 60, seed=24)[0])
    first = batch_plans([long, short], 2, GREEDY, 64)[0]
    widths = {0: 4, 1: 21}
    new = [
        dataclasses.replace(one, sampling=dataclasses.replace(GREEDY, num_prompt_logprobs=widths[one.slot]))
        for one in first.new_sequences
    ]
    plans, counts = [], [90, 1, 200, 39]
    for step, count in enumerate(counts):
        slots, starts, sizes = [0], [sum(counts[:step])], [count]
        if step == 2:
            slots, starts, sizes = [1, 0], [0, *starts], [len(short), count]
        samples = [int(slot == 1 or step == 3) for slot in slots]
        plans.append(
            plan(step + 1, new if step == 0 else [], prefill_slots=slots, prefill_starts=starts, prefill_counts=sizes,
                 prefill_samples=samples)
        )  # fmt: skip
    outputs = run(runner, plans)
    prompts = {0: (long, raw_logits(model, long)), 1: (short, raw_logits(model, short))}
    parts = [part for output in outputs for part in output.prompt_logprobs]
    assert [part.start for part in parts if part.slot == 0] == [1, 91, 92, 292]
    for part in parts:
        assert_prompt(part, widths[part.slot], *prompts[part.slot])
    assert sum(len(part.ranks) for part in parts) == len(long) + len(short) - 2
    assert [output.slots.tolist() for output in outputs] == [[], [], [1], [0]]


def assert_prompt(part: PromptLogprobs, width: int, prompt: list[int], raw: torch.Tensor) -> None:
    token_ids, logprobs = part.token_ids.reshape(-1, width), part.logprobs.reshape(-1, width)
    for index, rank in enumerate(part.ranks.tolist()):
        position = part.start + index
        assert token_ids[index, 0] == prompt[position]
        assert_reported(raw[position - 1], token_ids[index], logprobs[index], rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_with_special_rows_give_the_same_with_graphs_and_without(dtype: str, directory: Path) -> None:
    prompts = random_prompts(len(CASES), 30, seed=25)
    samplings = [dataclasses.replace(SAMPLED, **changes) for changes in CASES.values()]
    results = []
    for eager in (False, True):
        config = dataclasses.replace(SETTINGS, model=str(directory), dtype=dtype, enforce_eager=eager)
        outputs = run(build_gpu_runner(config, ALONE), plans_of(prompts, samplings))
        logprobs = [output.logprobs for output in outputs if output.logprobs]
        assert len(logprobs) == STEPS + 1
        results.append((
            tokens_by_slot(outputs, len(prompts)),
            [(one.token_ids.tolist(), one.logprobs.tobytes(), one.ranks.tolist()) for one in logprobs],
        ))  # fmt: skip
    assert results[0] == results[1]


def test_a_hundred_repeats_of_special_steps_give_the_same_bits(runner: GpuRunner) -> None:
    """Counts of sequences that ended are freed and taken again while steps are under way."""
    prompts = random_prompts(33, 60, seed=26)
    plans = plans_of(prompts, [dataclasses.replace(SAMPLED, **CASES["everything"])] * 33, steps=6)
    again = dataclasses.replace(plans[0], step_id=8, release_slots=column(range(33)))
    plans += [again, plan(9, [], 6, join_slots=range(33))]
    first: Any = None
    for _ in range(100):
        outputs = run(runner, plans)
        told = [(o.slots.tolist(), o.token_ids.tolist(), o.logprobs and o.logprobs.logprobs.tobytes()) for o in outputs]
        first = first or told
        assert told == first
        assert [one[1:] for one in told[:7]] == [one[1:] for one in told[7:]]


def test_the_largest_batch_of_special_rows_fits_the_memory_that_was_left_for_it(tmp_path: Path, tell: Any) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=151_936, hidden_size=128, intermediate_size=256, num_hidden_layers=2, max_position_embeddings=1024,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, tie_word_embeddings=True,
    )).save_pretrained(tmp_path)  # fmt: skip
    share = 0.4
    runner = build_gpu_runner(ExecutorConfig(model=str(tmp_path), gpu_memory_utilization=share), ALONE)
    total = torch.cuda.mem_get_info()[1]

    def used() -> float:
        return (total - torch.cuda.mem_get_info()[0]) / total

    at_start = used()
    sampling = dataclasses.replace(SAMPLED, **CASES["everything"] | {"num_logprobs": 21, "num_prompt_logprobs": 21})
    prompts = [[(slot + 7 * index) % 5000 for index in range(32)] for slot in range(runner.info.limits.num_slots)]
    outputs = run(runner, plans_of(prompts, [sampling] * len(prompts), steps=8))
    assert all(len(tokens) == 9 for tokens in tokens_by_slot(outputs, len(prompts)))
    tell(f"GPU memory with {len(prompts)} special rows: {used():.3f} of all, {at_start:.3f} before; {share} allowed")
    assert used() <= share
