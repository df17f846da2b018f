"""Where each microsecond of a decode step goes, kernel by kernel: writes docs/performance.md.

usage: python -m benchmarks.gpu.performance MODEL [--output FILE]

Kernel times are those of torch's profiler. The gap between two replays is the time from the last kernel of a step to
the first of the next, by the device's own clock, which both read.
"""

import argparse
import collections
import statistics
from pathlib import Path

import numpy as np

from benchmarks.gpu.decode_step import profiled_kernels
from benchmarks.gpu.driver import Driver
from executor_service.config import ExecutorConfig
from executor_service.runner.build import build_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner

BATCHES = (1, 8, 64, 256)
INPUT_LEN, STEPS, PROFILED_STEPS = 768, 96, 8
ROLES = {  # part of a kernel's name -> what it does
    "_decode_inputs": "inputs from slot state",
    "_decode_kernel": "decode attention",
    "_qk_norm_rope": "QK-norm, RoPE, KV store",
    "_linear_kernel": "our linear layers (some with norm, activation)",
    "_rms_norm": "add and RMSNorm",
    "_silu": "SiLU times up",
    "_tile_kernel": "sampler, first pass",
    "_row_kernel": "sampler, second pass",
    "_advance": "slot state and results",
    "ndex": "embedding",
    "gather": "embedding",
}
OTHERS = "cuBLAS linear layers and LM head"

HEADER = """# Where the time of a decode step goes

Made by `python -m benchmarks.gpu.performance` on {device}: {model}, bf16, {context} tokens of context, one CUDA graph a
step. Microseconds a step, median over steps; the kernels' own times come from a profiled run, and so add up to a
little more than the step.

"""


def main() -> None:
    """Measure each batch and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.md"))
    args = parser.parse_args()
    runner = build_runner(ExecutorConfig(model=args.model, max_model_len=4096))
    assert isinstance(runner, GpuRunner)
    measured = [measure(runner, batch) for batch in BATCHES]
    lines = ["| | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |", "|---|" + "---|" * len(BATCHES)]
    for columns in zip(*measured, strict=True):
        for name in dict.fromkeys(name for column in columns for name in column):
            cells = (f"{column[name]:.1f}" if name in column else "" for column in columns)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    header = HEADER.format(device=runner.info.device, model=Path(args.model).name, context=INPUT_LEN + STEPS // 2)
    args.output.write_text(header + "\n".join(lines) + "\n")
    print(args.output.read_text())


def measure(runner: GpuRunner, batch: int) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds a step: by role of the kernels, and of the whole."""
    driver = Driver(runner)
    driver.prefill(batch, INPUT_LEN, STEPS + PROFILED_STEPS + 8)
    driver.decode(batch, 4, joins=True)
    driver.drain()
    first = runner.rings.num_launched
    driver.decode(batch, STEPS, joins=False)
    driver.drain()
    spans = np.array([runner.rings.span_ns(step) for step in range(first, first + STEPS)])  # [STEPS, 2] begin and end
    kernels = profiled_kernels(driver, batch, PROFILED_STEPS)
    driver.release(batch)
    driver.drain()
    driver.close()
    times: dict[str, float] = collections.defaultdict(float)
    for name, time_us in kernels:
        role = next((role for part, role in ROLES.items() if part in name), OTHERS)
        times[role] += time_us / PROFILED_STEPS
    step_us = statistics.median((spans[:, 1] - spans[:, 0]).tolist()) / 1e3
    gap_us = statistics.median((spans[1:, 0] - spans[:-1, 1]).tolist()) / 1e3
    roles = dict(sorted(times.items(), key=lambda item: item[1], reverse=True))
    return roles, {"a step, unprofiled": step_us, "between two steps": gap_us}


if __name__ == "__main__":
    main()
