"""Two GPUs give the tokens of one, in float32 up to near ties; both compute the same ones."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_service.distributed.placement import local_environments
from executor_service.runner.build import build_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner
from tests.gpu.test_gpu_executor import (
    GREEDY,
    MODELS,
    SAMPLED,
    SETTINGS,
    assert_greedy,
    batch_plans,
    directory,
    random_prompts,
    run,
    theirs,
)

NUM_RANKS = 2
ROOT = Path(__file__).parents[2]
FREE = dataclasses.replace(SAMPLED, top_k=0, top_p=1.0, min_p=0.0)
CHANGED = dataclasses.replace(SAMPLED, repetition_penalty=1.2, presence_penalty=0.8, num_logprobs=3)
REPORTED = dataclasses.replace(FREE, num_logprobs=1, num_prompt_logprobs=2)
STEPS = 40
BATCHES = [
    (25, 0, GREEDY), (25, 1, SAMPLED), (25, 2, FREE), (1, 3, SAMPLED), (3, 4, GREEDY), (25, 5, CHANGED),
    (25, 6, REPORTED),
]  # prompts, seed, sampling  # fmt: skip
MODES = {
    "graphs": ({}, {}),
    "eager": ({"enforce_eager": True}, {}),
    "a cut embedding": ({"shard_embedding": True}, {}),
    "without peer memory": ({}, {"NCCL_P2P_DISABLE": "1"}),
    "blocks counted by both": ({"num_blocks": None, "gpu_memory_utilization": 0.3}, {}),
}
__all__ = ["MODELS", "directory"]  # the fixture and what it is made of

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs"),
]


def run_ranks(config: Any, batches: list[Any], environment: dict[str, str], path: Path) -> list[tuple[int, list[Any]]]:
    """Blocks and tokens of each rank."""
    torch.save((config, batches), path / "work.pt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen([sys.executable, "-m", "tests.gpu.rank_runs", str(path)], cwd=ROOT, env=os.environ | one)
        for one in [one | environment for one in local_environments(NUM_RANKS, port)]
    ]
    deadline = time.monotonic() + 150
    try:
        while any(rank.poll() is None for rank in ranks):
            assert not any(rank.poll() for rank in ranks), "a rank failed"
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.05)
        assert [rank.returncode for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(path / f"tokens-{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def alone(directory: Path) -> list[list[list[int]]]:
    """Tokens of each batch on one GPU."""
    runner = build_runner(dataclasses.replace(SETTINGS, model=str(directory)))
    assert isinstance(runner, GpuRunner)
    tokens = []
    for count, seed, sampling in BATCHES:
        runner.reset()
        tokens.append(run(runner, batch_plans(random_prompts(count, 60, seed), STEPS, sampling, 64), count))
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_two_gpus_give_the_tokens_of_one(
    mode: str, directory: Path, alone: list[list[list[int]]], tmp_path: Path, tell: Any
) -> None:
    changes, environment = MODES[mode]
    config = dataclasses.replace(SETTINGS, model=str(directory), tensor_parallel_size=NUM_RANKS, **changes)
    batches = [
        (batch_plans(random_prompts(count, 60, seed), STEPS, sampling, 64), count) for count, seed, sampling in BATCHES
    ]
    first, second = run_ranks(config, batches, environment, tmp_path)
    assert first == second
    model = theirs(directory, torch.float32)
    num_others = 0
    for (count, seed, sampling), ours, expected in zip(BATCHES, first[1], alone, strict=True):
        others = [index for index in range(count) if ours[index] != expected[index]]
        num_others += len(others)
        if sampling is GREEDY:
            prompts = random_prompts(count, 60, seed)
            assert sum(assert_greedy(model, prompts[index], ours[index]) for index in others) <= 2 * len(others)
    tell(f"2 GPUs, {directory.name}, {mode}: {num_others} of {sum(len(one) for one in alone)} streams differ")
    assert num_others <= 4
