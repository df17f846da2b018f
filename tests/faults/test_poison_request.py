"""A request that kills every executor which is given it fails alone; all others go on."""

import asyncio
from pathlib import Path

import pytest

from duet import LLM, AsyncClient, Client, InternalError, SamplingParams
from tests.e2e.conftest import FLAGS, tiny_model
from tests.faults.arming import FaultPoints

__all__ = ["tiny_model"]

POISON = 666  # the seed; it has no other meaning to a greedy request
NUM_OTHERS = 64
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
POISONED = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, seed=POISON)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_poisoned", [1, 4])
def test_poison_requests_among_64_others_fail_alone_and_with_their_own_message(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_poisoned: int
) -> None:
    points = FaultPoints(tmp_path)
    for name, value in points.environment.items():
        monkeypatch.setenv(name, value)
    prompts = [[5 + number, 7, 9] for number in range(NUM_OTHERS)]
    poisoned_prompts = [[1, 2, 3 + number] for number in range(num_poisoned)]

    async def generate(address: str, poisoned: list[list[int]]) -> tuple[list[list[int]], list[object]]:
        async with AsyncClient(address) as client:
            others = [asyncio.create_task(client.generate(prompt, PARAMS)) for prompt in prompts]
            calls = (client.generate(prompt, POISONED) for prompt in poisoned)
            failures = await asyncio.gather(*calls, return_exceptions=True)
            return [output.token_ids for output in await asyncio.gather(*others)], list(failures)

    with LLM(str(tiny_model), **FLAGS, max_num_seqs=80, num_blocks=1024) as llm:
        undisturbed, _ = asyncio.run(generate(llm.address, []))
        points.arm("executor.sequence", f"kill always key {POISON}")
        tokens, failures = asyncio.run(generate(llm.address, poisoned_prompts))
        with Client(llm.address) as client:
            losses = client.server().load.executor_losses_total

    for failure in failures:
        assert isinstance(failure, InternalError)
        assert "the executor died each time it ran this request, the last time alone" in failure.message
    assert tokens == undisturbed
    assert 2 + num_poisoned <= losses <= 3 * num_poisoned, "each twice with others, and once alone"
