"""Through both real services, whatever the scheduling and on however many ranks: the tokens of transformers.

On several ranks it is less of everything, of the default model's layers too: there a step waits for messages above all.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from duet import LLM, AsyncClient, Client, Output, SamplingParams
from tests.golden.oracle import NearTie, Oracle, Reference, assert_same_tokens
from tests.golden.prompts import prompt_token_ids

NUM_TOKENS = {1: 64, 2: 24, 4: 24}  # by the number of ranks
EVERY_NTH_PROMPT = {1: 1, 2: 2, 4: 2}
FEW_LAYERS = 3
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, ignore_eos=True)
SAMPLED_PROMPTS = 6
SAMPLED_COPIES = 3  # so many that they fill the cache of the scenario with few blocks, even where they come slowly
BLOCK_SIZE = 64  # the default
MOST_ATTEMPTS = 6  # to meet preemption
SPARE_BLOCKS = 4  # beside the longest sequence, where requests shall be preempted

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=NUM_TOKENS, ids="ranks-{}".format)
def num_ranks(request: pytest.FixtureRequest) -> int:
    if torch.cuda.is_available() and torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} ranks need as many GPUs")
    return request.param


@pytest.fixture(scope="module")
def greedy(num_ranks: int) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_tokens=NUM_TOKENS[num_ranks])


@pytest.fixture(scope="module")
def seeded(num_ranks: int) -> SamplingParams:
    return dataclasses.replace(SEEDED, max_tokens=NUM_TOKENS[num_ranks])


@pytest.fixture(scope="module")
def few_layers(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The oracle for the default model's first layers."""
    directory = tmp_path_factory.mktemp("few-layers")
    shutil.copytree(oracle.model, directory, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": FEW_LAYERS}))
    dropped = tuple(f"model.layers.{layer}." for layer in range(FEW_LAYERS, config["num_hidden_layers"]))
    with safe_open(oracle.model / "model.safetensors", framework="pt") as weights:
        kept = {name: weights.get_tensor(name) for name in weights.keys() if not name.startswith(dropped)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return Oracle(directory, tmp_path_factory.mktemp("oracle-of-few-layers"))


@pytest.fixture(scope="module")
def standard(num_ranks: int, oracle: Oracle, few_layers: Oracle) -> Oracle:
    """What this number of ranks is held against."""
    return oracle if num_ranks == 1 else few_layers


@pytest.fixture(scope="module")
def prompts(num_ranks: int, oracle: Oracle) -> dict[str, list[int]]:
    return dict(list(prompt_token_ids(oracle.model).items())[:: EVERY_NTH_PROMPT[num_ranks]])


@pytest.fixture(scope="module")
def references(num_ranks: int, standard: Oracle, prompts: dict[str, list[int]]) -> dict[str, Reference]:
    return dict(zip(prompts, standard.generate_all(list(prompts.values()), NUM_TOKENS[num_ranks]), strict=True))


@pytest.fixture(scope="module")
def start(num_ranks: int, standard: Oracle) -> Callable[..., LLM]:
    """Starts both services in float32, with further flags."""
    ranks = {"tensor_parallel_size": num_ranks} if num_ranks > 1 else {}
    return functools.partial(LLM, str(standard.model), dtype="float32", **ranks)


@pytest.fixture(scope="module")
def plain(start: Callable[..., LLM]) -> Iterator[LLM]:
    """Two plans in flight. Scenarios share it, each with a salt of its own: none finds what another has cached."""
    with start(num_blocks=256, max_inflight_steps=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def few_layers_on_one_rank(few_layers: Oracle) -> Iterator[LLM]:
    with LLM(str(few_layers.model), dtype="float32", num_blocks=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def seeded_tokens(
    num_ranks: int, seeded: SamplingParams, prompts: dict[str, list[int]], request: pytest.FixtureRequest
) -> list[list[int]]:
    """What the seeded request gives when each prompt runs alone on one rank: the measure of all other scenarios."""
    llm = request.getfixturevalue("plain" if num_ranks == 1 else "few_layers_on_one_rank")
    return [generate(llm, [prompt], seeded, salt="undisturbed")[0].token_ids for prompt in first(prompts)]


def first(prompts: dict[str, list[int]]) -> list[list[int]]:
    return list(prompts.values())[:SAMPLED_PROMPTS]


def generate(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, *, salt: str = "") -> list[Output]:
    """All prompts at once, which share cached prefixes with those of the same salt."""

    async def generate_all() -> list[Output]:
        async with AsyncClient(llm.address) as client:
            return await asyncio.gather(*(client.generate(prompt, params, cache_salt=salt) for prompt in prompts))

    return asyncio.run(generate_all())


@dataclasses.dataclass(frozen=True)
class Checks:
    """What every scenario is held against."""

    num_ranks: int
    greedy: SamplingParams
    seeded: SamplingParams
    references: dict[str, Reference]
    standard: Oracle
    seeded_tokens: list[list[int]]
    tell: Callable[[str], None]

    def compare(self, scenario: str, outputs: Sequence[Output]) -> None:
        """Greedy outputs, a prompt each, against transformers."""
        ties: list[NearTie] = []
        for output, (name, reference) in zip(outputs, self.references.items(), strict=True):
            ties += assert_same_tokens(output.token_ids, reference, self.standard, name)
        what = f"golden, {scenario}, {self.num_ranks} ranks"
        self.tell(f"{what}: {len(ties)} near ties forgiven in {len(outputs)} x {self.greedy.max_tokens} tokens")

    def scenario(self, name: str, llm: LLM, prompts: dict[str, list[int]]) -> tuple[list[Output], ...]:
        """All prompts at once: greedy against transformers, seeded against the undisturbed run; both outputs."""
        outputs = generate(llm, list(prompts.values()), self.greedy, salt=name)
        self.compare(name, outputs)
        sampled = generate(llm, first(prompts) * SAMPLED_COPIES, self.seeded, salt=name)
        assert [output.token_ids for output in sampled] == self.seeded_tokens * SAMPLED_COPIES
        return outputs, sampled


@pytest.fixture(scope="module")
def checks(
    num_ranks: int,
    greedy: SamplingParams,
    seeded: SamplingParams,
    references: dict[str, Reference],
    standard: Oracle,
    seeded_tokens: list[list[int]],
    tell: Callable[[str], None],
) -> Checks:
    return Checks(num_ranks, greedy, seeded, references, standard, seeded_tokens, tell)


def test_each_prompt_alone_gives_the_tokens_of_transformers(
    plain: LLM, prompts: dict[str, list[int]], checks: Checks
) -> None:
    outputs = [generate(plain, [prompt], checks.greedy, salt="alone")[0] for prompt in prompts.values()]
    assert not any(output.cached_tokens for output in outputs)
    checks.compare("alone", outputs)


def test_a_warm_prefix_cache_changes_no_token(plain: LLM, prompts: dict[str, list[int]], checks: Checks) -> None:
    name = "warm prefix cache"
    generate(plain, list(prompts.values()), SamplingParams(temperature=0, max_tokens=1), salt=name)
    outputs, sampled = checks.scenario(name, plain, prompts)
    for output in outputs + sampled:
        assert output.cached_tokens == (output.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert sum(output.cached_tokens for output in outputs) > 0
    assert sum(output.cached_tokens for output in sampled) > 0


@pytest.mark.parametrize("max_inflight_steps", [1, 2, 3])
def test_all_at_once_with_plans_in_flight_changes_no_token(
    max_inflight_steps: int, plain: LLM, start: Callable[..., LLM], prompts: dict[str, list[int]], checks: Checks
) -> None:
    started = start(num_blocks=256, max_inflight_steps=max_inflight_steps) if max_inflight_steps != 2 else None
    with started or contextlib.nullcontext(plain) as llm:
        outputs, _ = checks.scenario(f"all at once, {max_inflight_steps} plans in flight", llm, prompts)
    assert not any(output.cached_tokens for output in outputs)


def test_a_token_budget_of_sixteen_changes_no_token(
    start: Callable[..., LLM], prompts: dict[str, list[int]], checks: Checks
) -> None:
    with start(num_blocks=256, max_tokens_per_step=16) as llm:
        checks.scenario("a token budget of 16", llm, prompts)


def test_preemption_changes_no_token(start: Callable[..., LLM], prompts: dict[str, list[int]], checks: Checks) -> None:
    block_size = 16
    longest = max(map(len, prompts.values())) + NUM_TOKENS[checks.num_ranks]
    greedy = sampled = 0  # preemptions
    with start(block_size=block_size, num_blocks=-(-longest // block_size) + SPARE_BLOCKS) as llm:
        for attempt in range(1, MOST_ATTEMPTS + 1):  # on a busy machine requests may come so slowly that all find room
            name = f"so few blocks that requests are preempted, attempt {attempt}"
            outputs = checks.scenario(name, llm, prompts)
            greedy, sampled = (sum(output.preemptions for output in each) for each in outputs)
            if greedy and sampled:
                break
        with Client(llm.address) as client:
            load = client.server().load
    assert greedy > 0
    assert sampled > 0
    assert load.used_blocks == 0
