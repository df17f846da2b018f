"""Through both real services, whatever the scheduling: the tokens that transformers generates on the same weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from duet import LLM, Client, SamplingParams
from tests.golden.oracle import NearTie, Oracle, Reference, assert_same_tokens
from tests.golden.prompts import prompt_token_ids

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED_PROMPTS = 6

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def prompts(oracle: Oracle) -> dict[str, list[int]]:
    return prompt_token_ids(oracle.model)


@pytest.fixture(scope="module")
def references(oracle: Oracle, prompts: dict[str, list[int]]) -> dict[str, Reference]:
    return dict(zip(prompts, oracle.generate_all(list(prompts.values()), NUM_TOKENS), strict=True))


@pytest.fixture(scope="module")
def plain(oracle: Oracle) -> Iterator[LLM]:
    with LLM(str(oracle.model), dtype="float32", num_blocks=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def seeded_tokens(plain: LLM, prompts: dict[str, list[int]]) -> list[list[int]]:
    """What the seeded request gives when each prompt runs alone: the measure of all other scenarios."""
    return [generate(plain, [prompt], SEEDED)[0]["token_ids"] for prompt in first(prompts)]


def first(prompts: dict[str, list[int]]) -> list[list[int]]:
    return list(prompts.values())[:SAMPLED_PROMPTS]


def generate(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> list[dict[str, Any]]:
    return llm.generate(list(prompts), params, use_tqdm=False)


def check_scenario(
    llm: LLM,
    prompts: dict[str, list[int]],
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
) -> list[dict[str, Any]]:
    """All prompts at once, greedy against transformers and seeded against the undisturbed run; the greedy outputs."""
    outputs = generate(llm, list(prompts.values()), GREEDY)
    check_greedy(outputs, references, oracle)
    sampled = generate(llm, first(prompts), SEEDED)
    assert [output["token_ids"] for output in sampled] == seeded_tokens
    return outputs


def check_greedy(outputs: Sequence[dict[str, Any]], references: dict[str, Reference], oracle: Oracle) -> None:
    ties: list[NearTie] = []
    for output, (name, reference) in zip(outputs, references.items(), strict=True):
        ties += assert_same_tokens(output["token_ids"], reference, oracle, name)
    print(f"{len(ties)} near ties forgiven among {len(references)} x {NUM_TOKENS} tokens")


def test_each_prompt_alone_gives_the_tokens_of_transformers(
    plain: LLM, prompts: dict[str, list[int]], references: dict[str, Reference], oracle: Oracle
) -> None:
    check_greedy([generate(plain, [prompt], GREEDY)[0] for prompt in prompts.values()], references, oracle)


def test_a_warm_prefix_cache_changes_no_token(
    plain: LLM,
    prompts: dict[str, list[int]],
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
) -> None:
    generate(plain, list(prompts.values()), SamplingParams(temperature=0, max_tokens=1))
    outputs = check_scenario(plain, prompts, references, oracle, seeded_tokens)
    block_size = 64
    for output in outputs:
        assert output["cached_tokens"] == (output["prompt_tokens"] - 1) // block_size * block_size
    assert sum(output["cached_tokens"] for output in outputs) > 0


@pytest.mark.parametrize("max_inflight_steps", [1, 2, 3])
def test_all_at_once_with_plans_in_flight_changes_no_token(
    max_inflight_steps: int,
    prompts: dict[str, list[int]],
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
) -> None:
    flags = {"dtype": "float32", "num_blocks": 256, "max_inflight_steps": max_inflight_steps}
    with LLM(str(oracle.model), **flags) as llm:
        check_scenario(llm, prompts, references, oracle, seeded_tokens)


def test_a_token_budget_of_sixteen_changes_no_token(
    prompts: dict[str, list[int]],
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
) -> None:
    with LLM(str(oracle.model), dtype="float32", num_blocks=256, max_tokens_per_step=16) as llm:
        check_scenario(llm, prompts, references, oracle, seeded_tokens)


def test_preemption_changes_no_token(
    prompts: dict[str, list[int]],
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
) -> None:
    with LLM(str(oracle.model), dtype="float32", block_size=16, num_blocks=64) as llm:
        outputs = check_scenario(llm, prompts, references, oracle, seeded_tokens)
        with Client(llm.address) as client:
            load = client.server().load
    assert sum(output["preemptions"] for output in outputs) > 0
    assert load.preemptions_total > 0
    assert load.used_blocks == 0
