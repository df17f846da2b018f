"""The executor in process: milliseconds a decode step, prefill rate, first token; and where a step's time goes.

usage: python -m benchmarks.gpu.decode_step MODEL [--profile] [--eager] [--batches 1,8,64,256] [--json FILE]

Under torchrun, on several GPUs: all ranks run the same plans, and rank 0 prints.
"""

import argparse
import collections
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.driver import Driver
from executor_service.config import ExecutorConfig
from executor_service.distributed.placement import Placement
from executor_service.runner.build import build_runner
from executor_service.runner.runner import Runner


def main() -> None:
    """Print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    placement = Placement.read(os.environ)
    start = time.perf_counter()
    config = ExecutorConfig(
        model=args.model,
        max_model_len=4096,
        enforce_eager=args.eager,
        attention_backend=args.attention_backend,
        tensor_parallel_size=placement.size,
    )
    runner = build_runner(config, placement)
    if placement.rank:
        sys.stdout = open(os.devnull, "w")
    print(f"ready in {time.perf_counter() - start:.1f} s: {runner.info.limits}", flush=True)
    rows: list[dict[str, float | list[float]]] = []
    for batch in args.batches.split(","):
        rows.append(measure(runner, int(batch), args.input_len, args.output_len))
        print(json.dumps(rows[-1]), flush=True)
    if args.json and not placement.rank:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.profile:
        for batch in args.batches.split(","):
            profile(runner, int(batch), args.input_len)
    sys.stdout.flush()
    if placement.size > 1:
        os._exit(0)  # graphs that hold NCCL's kernels can make an orderly end wait for ever


def measure(runner: Runner, batch: int, input_len: int, output_len: int) -> dict[str, float | list[float]]:
    """Milliseconds of wall clock and of the device a step, and prefill tokens a second; medians where several."""
    driver = Driver(runner)
    driver.prefill(1, 8, 8)
    driver.release(1)
    driver.drain()
    start = time.perf_counter()
    driver.prefill(batch, input_len, output_len)
    prefill_s = driver.drain()[-1][0] - start
    start = time.perf_counter()
    driver.decode(batch, output_len - 1, joins=True)
    outputs = driver.drain()
    decode_s = outputs[-1][0] - start
    driver.release(batch)
    driver.drain()
    ttfts: list[float] = []
    for _ in range(5 if batch == 1 else 0):
        start = time.perf_counter()
        driver.prefill(1, 128, 8)
        ttfts.append(driver.drain()[-1][0] - start)
        driver.release(1)
    driver.drain()
    driver.close()
    device_ms: list[float] = [output.device_time_ns / 1e6 for _, output in outputs]
    row: dict[str, float | list[float]] = {
        "batch": batch,
        "prefill_tokens_per_s": round(batch * input_len / prefill_s),
        "step_ms": round(decode_s / (output_len - 1) * 1e3, 4),
        "device_ms": round(statistics.mean(device_ms), 4),
        "device_ms_first_last": [round(device_ms[5], 4), round(device_ms[-1], 4)],
    }
    return row | ({"ttft_128_ms": round(statistics.median(ttfts) * 1e3, 3)} if ttfts else {})


def profile(runner: Runner, batch: int, input_len: int) -> None:
    """Microseconds a step, by kernel."""
    driver, steps = Driver(runner), 8
    driver.prefill(batch, input_len, 64)
    driver.decode(batch, 4, joins=True)
    driver.drain()
    kernels = profiled_kernels(driver, batch, steps)
    driver.release(batch)
    driver.drain()
    driver.close()
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, time_us in kernels:
        times[name[:70]].append(time_us)
    print(f"--- batch {batch}: {sum(map(sum, times.values())) / steps:.0f} us a step in kernels")
    for name, calls in sorted(times.items(), key=lambda item: sum(item[1]), reverse=True)[:14]:
        print(f"{sum(calls) / steps:9.1f} us {len(calls) / steps:7.1f} x {statistics.mean(calls):7.2f} us  {name}")


def profiled_kernels(driver: Driver, batch: int, steps: int) -> list[tuple[str, float]]:
    """The kernels of so many further decode steps, in order: name, and microseconds by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        driver.decode(batch, steps, joins=False)
        driver.drain()
        torch.cuda.synchronize()
    events = recorded.events() or []
    return [(event.name, event.device_time_total) for event in events if event.device_type.name == "CUDA"]


if __name__ == "__main__":
    main()
