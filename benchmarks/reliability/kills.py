"""Kills and stops processes of the services at random moments under streams that must not notice.

`python -m benchmarks.reliability.kills`. Each round draws a process (executor rank, core or front end), a signal
(SIGKILL or SIGSTOP) and the time since the last round, which is uniform from 0 on: many rounds meet the recovery of
the one before. Afterwards every stream's tokens are compared with those of its prompt alone on undisturbed services.

Two of the services' rules would end streams where chance is unkind, and a round waits until they do not apply: after
five starts in a row of which a process was never ready its supervisor gives up, and a request is convicted by the third
executor in a row that dies before it has a token of it.
"""

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers_common import default_model_path
from benchmarks.reliability.comparison import Compared, Ended, Undisturbed, compare, draw_prompts
from benchmarks.reliability.kill_figures import Round, describe, summarize
from benchmarks.reliability.services import MODULES, TINY_FLAGS, Services, add_common_arguments, store, tiny_model
from duet import AsyncClient, Client, SamplingParams
from duet.errors import DuetError
from protos.duet.inference.v1 import inference_pb2 as pb

DETACH_S = 120.0
IN_TRANSIT_S = 0.1  # a token that comes so soon after a signal may have been on its way, and shows no recovery
MOST_FAILED_STARTS = 3  # a fifth one in a row ends the services, and one may not have been noticed yet
MOST_LOSSES = 2  # of the executor without a token of a stream between them
CONTROL_ROUNDS = 20  # that send no signal
RECOVERY_TIMEOUT_S = 300.0  # a stream that waits longer has failed


