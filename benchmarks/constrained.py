"""What constrained requests cost the others: the real core and its grammar worker before an executor of a fixed speed.

The executor is a process that answers each step after the same time, however many rows it has, and takes random
tokens, those of a mask where there is one. So every token that an unconstrained stream gets late is the core's doing.
Run: `python -m benchmarks.constrained --model DIR`.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np

from benchmarks.machine import describe_machine
from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1 import executor_pb2_grpc as pb_grpc
from protos.duet.inference.v1 import inference_pb2
from scheduler_service.core.session import PROTOCOL_VERSION
from scheduler_service.grammar_source import to_grammar
from scheduler_service.ipc import CoreMessage, EngineStatus, Outputs, Sampling, Submit, encode_frame, read_frame
from servicekit.digest import model_digest

MAX_MODEL_LEN = 65_536
BLOCK_SIZE = 64
NUM_SLOTS = 256
WARM_UP_S = 3.0
SCHEMA = {
    "type": "array",
    "minItems": 50_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["a", "b", "c"]},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}


class FixedSpeedExecutor(pb_grpc.ExecutorServiceServicer):
    """Keeps slots and the decode set, and no KV cache."""

    def __init__(self, digest: str, vocab_size: int, step_s: float) -> None:
        self._digest = digest
        self._vocab_size = vocab_size
        self._step_s = step_s

    def RunSession(
        self, request_iterator: Iterator[pb.RunSessionRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.RunSessionResponse]:
        """One session; see executor.proto."""
        info = pb.ExecutorInfo(
            protocol_version=PROTOCOL_VERSION,
            architecture="FixedSpeed",
            model_digest=self._digest,
            dtype="float32",
            device="none",
            vocab_size=self._vocab_size,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_SLOTS * MAX_MODEL_LEN // BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_tokens_per_step=8192,
            max_inflight_plans=8,
        )
        yield pb.RunSessionResponse(info=info)
        yield pb.RunSessionResponse(opened=pb.SessionOpened(epoch=next(request_iterator).open.epoch))
        decode_set, rng, free_at = set[int](), np.random.default_rng(0), 0.0
        arrivals: queue.SimpleQueue[tuple[float, pb.StepPlan]] = queue.SimpleQueue()
        threading.Thread(target=_note_arrivals, args=(request_iterator, arrivals), daemon=True).start()
        while True:
            arrived_at, plan = arrivals.get()
            decode_set -= set(_ints(plan.release_slots))
            decode_set -= set(_ints(plan.leave_slots))
            decode_set |= set(_ints(plan.join_slots))
            masks = np.frombuffer(plan.masks, dtype=np.uint8).reshape(-1, -(-self._vocab_size // 32) * 4)
            by_slot = dict(zip(_ints(plan.mask_slots), masks, strict=True))
            chunks = zip(_ints(plan.prefill_slots), _ints(plan.prefill_samples), strict=True)
            first = [slot for slot, samples in chunks if samples]
            for index in range(max(1, plan.iterations)):
                free_at = max(free_at, arrived_at) + self._step_s  # whatever this process takes for it
                rows = (sorted(decode_set) if plan.iterations else []) + (first if index == 0 else [])
                tokens = [self._token(by_slot.get(slot), rng) for slot in rows]
                time.sleep(max(0.0, free_at - time.monotonic()))
                result = pb.StepResult(
                    epoch=plan.epoch,
                    step_id=plan.step_id + index,
                    slots=array("i", rows).tobytes(),
                    token_ids=array("i", tokens).tobytes(),
                    finish_reasons=bytes(4 * len(rows)),
                    device_time_ns=int(self._step_s * 1e9),
                )
                yield pb.RunSessionResponse(result=result)

    def _token(self, mask: np.ndarray[Any, Any] | None, rng: np.random.Generator) -> int:
        if mask is None:
            return int(rng.integers(self._vocab_size))
        byte = int(rng.choice(np.flatnonzero(mask)))
        return 8 * byte + int(rng.choice(np.flatnonzero(np.unpackbits(mask[byte : byte + 1], bitorder="little"))))


def _note_arrivals(
    requests: Iterator[pb.RunSessionRequest], arrivals: "queue.SimpleQueue[tuple[float, pb.StepPlan]]"
) -> None:
    with contextlib.suppress(grpc.RpcError):
        for request in requests:
            arrivals.put((time.monotonic(), request.plan))


def _ints(column: bytes) -> list[int]:
    return array("i", column).tolist()


def run_executor(digest: str, vocab_size: int, step_s: float, port: Any) -> None:
    """Serve until killed; tells the port."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    pb_grpc.add_ExecutorServiceServicer_to_server(FixedSpeedExecutor(digest, vocab_size, step_s), server)
    port.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


