"""CPU time that the scheduler core spends on a steady decode step, and the bytes of its plan.

A step is all that the core does for one: schedule, encode and serialize the plan, parse and apply the result, encode
the frame for the front end. The executor's part is not measured. Run: `python -m benchmarks.core_step`.
"""

import argparse
import gc
import json
import random
import statistics
import time
from array import array
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import decode_result
from scheduler_service.core.waiting_queue import first_come_first_served
from scheduler_service.ipc import Sampling, encode_frame

BLOCK_SIZE = 64
PROMPT_TOKENS = (64, 1024)  # drawn evenly, so that the sequences cross block boundaries at different steps
VOCAB_SIZE = 49152
DEVICE_TIME_NS = 8_000_000  # a step of this length gets a plan of its own
PLANS_IN_FLIGHT = 2
WARM_UP_STEPS = 100


class SteadyCore:
    """Sequences that decode for ever, and the executor's side of the wire."""

    def __init__(self, num_running: int, num_steps: int, seed: int) -> None:
        max_model_len = PROMPT_TOKENS[1] + num_steps + BLOCK_SIZE
        limits = ExecutorLimits(
            block_size=BLOCK_SIZE,
            num_blocks=num_running * -(-max_model_len // BLOCK_SIZE),
            num_slots=num_running,
            max_tokens_per_step=8192,
            max_model_len=max_model_len,
            max_inflight_plans=PLANS_IN_FLIGHT,
        )
        self._rng = random.Random(seed)
        self._pool = RequestPool(first_come_first_served, max_waiting=num_running)
        self._scheduler = Scheduler(self._pool, Policy(PLANS_IN_FLIGHT))
        self._outbox = Outbox()
        self._in_flight: deque[bytes] = deque()  # results
        self.plan_bytes: list[int] = []
        self._pool.begin_epoch(limits)
        for index in range(num_running):
            num_tokens = self._rng.randint(*PROMPT_TOKENS)
            token_ids = array("i", [self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)])
            self._pool.submit(
                Request(
                    request_id=f"request-{index}",
                    outbox=self._outbox,
                    stream=index,
                    token_ids=token_ids,
                    num_prompt_tokens=num_tokens,
                    max_total_tokens=max_model_len,
                    sampling=Sampling(),
                    stop_token_ids=[2],
                    priority=0,
                    cache_salt="",
                    arrival_time=0.0,
                    deadline=None,
                )
            )
        while len(self._decoding) < num_running:
            self.step()

    @property
    def _decoding(self) -> list[Request]:
        assert self._pool.epoch is not None
        return self._pool.epoch.decode_set.columns()[1]

    def step(self) -> int:
        """Send what may be sent and settle the oldest step; returns nanoseconds of CPU time for both."""
        spent_ns = 0
        while len(self._in_flight) < PLANS_IN_FLIGHT:
            began = time.thread_time_ns()
            plan = self._scheduler.schedule(0.0)
            assert plan is not None
            message = plan.encode(epoch=1)
            serialized = pb.RunSessionRequest(plan=message).SerializeToString()
            spent_ns += time.thread_time_ns() - began
            self.plan_bytes.append(len(serialized))
            self._in_flight.append(self._result(message))
        serialized = self._in_flight.popleft()
        began = time.thread_time_ns()
        result = pb.RunSessionResponse.FromString(serialized).result
        apply_result(self._pool, decode_result(result))
        outputs = self._outbox.take()
        if outputs is not None:
            encode_frame(outputs)
        return spent_ns + time.thread_time_ns() - began

    def _result(self, plan: pb.StepPlan) -> bytes:
        """What the executor would answer: a token for every row, and no end."""
        slots = np.frombuffer(plan.prefill_slots, dtype="<i4")[np.frombuffer(plan.prefill_samples, dtype="<i4") == 1]
        if plan.iterations:
            assert not len(plan.prefill_slots), "decode does not wait for prompts here"
            slots = np.array([request.slot for request in self._decoding], dtype="<i4")
        token_ids = np.array([self._rng.randrange(VOCAB_SIZE) for _ in slots], dtype="<i4")
        result = pb.StepResult(
            epoch=1,
            step_id=plan.step_id,
            slots=slots.tobytes(),
            token_ids=token_ids.tobytes(),
            finish_reasons=bytes(4 * len(slots)),
            device_time_ns=DEVICE_TIME_NS,
        )
        return pb.RunSessionResponse(result=result).SerializeToString()


def measure(num_running: int, num_steps: int, seed: int) -> dict[str, Any]:
    """CPU microseconds of a step and bytes of a plan with `num_running` sequences."""
    core = SteadyCore(num_running, WARM_UP_STEPS + num_steps, seed)
    gc.collect()
    gc.freeze()
    for _ in range(WARM_UP_STEPS):
        core.step()
    core.plan_bytes.clear()
    spent_us = sorted(core.step() / 1000 for _ in range(num_steps))
    return {
        "running": num_running,
        "steps": num_steps,
        "median_us": round(statistics.median(spent_us), 1),
        "p99_us": round(spent_us[int(0.99 * num_steps)], 1),
        "plan_median_bytes": statistics.median(core.plan_bytes),
        "plan_max_bytes": max(core.plan_bytes),
    }


def main() -> None:
    """Measure each number of running sequences; print a table; store it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_step", description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024], help="running sequences")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to store the figures")
    args = parser.parse_args()
    figures = [measure(num_running, args.steps, args.seed) for num_running in args.running]
    print(f"{'running':>8}{'median':>11}{'p99':>11}{'plan median':>14}{'plan max':>11}")
    for row in figures:
        print(
            f"{row['running']:>8}{row['median_us']:>8.0f} us{row['p99_us']:>8.0f} us"
            f"{row['plan_median_bytes']:>12.0f} B{row['plan_max_bytes']:>9} B"
        )
    if args.json is not None:
        report = {"machine": describe_machine(), "core_step": figures}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
