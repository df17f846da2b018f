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
STABLE_S = 2.2


@pytest.mark.timeout(300)
def test_a_poison_request_among_64_others_fails_alone_and_with_its_own_message(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = FaultPoints(tmp_path)
    for name, value in points.environment.items():
        monkeypatch.setenv(name, value)
    prompts = [[5 + number, 7, 9] for number in range(NUM_OTHERS)]

    async def generate(address: str, *, with_poison: bool) -> tuple[list[list[int]], object]:
        async with AsyncClient(address) as client:
            others = [asyncio.create_task(client.generate(prompt, PARAMS)) for prompt in prompts]
            failure: object = None
            if with_poison:
                (failure,) = await asyncio.gather(client.generate([1, 2, 3], POISONED), return_exceptions=True)
            return [output.token_ids for output in await asyncio.gather(*others)], failure

    with LLM(str(tiny_model), **FLAGS, max_num_seqs=80, num_blocks=1024) as llm:
        undisturbed, _ = asyncio.run(generate(llm.address, with_poison=False))
        points.arm("executor.sequence", f"kill always key {POISON}")
        asyncio.run(asyncio.sleep(STABLE_S))  # a death soon after readiness would count as a failed start
        tokens, failure = asyncio.run(generate(llm.address, with_poison=True))
        with Client(llm.address) as client:
            losses = client.server().load.executor_losses_total

    assert isinstance(failure, InternalError)
    assert "the executor died each time it ran this request, the last time alone" in failure.message
    assert tokens == undisturbed
    assert losses == 3, "with all others twice, then alone"