class Stream:
    """A request that lives."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.news_at = time.monotonic()
        self.num_losses = 0  # signals to the executor since its last token


class Load:
    """Streams of which each that ends is followed by another, and what they have shown."""

    def __init__(self, prompts: list[tuple[list[int], int]]) -> None:
        """One stream for each prompt, given with the number of tokens to generate."""
        self.prompts = prompts
        self.alive: set[Stream] = set()
        self.ended: list[Ended] = []
        self.failures: list[str] = []
        self.num_lost = self.num_duplicated = 0
        self.waits: dict[Round, set[Stream]] = {}  # rounds that are not over, with the streams that are waited for
        self.is_over = False

    async def keep(self, index: int, client: AsyncClient) -> None:
        """Generate from one prompt, again and again, until the load is over."""
        while not self.is_over:
            stream = Stream()
            self.alive.add(stream)
            try:
                self.ended.append(await self._generate(index, client, stream))
            except DuetError as error:
                self.failures.append(f"{type(error).__name__}: {error} (after {stream.num_tokens} tokens)")
            finally:
                self.alive.remove(stream)
                self._note_news(stream)

    def begin(self, current: Round) -> None:
        """The signal of a round was sent: wait for all streams."""
        current.num_streams = len(self.alive)
        current.overlaps = bool(self.waits)
        for other in self.waits:
            other.overlaps = True
        self.waits[current] = set(self.alive)
        for stream in self.alive:
            stream.num_losses += current.process == "executor"

    async def _generate(self, index: int, client: AsyncClient, stream: Stream) -> Ended:
        prompt, num_tokens = self.prompts[index]
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        token_ids: list[int] = []
        text = ""
        async for event in client.stream(prompt, params, detach_seconds=DETACH_S):
            if isinstance(event, pb.TokenDelta):
                self.num_lost += max(0, event.offset - len(token_ids))
                self.num_duplicated += max(0, len(token_ids) - event.offset)
                token_ids += event.token_ids
                text += event.text
                stream.num_tokens = len(token_ids)
                self._note_news(stream)
        return Ended(index, token_ids, text)

    def _note_news(self, stream: Stream) -> None:
        now = time.monotonic()
        stream.news_at = now
        is_over = stream not in self.alive
        late = [one for one, waiting in self.waits.items() if is_over or now - one.sent_at > IN_TRANSIT_S]
        if len(late) == len(self.waits):
            stream.num_losses = 0
        for current in late:
            self.waits[current].discard(stream)
            if not self.waits[current]:
                del self.waits[current]
                current.recovery_s = now - current.sent_at


class Rounds:
    """Sends the signals."""

    def __init__(self, services: Services, load: Load, seed: int, span_s: float) -> None:
        self.done: list[Round] = []
        self.control: list[Round] = []
        self.num_postponed = 0
        self._services = services
        self._load = load
        self._rng = random.Random(seed)
        self._span_s = span_s

    async def run(self, count: int) -> None:
        """Wait for all streams to flow; then the control, then `count` rounds, then for all streams to flow again."""
        await self._until(lambda: all(stream.num_tokens for stream in self._load.alive))
        for _ in range(CONTROL_ROUNDS):
            self.control.append(Round(process="none", signal="none", gap_s=0.0, sent_at=time.monotonic()))
            self._load.begin(self.control[-1])
            await self._until(lambda: not self._load.waits)
        for number in range(1, count + 1):
            await self._round()
            print(f"round {number}: {self.done[-1].name}; {len(self._load.ended)} streams ended, "
                  f"{len(self._load.failures)} failed, {len(self._load.waits)} rounds wait", flush=True)  # fmt: skip
        await self._until(lambda: not self._load.waits)

    async def _round(self) -> None:
        gap_s = self._rng.uniform(0, self._span_s)
        process, number = self._rng.choice(list(MODULES)), self._rng.choice((signal.SIGKILL, signal.SIGSTOP))
        await asyncio.sleep(gap_s)
        await self._make_fair(process)
        await self._until(lambda: self._hit(process, number))
        self.done.append(Round(process=process, signal=number.name, gap_s=gap_s, sent_at=time.monotonic()))
        self._load.begin(self.done[-1])

    def _hit(self, process: str, number: signal.Signals) -> bool:
        """Send the signal to one of the processes of a kind; False where none is there, since it is being restarted."""
        pids = self._services.pids(process)
        try:
            os.kill(self._rng.choice(pids), number)
        except (IndexError, ProcessLookupError):
            return False
        return True

    async def _make_fair(self, process: str) -> None:
        """Wait until neither rule can end a stream, where one of them could."""
        load = self._load

        def may_convict() -> bool:
            return process == "executor" and any(stream.num_losses >= MOST_LOSSES for stream in load.alive)

        if self._services.log.failed_starts() >= MOST_FAILED_STARTS:
            self.num_postponed += 1
            await self._until(lambda: not load.waits)
        elif may_convict():
            self.num_postponed += 1
            await self._until(lambda: not may_convict())

    async def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + RECOVERY_TIMEOUT_S
        while not condition():
            if self._services.has_ended() or time.monotonic() > end:
                raise RuntimeError(f"the services do not recover: {len(self._load.waits)} rounds wait, "
                                   f"{len(self._load.alive)} streams are alive")  # fmt: skip
            await asyncio.sleep(0.01)


async def run_rounds(services: Services, load: Load, args: argparse.Namespace) -> Rounds:
    """Keep the streams going over all rounds, and let those that live at the end come to theirs."""
    rounds = Rounds(services, load, args.seed, args.span_s)
    clients = [AsyncClient(services.address) for _ in range(args.clients)]
    try:
        async with asyncio.TaskGroup() as tasks:
            for index in range(len(load.prompts)):
                tasks.create_task(load.keep(index, clients[index % args.clients]))
            await rounds.run(args.rounds)
            load.is_over = True
    finally:
        for client in clients:
            await client.close()
    return rounds


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything, on services of its own; returns the report."""
    model = tiny_model(directory / "tiny") if args.tiny else args.model or default_model_path()
    link = directory / "model"  # by which these processes are told from others of the same model
    link.symlink_to(model)
    kind = TINY_FLAGS if args.tiny else {"dtype": "float32"}
    flags = {**kind, "num_frontends": args.frontends, "hang_timeout_s": args.hang_timeout_s}
    if args.num_threads is not None:
        flags["num_threads"] = args.num_threads
    log = args.log or directory / "log"
    with Services(link, log, **flags) as services, Client(services.address) as client:
        undisturbed = Undisturbed(client)
        load = Load(draw_prompts(args.streams, args.tokens, args.seed))
        references = [undisturbed.run(*prompt) for prompt in load.prompts]
        print(f"{len(references)} prompts were run alone", flush=True)
        began = time.monotonic()
        rounds = asyncio.run(run_rounds(services, load, args))
        took_s = time.monotonic() - began
        compared: Compared = compare(load.ended, references, undisturbed)
        settings = {name: getattr(args, name) for name in ("rounds", "streams", "tokens", "span_s", "seed", "clients")}
        return {
            "settings": {**settings, "model": model.name, **flags, "detach_s": DETACH_S},
            "took_s": round(took_s, 1),
            **describe(load.ended, load.failures, load.num_lost, load.num_duplicated, compared),
            **summarize(rounds.done, rounds.control, services.log.executor_starts_s()),
            "num_postponed": rounds.num_postponed,
            "server": {"idle_check_failures_total": client.server().load.idle_check_failures_total},
        }


def main() -> int:
    """Run, store, and print; returns 1 where a stream failed or differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.kills", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64, help="alive at any time")
    parser.add_argument("--model", type=Path, default=None, help="directory of a model (default: the default model)")
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny model instead")
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 32), help="fewest and most tokens of a stream")
    parser.add_argument("--span-s", type=float, default=10.0, help="longest time between two rounds, seconds")
    parser.add_argument("--clients", type=int, default=8, help="connections")
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--num-threads", type=int, default=None, help="of the executor (default: its own)")
    parser.add_argument("--hang-timeout-s", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    add_common_arguments(parser, "kills")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="duet-kills-") as directory:
        report = measure(args, Path(directory))
    store(args.json, report)
    streams = report["streams"]
    print("; ".join(f"{name.replace('_', ' ')} {count}" for name, count in streams.items()))
    for row in report["recovery"]:
        print(f"{row['process']:<10}{row['signal']:<9}alone {row['alone_s']}, overlapping {row['overlapping_s']}")
    print(f"executor start {report['executor_start_s']}, control {report['control_s']}")
    return 1 if report["failures"] or streams["different"] or streams["lost_tokens"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
