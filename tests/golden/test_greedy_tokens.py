"""Through both real services, whatever the scheduling: the tokens that transformers generates on the same weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from duet import LLM, Client, SamplingParams
from tests.golden.oracle import NearTie, Oracle, Reference, assert_same_tokens
from tests.golden.prompts import prompt_token_ids

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED_PROMPTS = 6
SAMPLED_COPIES = 3  # so many that they fill the cache of the scenario with few blocks, even where they come slowly
BLOCK_SIZE = 64  # the default

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


class Checks:
    """What every scenario is held against."""

    def __init__(
        self,
        references: dict[str, Reference],
        oracle: Oracle,
        seeded_tokens: list[list[int]],
        tell: Callable[[str], None],
    ) -> None:
        self._references = references
        self._oracle = oracle
        self._seeded_tokens = seeded_tokens
        self._tell = tell

    def greedy(self, scenario: str, outputs: Sequence[dict[str, Any]]) -> None:
        ties: list[NearTie] = []
        for output, (name, reference) in zip(outputs, self._references.items(), strict=True):
            ties += assert_same_tokens(output["token_ids"], reference, self._oracle, name)
        self._tell(f"golden, {scenario}: {len(ties)} near ties forgiven in {len(outputs)} x {NUM_TOKENS} tokens")

    def scenario(self, name: str, llm: LLM, prompts: dict[str, list[int]]) -> tuple[list[dict[str, Any]], ...]:
        """All prompts at once: greedy against transformers, seeded against the undisturbed run; both outputs."""
        outputs = generate(llm, list(prompts.values()), GREEDY)
        self.greedy(name, outputs)
        sampled = generate(llm, first(prompts) * SAMPLED_COPIES, SEEDED)
        assert [output["token_ids"] for output in sampled] == self._seeded_tokens * SAMPLED_COPIES
        return outputs, sampled


@pytest.fixture(scope="module")
def checks(
    references: dict[str, Reference],
    oracle: Oracle,
    seeded_tokens: list[list[int]],
    tell: Callable[[str], None],
) -> Checks:
    return Checks(references, oracle, seeded_tokens, tell)


def test_each_prompt_alone_gives_the_tokens_of_transformers(
    plain: LLM, prompts: dict[str, list[int]], checks: Checks
) -> None:
    checks.greedy("alone", [generate(plain, [prompt], GREEDY)[0] for prompt in prompts.values()])


def test_a_warm_prefix_cache_changes_no_token(plain: LLM, prompts: dict[str, list[int]], checks: Checks) -> None:
    generate(plain, list(prompts.values()), SamplingParams(temperature=0, max_tokens=1))
    outputs, sampled = checks.scenario("warm prefix cache", plain, prompts)
    for output in outputs + sampled:
        assert output["cached_tokens"] == (output["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert sum(output["cached_tokens"] for output in outputs) > 0
    assert sum(output["cached_tokens"] for output in sampled) > 0


@pytest.mark.parametrize("max_inflight_steps", [1, 2, 3])
def test_all_at_once_with_plans_in_flight_changes_no_token(
    max_inflight_steps: int, oracle: Oracle, prompts: dict[str, list[int]], checks: Checks
) -> None:
    flags = {"dtype": "float32", "num_blocks": 256, "max_inflight_steps": max_inflight_steps}
    with LLM(str(oracle.model), **flags) as llm:
        checks.scenario(f"all at once, {max_inflight_steps} plans in flight", llm, prompts)


def test_a_token_budget_of_sixteen_changes_no_token(
    oracle: Oracle, prompts: dict[str, list[int]], checks: Checks
) -> None:
    with LLM(str(oracle.model), dtype="float32", num_blocks=256, max_tokens_per_step=16) as llm:
        checks.scenario("a token budget of 16", llm, prompts)


def test_preemption_changes_no_token(oracle: Oracle, prompts: dict[str, list[int]], checks: Checks) -> None:
    with LLM(str(oracle.model), dtype="float32", block_size=16, num_blocks=52) as llm:
        outputs, sampled = checks.scenario("so few blocks that requests are preempted", llm, prompts)
        with Client(llm.address) as client:
            load = client.server().load
    assert sum(output["preemptions"] for output in outputs) > 0
    assert sum(output["preemptions"] for output in sampled) > 0
    assert load.used_blocks == 0
