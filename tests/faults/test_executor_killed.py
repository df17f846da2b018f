"""kill -9 of the executor under load: a client sees a pause, and then the very tokens that it would have seen."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from duet import LLM, Client, SamplingParams
from tests.faults.processes import descendants
from tests.golden.oracle import NearTie, Oracle, Reference, assert_same_tokens
from tests.golden.prompts import prompt_token_ids

NUM_STREAMS = 16
NUM_TOKENS = 40
ROUNDS, THOROUGH_ROUNDS = 4, 10
# Of all tokens, when the last kill may come: a GPU makes the rest while the test still learns that it is time.
LATEST_KILL = 0.25 if torch.cuda.is_available() else 0.8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.mark.timeout(600)
def test_every_stream_ends_as_if_the_executor_had_never_been_killed(
    oracle: Oracle, tmp_path: Path, tell: Callable[[str], None], is_thorough: bool
) -> None:
    model = tmp_path / "model"  # by which its processes are told from those of other tests
    model.symlink_to(oracle.model)
    everything = prompt_token_ids(oracle.model)
    prompts = {name: everything[name][:64] for name in list(everything)[:NUM_STREAMS]}
    references = dict(zip(prompts, oracle.generate_all(list(prompts.values()), NUM_TOKENS), strict=True))
    rng, num_rounds = random.Random(5), THOROUGH_ROUNDS if is_thorough else ROUNDS
    ties: list[NearTie] = []
    recoveries = 0
    with LLM(str(model), dtype="float32", num_blocks=128) as llm:
        for number in range(num_rounds):
            num_tokens = rng.randint(1, int(NUM_STREAMS * NUM_TOKENS * LATEST_KILL))
            outputs = _generate_and_kill(llm, str(model), list(prompts.values()), num_tokens)
            outlived = sum(output["recoveries"] for output in outputs)
            assert outlived > 0, f"round {number}: the kill met no stream"
            recoveries += outlived
            for output, (name, reference) in zip(outputs, references.items(), strict=True):
                ties += _check(output, reference, oracle, f"round {number}, {name}")
    tell(f"kill -9, {num_rounds} rounds: {recoveries} of {num_rounds * NUM_STREAMS} streams outlived their executor, "
         f"{len(ties)} near ties forgiven")  # fmt: skip


def _generate_and_kill(llm: LLM, model: str, prompts: list[list[int]], num_tokens: int) -> list[dict[str, Any]]:
    """Kill the executor once all streams together have had `num_tokens` tokens."""
    results: list[list[dict[str, Any]]] = []
    thread = threading.Thread(target=lambda: results.append(llm.generate(prompts, GREEDY, use_tqdm=False)))
    with Client(llm.address) as client:
        before = client.server().load.output_tokens_total
        thread.start()
        while client.server().load.output_tokens_total < before + num_tokens:
            assert thread.is_alive(), "the streams ended early"
            time.sleep(0.01)
    (rank,) = descendants("executor_service.rank", model)
    os.kill(rank, signal.SIGKILL)
    thread.join()
    assert results, "a stream failed"
    return results[0]


def _check(output: dict[str, Any], reference: Reference, oracle: Oracle, name: str) -> list[NearTie]:
    assert output["finish_reason"] == "length"
    return assert_same_tokens(output["token_ids"], reference, oracle, name)
