"""A core of the simplest kind: one session, two sequences, and what came out as JSON on stdout.

`python -m tests.e2e.plain_session ADDRESS`, so that it may run in a network namespace of its own.
"""

import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1.executor_pb2_grpc import ExecutorServiceStub

NUM_TOKENS = 40
PROMPTS = [[5, 6, 7], [8, 9]]
SAMPLING = [pb.SamplingParams(temperature=0.0), pb.SamplingParams(temperature=1.0, top_p=1.0, seed=3)]


class SessionOver(Exception):
    """The executor has stopped in good order."""


def run_session(
    address: str, num_tokens: int = NUM_TOKENS, on_result: Callable[[], None] = lambda: None, timeout_ms: int = 0
) -> dict[str, Any]:
    """Waits for an executor at `address`; returns its `tensor_parallel_size` and the `tokens` of each sequence.

    timeout_ms: of each plan; 0: none. Raises: SessionOver, grpc.RpcError.
    """
    requests: queue.SimpleQueue[pb.RunSessionRequest | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = ExecutorServiceStub(channel).RunSession
        responses: Any = call(iter(requests.get, None), wait_for_ready=True, timeout=100)
        try:
            info = next(responses).info
            opening = pb.OpenSession(
                epoch=info.last_epoch + 1, protocol_version=info.protocol_version, model_digest=info.model_digest
            )
            requests.put(pb.RunSessionRequest(open=opening))
            assert next(responses).opened.epoch == opening.epoch
            for plan in _plans(opening.epoch, info.block_size, num_tokens):
                plan.timeout_ms = timeout_ms
                requests.put(pb.RunSessionRequest(plan=plan))
            tokens: list[list[int]] = [[] for _ in PROMPTS]
            for _ in range(num_tokens):
                result = next(responses).result
                for slot, token_id in zip(_values(result.slots), _values(result.token_ids), strict=True):
                    tokens[slot].append(token_id)
                on_result()
        except StopIteration:
            raise SessionOver from None
        finally:
            requests.put(None)
        return {"tensor_parallel_size": info.tensor_parallel_size, "tokens": tokens}


def _plans(epoch: int, block_size: int, num_tokens: int) -> list[pb.StepPlan]:
    """The prompts and their first tokens, then all other tokens in one plan."""
    num_blocks = -(-(max(map(len, PROMPTS)) + num_tokens) // block_size)
    slots = range(len(PROMPTS))
    sequences = [
        pb.NewSequence(
            slot=slot,
            token_ids=_column(PROMPTS[slot]),
            num_prompt_tokens=len(PROMPTS[slot]),
            block_ids=_column(range(slot * num_blocks, (slot + 1) * num_blocks)),
            sampling=SAMPLING[slot],
            max_total_tokens=len(PROMPTS[slot]) + num_tokens,
        )
        for slot in slots
    ]
    prefill = pb.StepPlan(
        epoch=epoch,
        step_id=1,
        new_sequences=sequences,
        prefill_slots=_column(slots),
        prefill_starts=_column([0] * len(slots)),
        prefill_counts=_column(map(len, PROMPTS)),
        prefill_samples=_column([1] * len(slots)),
    )
    decode = pb.StepPlan(epoch=epoch, step_id=2, join_slots=_column(slots), iterations=num_tokens - 1)
    return [prefill, decode]


def _column(values: Any) -> bytes:
    return np.array(list(values), dtype="<i4").tobytes()


def _values(column: bytes) -> list[int]:
    return np.frombuffer(column, dtype="<i4").tolist()


if __name__ == "__main__":
    print(json.dumps(run_session(sys.argv[1])))
