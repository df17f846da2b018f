"""Steps on the CPU in process, without services: `python -m benchmarks.cpu_step --model DIRECTORY`.

Decode steps of 1, 4 and 16 sequences with 200 tokens each, and prompts of 128 tokens. All variants are in one process
and take turns, so that whatever else the machine does meets all of them alike; the fastest step says what the machine
can do, the median what it did.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.layers.attention import DecodeMetadata, PrefillMetadata
from executor_service.runner.cpu_build import build_cpu_steps
from executor_service.runner.cpu_steps import CpuSteps
from executor_service.runner.step_inputs import DecodeInputs, PrefillInputs

BLOCK_SIZE, BLOCKS_A_SEQUENCE, MAX_SEQUENCES = 64, 4, 16
CONTEXT_LEN = 200  # of a decode step
PROMPT_LEN = 128
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "float32": {"dtype": "float32"},
    "bfloat16-torch": {"dtype": "bfloat16", "cpu_kernels": "torch"},
}


@dataclasses.dataclass(frozen=True)
class Load:
    """A step, and how many tokens it computes."""

    name: str
    num_tokens: int
    run: Callable[[CpuSteps], object]


def main() -> int:
    """Print a table; store it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_step", description=__doc__)
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each kind and variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    wanted = [name for name in VARIANTS if name in args.variants.split(",")]
    built = {name: build(args.model, VARIANTS[name]) for name in wanted}
    loads = [decode_load(1), decode_load(4), decode_load(16), prefill_load()]
    with torch.inference_mode():
        times = {load.name: measure(load, built, args.rounds) for load in loads}
    print("| step | " + " | ".join(f"{name}, ms (fastest / median), tok/s" for name in built) + " |")
    for load in loads:
        cells = [f"{min(ms):.2f} / {median:.2f}, {1e3 * load.num_tokens / median:.0f}"
                 for ms in times[load.name].values() for median in [statistics.median(ms)]]  # fmt: skip
        print(f"| {load.name} | " + " | ".join(cells) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": describe_machine(), "ms": times}, indent=2) + "\n")
    return 0


def build(model: str, flags: dict[str, Any]) -> CpuSteps:
    """The model with a small cache."""
    config = ExecutorConfig(model, block_size=BLOCK_SIZE, num_blocks=BLOCKS_A_SEQUENCE * MAX_SEQUENCES, **flags)
    return build_cpu_steps(config, RankGroup(Placement(), torch.device("cpu"))).steps


def measure(load: Load, built: dict[str, CpuSteps], num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, by variant; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(num_rounds + 1):
        for name, steps in built.items():
            start = time.perf_counter()
            load.run(steps)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: ms[1:] for name, ms in times.items()}


def block_tables(num_sequences: int) -> torch.Tensor:
    """[num_sequences, BLOCKS_A_SEQUENCE] int32."""
    return torch.arange(num_sequences * BLOCKS_A_SEQUENCE, dtype=torch.int32).view(num_sequences, -1)


def decode_load(num_sequences: int) -> Load:
    """The next token of each of some sequences."""
    positions = torch.full((num_sequences,), CONTEXT_LEN - 1)
    inputs = DecodeInputs(torch.arange(num_sequences) + 1000, DecodeMetadata(positions, block_tables(num_sequences)))
    return Load(f"decode, {num_sequences} sequences", num_sequences, lambda steps: steps.decode(inputs))


def prefill_load() -> Load:
    """One prompt, and the logits of its last token."""
    positions = torch.arange(PROMPT_LEN)
    metadata = PrefillMetadata(positions, (0, PROMPT_LEN), (PROMPT_LEN,), block_tables(1))
    last = torch.tensor([PROMPT_LEN - 1])
    inputs = PrefillInputs(positions + 1000, metadata, torch.tensor([0]), last + 1, torch.tensor([0]), last)
    return Load(f"prefill, {PROMPT_LEN} tokens", PROMPT_LEN, lambda steps: steps.prefill(inputs)(last))


if __name__ == "__main__":
    sys.exit(main())
