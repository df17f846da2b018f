"""Both services under `duet serve`, as an operator runs them, with what they log; and figures out of that."""

import argparse
import datetime
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.machine import describe_machine
from benchmarks.reliability.memory import family
from duet.launch import to_flags, wait_for_session
from servicekit.lifeline import PARENT_PID
from tests.faults.processes import descendants
from tests.tiny_llama import write_tiny_llama

RESULTS = Path(__file__).parent.parent / "results" / "reliability"
MODULES = {
    "executor": "executor_service.rank",
    "core": "scheduler_service.core",
    "front end": "scheduler_service.frontend",
}

TINY_FLAGS = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_threads": 1}  # of the tiny model

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
_LINE = re.compile(r"(\S+ \S+),(\d+) (.+)\[\d+\] [A-Z]+ (.*)")
_ENDED = re.compile(r"(.+?) ended (before it was ready |as soon as it was ready |)\(.*\): .*?( again in ([\d.]+) s)?")


class ServiceLog:
    """What supervisors and ranks have written about starts and ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def text(self) -> str:
        """All of it."""
        return self._path.read_text(errors="replace")

    def failed_starts(self) -> int:
        """The longest row in which a process now is of starts before readiness; the fifth ends the services."""
        rows: dict[str, int] = {}
        for _, _, message in self._lines():
            if ended := _ENDED.fullmatch(message):
                rows[ended[1]] = rows.get(ended[1], 0) + 1 if ended[2].startswith("before") else 0
        return max(rows.values(), default=0)

    def executor_starts_s(self) -> list[float]:
        """How long each start of the executor took that came to its end, until it was ready; seconds."""
        starts: list[float] = []
        begun_at: float | None = None
        for now, who, message in self._lines():
            if (ended := _ENDED.fullmatch(message)) and who == "executor":
                begun_at = now + float(ended[4] or 0)
            elif message.startswith("listening on port") and who == "rank 0" and begun_at is not None:
                starts.append(now - begun_at)
                begun_at = None
        return starts

    def _lines(self) -> list[tuple[float, str, str]]:
        """When, in seconds, who and what, of each line of the log that has all three."""
        found = map(_LINE.fullmatch, self.text.splitlines())
        lines = [line.groups() for line in found if line]
        return [
            (datetime.datetime.fromisoformat(when).timestamp() + int(ms) / 1e3, who, text)
            for when, ms, who, text in lines
        ]


class Services:
    """The services of a model, which die with this process."""

    def __init__(
        self, model: Path, log: Path, tree: Path | None = None, env: Mapping[str, str] = os.environ, **flags: object
    ) -> None:
        """`flags` are those of either service, with underscores; `log` is written anew. tree: where the code is."""
        self.model = model
        self.log = ServiceLog(log)
        port, executor_port = _free_port(), _free_port()
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "duet", "serve", str(model), "--listen", self.address]
        command += ["--executor-listen", f"127.0.0.1:{executor_port}", *to_flags(flags)]
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=tree,
                env={**env, PARENT_PID: str(os.getpid())},
                start_new_session=True,  # Ctrl-C is for this process, which then ends them
            )

    def __enter__(self) -> Self:
        """Wait until requests are served. Raises: SystemExit, where they are not."""
        if not wait_for_session(self.address, self.has_ended, _START_TIMEOUT_S):
            self.close()
            sys.exit(f"the services did not start:\n{self.log.text}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_id(self) -> int:
        """Of the outermost supervisor, from which all others descend."""
        return self._popen.pid

    def has_ended(self) -> bool:
        """Whether the outermost supervisor is gone, which nothing may bring about but `close`."""
        return self._popen.poll() is not None

    def close(self) -> None:
        """Stop the services at once."""
        if not self.has_ended():
            self._popen.send_signal(signal.SIGINT)
        self._popen.wait(_STOP_TIMEOUT_S)

    def processor_s(self) -> float:
        """What all of its processes have used of the processors so far, in seconds."""
        ticks = 0
        for process in family(self.process_id):
            fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime: proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def pids(self, process: str) -> list[int]:
        """The living processes of a kind, a key of MODULES; none while it is between two starts."""
        return descendants(MODULES[process], str(self.model))


def tiny_model(directory: Path) -> Path:
    """The tests' model with random weights, which computes a step in a millisecond; made where it is not there."""
    return directory if (directory / "config.json").is_file() else write_tiny_llama(directory)


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The flags of every program here: where figures and the services' log go."""
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where to store the figures")
    parser.add_argument("--log", type=Path, default=None, help="where to keep the services' log (default: nowhere)")


def store(path: Path, report: dict[str, Any]) -> None:
    """Write figures, and where they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), **report}, indent=2) + "\n")
    print(f"stored in {path}")


def quantiles(values: Sequence[float]) -> dict[str, float | int]:
    """Count, median and 99th percentile (nearest rank; of fewer than a hundred values their greatest)."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    ranks = {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {"count": len(ordered), **{name: round(value, 3) for name, value in ranks.items()}}


def wait_for(condition: Any, timeout_s: float) -> bool:
    """Ask `condition` ten times a second until it holds; False where it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]