async def count_tokens(socket: str, num_free: int, num_constrained: int, duration_s: float) -> tuple[float, float]:
    """Tokens a second of a stream: unconstrained ones, and constrained ones, in the mean."""
    reader, writer = await asyncio.open_unix_connection(socket)
    decoder = msgspec.msgpack.Decoder(CoreMessage)
    while not (isinstance(message := await read_frame(reader, decoder), EngineStatus) and message.ready):
        assert message is not None
    grammar = to_grammar(inference_pb2.Constraint(json_schema=json.dumps(SCHEMA)))
    for stream in range(num_free + num_constrained):
        submit = Submit(
            streams=[stream],
            request_id=f"request-{stream}",
            token_ids=array("i", [stream] * 16).tobytes(),
            sampling=Sampling(),
            stop_token_ids=[],
            end_token_ids=[],
            max_tokens=None,
            priority=0,
            cache_salt=str(stream),
            arrival=time.monotonic(),
            deadline=None,
            constraint=grammar if stream >= num_free else None,
        )
        writer.write(encode_frame(submit))
    counts, started = Counter[int](), set[int]()
    began: float | None = None
    while began is None or time.monotonic() < began + WARM_UP_S + duration_s:
        message = await read_frame(reader, decoder)
        if isinstance(message, EngineStatus):
            assert message.ready, "the executor was lost"
            continue
        assert isinstance(message, Outputs)
        assert not message.failed, message.failed
        assert not message.finished, message.finished
        streams = array("i", message.streams)
        started.update(streams)
        if began is None and len(started) == num_free + num_constrained:
            began = time.monotonic()
        if began is not None and time.monotonic() > began + WARM_UP_S:
            counts.update(streams)
    writer.close()
    free = sum(counts[stream] for stream in range(num_free)) / num_free / duration_s
    constrained = sum(counts.values()) / duration_s - free * num_free
    return free, constrained / num_constrained if num_constrained else 0.0


def measure(args: argparse.Namespace, step_ms: float, num_constrained: int) -> tuple[float, float]:
    """One run with services of its own."""
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Queue()
    digest = model_digest(args.model)
    executor = spawn.Process(target=run_executor, args=(digest, args.vocab_size, step_ms / 1000, port), daemon=True)
    executor.start()
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/core.sock"
        flags = ["--model", str(args.model), "--executor", f"127.0.0.1:{port.get()}", "--core-socket", socket]
        flags += ["--max-inflight-steps", str(args.inflight)]
        core = subprocess.Popen([sys.executable, "-m", "scheduler_service.core", *flags], stderr=subprocess.DEVNULL)
        try:
            while not Path(socket).exists():
                time.sleep(0.05)
            return asyncio.run(count_tokens(socket, args.streams, num_constrained, args.duration))
        finally:
            core.terminate()
            core.wait()
            executor.kill()
            executor.join()


def main() -> None:
    """Measure with and without constrained neighbours, in turns; print a table; store it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constrained", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and tokenizer.json")
    parser.add_argument("--streams", type=int, default=16, help="unconstrained streams")
    parser.add_argument("--constrained", type=int, default=8, help="constrained streams beside them")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[2.0, 6.0, 20.0], help="time of a step")
    parser.add_argument("--inflight", type=int, default=2, help="plans in flight")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds that are counted of each run")
    parser.add_argument("--runs", type=int, default=3, help="of each kind; the medians count")
    parser.add_argument("--json", type=Path, default=None, help="where to store the figures")
    args = parser.parse_args()
    args.vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    figures: list[dict[str, float]] = []
    print(f"{'step':>8}{'alone':>12}{'beside':>12}{'change':>9}{'constrained':>14}   tokens/s of a stream")
    for step_ms in args.step_ms:
        runs = [(measure(args, step_ms, 0), measure(args, step_ms, args.constrained)) for _ in range(args.runs)]
        alone = statistics.median(first[0] for first, _ in runs)
        beside = statistics.median(second[0] for _, second in runs)
        constrained = statistics.median(second[1] for _, second in runs)
        figures.append({"step_ms": step_ms, "alone": alone, "beside": beside, "constrained": constrained})
        change = f"{beside / alone - 1:+.1%}"
        print(f"{step_ms:>5.1f} ms{alone:>12.1f}{beside:>12.1f}{change:>9}{constrained:>14.1f}")
    if args.json is not None:
        report = {"machine": describe_machine(), "flags": vars(args) | {"model": str(args.model)}, "runs": figures}
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
