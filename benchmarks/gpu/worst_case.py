"""Show that a server that has started never runs out of memory: every step at its largest, with every option.

usage: python -m benchmarks.gpu.worst_case MODEL [--max-model-len N]

The whole cache in use, the largest prefill plans, prompts of the longest length, the full batch with every sampling
filter, in graphs and, for what no graph holds, launch by launch. Prints the device memory before and after.
"""

import argparse
import dataclasses
import json

import numpy as np
import torch

from benchmarks.gpu.driver import Driver
from executor_service.config import ExecutorConfig
from executor_service.plan import NewSequence, Sampling
from executor_service.runner.build import build_runner
from executor_service.runner.runner import Runner

SAMPLINGS = [
    Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, choice_index=0),
    Sampling(temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, seed=2, choice_index=0),
    Sampling(temperature=1.0, top_k=0, top_p=0.95, min_p=0.0, seed=3, choice_index=1),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.05, seed=4, choice_index=2),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=2**64 - 1, choice_index=3),
    Sampling(
        temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=5, choice_index=0, repetition_penalty=1.1,
        frequency_penalty=0.2, presence_penalty=0.1, banned_token_ids=np.arange(9, dtype=np.int32), num_logprobs=21,
        num_prompt_logprobs=21,
    ),
]  # fmt: skip


def main() -> None:
    """Print a line for each phase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--max-model-len", type=int, default=None)
    args = parser.parse_args()
    runner = build_runner(ExecutorConfig(model=args.model, max_model_len=args.max_model_len))
    limits = runner.info.limits
    print(json.dumps({"phase": "start", **_memory(), **dataclasses.asdict(limits)}), flush=True)
    driver = Driver(runner)
    longest = limits.max_model_len - 8
    num_longest = min(limits.num_slots, limits.num_blocks * limits.block_size // limits.max_model_len)
    _one_by_one(driver, runner, min(num_longest, 4), longest)
    print(json.dumps({"phase": "longest prompts, in the largest plans", **_memory()}), flush=True)
    for sampling in SAMPLINGS:
        share = min(limits.num_blocks // limits.num_slots * limits.block_size, limits.max_model_len)
        driver.prefill(limits.num_slots, min(share - 8, 1024), 8, sampling)
        driver.decode(limits.num_slots, 7, joins=True)
        driver.release(limits.num_slots)
        driver.drain()
    print(json.dumps({"phase": "full batch, every filter, changed and reported", **_memory()}), flush=True)
    driver.close()


def _one_by_one(driver: Driver, runner: Runner, count: int, length: int) -> None:
    limits = runner.info.limits
    num_blocks = -(-limits.max_model_len // limits.block_size)
    for slot in range(count):
        sequence = NewSequence(
            slot=slot,
            token_ids=np.arange(length, dtype=np.int32) % limits.vocab_size,
            num_prompt_tokens=length,
            num_cached_tokens=0,
            block_ids=np.arange(slot * num_blocks, (slot + 1) * num_blocks, dtype=np.int32),
            sampling=SAMPLINGS[-1],
            stop_token_ids=np.zeros(0, dtype=np.int32),
            max_total_tokens=limits.max_model_len,
        )
        new = [sequence]
        for start in range(0, length, limits.max_tokens_per_step):
            chunk = min(limits.max_tokens_per_step, length - start)
            driver.send(
                new,
                prefill_slots=[slot],
                prefill_starts=[start],
                prefill_counts=[chunk],
                prefill_samples=[int(start + chunk == length)],
            )
            new = []
    driver.decode(count, 4, joins=True)
    driver.release(count)
    driver.drain()


def _memory() -> dict[str, float]:
    free, total = torch.cuda.mem_get_info()
    return {
        "used_gib": round((total - free) / 2**30, 2),
        "of_gib": round(total / 2**30, 2),
        "torch_peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


if __name__ == "__main__":
    main()
