"""Clients that come and go at twice the server's capacity, and what the server is left with.

`python -m benchmarks.reliability.churn --minutes 10`. Every client opens a connection of its own, asks for something,
and leaves in one of the ways of client_lives.py; then another comes. Resident memory of each process of the services is
sampled every five seconds; its slope is that of a straight line through the samples of the second half. Once all
clients are gone the server has to be empty, and its own checks must say so.
"""

import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.client_lives import LIVES, SHORT_DETACH_S, Refused, live
from benchmarks.reliability.memory import MemoryLog
from benchmarks.reliability.services import TINY_FLAGS, Services, add_common_arguments, store, tiny_model, wait_for
from duet import Client
from protos.duet.inference.v1 import inference_pb2 as pb

SLOTS, QUEUE = 16, 16
CLIENTS = 2 * (SLOTS + QUEUE)
LEFTOVERS = ("running_requests", "waiting_requests", "detached_requests", "quarantined_requests", "used_blocks")
WARM_UP_S = 5.0  # of each kind of client at least one, before open files are counted for the first time
MOST_REFUSED_S = 1.0  # that a client who was refused waits, before another comes


async def churn(address: str, seconds: float, seed: int) -> Counter[str]:
    """Keep CLIENTS clients there for a while; returns how often each kind of life came to which end."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def come_and_go(rng: random.Random) -> None:
        while time.monotonic() < end:
            name = rng.choices(list(LIVES), [weight for weight, _ in LIVES.values()])[0]
            try:
                counts[f"{name}: {await live(name, address, rng)}"] += 1
            except Refused:
                counts[f"{name}: refused"] += 1
                await asyncio.sleep(rng.uniform(0, MOST_REFUSED_S))

    gc.collect()
    gc.freeze()
    async with asyncio.TaskGroup() as tasks:
        for index in range(CLIENTS):
            tasks.create_task(come_and_go(random.Random(f"{seed} {index}")))
        while time.monotonic() < end:
            await asyncio.sleep(0.5)
            gc.collect()  # gRPC hangs up when nothing refers to a channel, and its own objects do in a circle
    return counts


def leftovers(client: Client) -> dict[str, int]:
    """What the server holds of requests, where it should hold nothing."""
    load = client.server().load
    return {name: getattr(load, name) for name in LEFTOVERS}


async def is_empty_again(client: Client) -> bool:
    """Hang up for good and wait until the server holds nothing; False where it does not let go."""
    gc.collect()
    await asyncio.sleep(SHORT_DETACH_S)
    return wait_for(lambda: not any(leftovers(client).values()), 10 * SHORT_DETACH_S)


def checks(load: pb.Load) -> dict[str, int]:
    """How often the core looked for leaks, and found some."""
    return {"passed": load.idle_checks_total, "failed": load.idle_check_failures_total}


async def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything, on services of its own; returns the report."""
    flags = {**TINY_FLAGS, "max_num_seqs": SLOTS, "max_waiting": QUEUE, "num_frontends": 2, "num_blocks": 512}
    model = tiny_model(directory / "tiny")
    with Services(model, args.log or directory / "log", **flags) as services, Client(services.address) as client:
        await churn(services.address, WARM_UP_S, args.seed - 1)
        await is_empty_again(client)
        before = client.server().load
        with MemoryLog(services.process_id) as memory:
            files = memory.open_files()
            counts = await churn(services.address, 60 * args.minutes, args.seed)
        is_empty = await is_empty_again(client)
        is_checked = wait_for(lambda: client.server().load.idle_checks_total > before.idle_checks_total, 10.0)
        load = client.server().load
        return {
            "settings": {"minutes": args.minutes, "clients": CLIENTS, "slots": SLOTS, "queue": QUEUE,
                         "seed": args.seed, "detach_s": SHORT_DETACH_S, **flags},
            "lives": dict(sorted(counts.items())),
            "requests": load.finished_requests_total - before.finished_requests_total,
            "tokens": load.output_tokens_total - before.output_tokens_total,
            "preemptions": load.preemptions_total - before.preemptions_total,
            "memory": memory.slopes(),
            "open_files": {name: {"before": files.get(name), "after": count}
                           for name, count in memory.open_files().items()},
            "leftovers": leftovers(client),
            "idle_checks": {"before": checks(before), "after": checks(load)},
            "is_clean": is_empty and is_checked and not load.idle_check_failures_total and not memory.num_restarts,
            "restarts": memory.num_restarts,
            "samples": memory.samples(),
        }  # fmt: skip


def main() -> int:
    """Run, store, and print; returns 1 where something is left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.churn", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    add_common_arguments(parser, "churn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="duet-churn-") as directory:
        report = asyncio.run(measure(args, Path(directory)))
    store(args.json, report)
    for life, count in report["lives"].items():
        print(f"{count:>8} {life}")
    for name, slope in report["memory"].items():
        files = report["open_files"][name]
        print(f"{name:<24}{slope['mib']:>8.1f} MiB {slope['slope_kib_per_min']:>+9.1f} ± "
              f"{slope['standard_error']:.1f} KiB/min, open files {files['before']} -> {files['after']}")  # fmt: skip
    print(f"left: {report['leftovers']}, idle checks: {report['idle_checks']}, restarts: {report['restarts']}")
    return 0 if report["is_clean"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
