"""Two ranks over gloo sample and report what one rank does, whatever changes the logits."""

import dataclasses
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement, local_environments
from executor_service.plan import Sampling
from executor_service.runner.cpu_build import build_cpu_runner
from tests.unit.runner_harness import ALONE, GREEDY, Core, chunks, column, prompt, save_tiny_llama, sequence
from tests.unit.runner_harness import tiny_settings as settings_of

PROMPT = prompt(13, 1)
NUM_TOKENS = 8
EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5, "bias_token_ids": column([150, 7]),
    "bias_values": np.array([4, -100], dtype=np.float32), "allowed_token_ids": column(range(20, 159)),
    "banned_token_ids": column(range(0, 159, 5)), "min_total_tokens": 17, "end_token_ids": column(range(1, 159, 5)),
    "num_logprobs": 21, "num_prompt_logprobs": 4,
}  # fmt: skip
RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.75},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"bias_token_ids": column([79, 80, 158]), "bias_values": np.array([5, 6, 7], dtype=np.float32)},
    {"allowed_token_ids": column([0, 79, 80, 158])},
    {"banned_token_ids": column(range(0, 159, 2))},
    {"min_total_tokens": 17, "end_token_ids": column(range(0, 159, 2))},
    {"num_logprobs": 5},
    {"num_prompt_logprobs": 21},
    EVERYTHING,
]


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of a runner."""

    tokens: dict[int, list[int]]
    reported: dict[int, list[tuple[list[int], int]]]  # slot -> tokens and rank, by position
    logprobs: np.ndarray  # [all that was reported] float32


def run_every_rule(settings: ExecutorConfig, group: RankGroup) -> Run:
    """A slot for each rule, greedy and not, another two of them masked, in the same plans."""
    core = Core(build_cpu_runner(settings, group))
    bases = [GREEDY, Sampling(temperature=1.3, top_k=0, top_p=0.97, min_p=0.0, seed=3, choice_index=1)]
    samplings = [dataclasses.replace(basis, **rules) for basis in bases for rules in [*RULES, {}]]
    last = len(RULES)
    masks = {last: range(70, 90), last + len(RULES) + 1: [3, 158]}
    for slot, sampling in enumerate(samplings):
        new = sequence(slot, PROMPT, range(slot * 3, slot * 3 + 3), sampling=sampling)
        core.run([new], **chunks((slot, 0, 13, 1)))
    core.run(join_slots=range(len(samplings)), iterations=1, masks=masks)
    core.run(iterations=NUM_TOKENS - 2)
    reported = [*core.logprobs.items(), *((slot + 100, parts) for slot, parts in core.prompt_logprobs.items())]
    return Run(
        core.tokens,
        {slot: [(part.token_ids, part.rank) for part in parts] for slot, parts in reported},
        np.array([logprob for _, parts in reported for part in parts for logprob in part.logprobs]),
    )


def run_rank(environment: dict[str, str], settings: ExecutorConfig, results: "multiprocessing.Queue[Run]") -> None:
    os.environ.update(environment)
    results.put(run_every_rule(settings, RankGroup(Placement.read(os.environ), torch.device("cpu"))))
    torch.distributed.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, vocab_size=159)  # shards of 80 and of 79
    settings = settings_of(tmp_path, max_num_seqs=24, num_blocks=80)
    threads = torch.get_num_threads()
    alone = run_every_rule(settings, ALONE)
    torch.set_num_threads(threads)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    together = dataclasses.replace(settings, tensor_parallel_size=2)
    ranks = [
        spawn.Process(target=run_rank, args=(environment, together, results), daemon=True)
        for environment in local_environments(2, port)
    ]
    for rank in ranks:
        rank.start()
    runs = [results.get(timeout=100) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=20)
        assert rank.exitcode == 0
    assert len({str(tokens) for tokens in alone.tokens.values()}) > len(RULES)  # the rules do something
    for run in runs:
        assert run.tokens == alone.tokens
        assert run.reported == alone.reported
        np.testing.assert_allclose(run.logprobs, alone.logprobs, rtol=0, atol=1e-4)
