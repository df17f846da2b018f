"""Real supervisors of tiny Python children that write their process id to a file at every start."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from servicekit.child_process import Child
from servicekit.supervisor import Stop, Supervisor

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT)}

REPORT = """
import os, sys, time
from servicekit.lifeline import bind_to_parent, notify_ready
bind_to_parent()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
READY = REPORT + "notify_ready(); time.sleep(600)"
BEATING = """
import asyncio
from servicekit.lifeline import Heartbeat
async def main():
    Heartbeat().beat_in_loop()
    {}
    await asyncio.sleep(600)
asyncio.run(main())
"""
BEATS = REPORT + BEATING.format("pass")
NEVER_READY = REPORT + "time.sleep(600)"
STILLBORN = REPORT + "sys.exit(1)"
HOPELESS = REPORT + "sys.exit(2)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + READY
PARENT = """
import sys
from servicekit.child_process import Child
from servicekit.supervisor import Stop, Supervisor
child = Child("child", [sys.executable, "-c", sys.argv[2], sys.argv[1]])
Supervisor([child], hang_timeout_s=2.0).run(Stop())
"""
SERVICE = """
import sys
from servicekit.child_process import Child
from servicekit.supervisor import supervise
sys.exit(supervise("service", [Child("child", [sys.executable, "-c", sys.argv[2], sys.argv[1]], drain_s=60)]))
"""


@dataclasses.dataclass
class Run:
    """A supervisor at work in a thread."""

    stop: Stop
    thread: threading.Thread
    status: list[int]
    ready: list[int]

    def end(self) -> int:
        self.stop.ask(at_once=True)
        return self.join()

    def join(self) -> int:
        self.thread.join(30)
        return self.status[0]


def child(script: str, report: Path, name: str = "child", **fields: Any) -> Child:
    return Child(name, [sys.executable, "-c", script, str(report)], ENV, **fields)


@contextlib.contextmanager
def supervising(*children: Child, **settings: Any) -> Iterator[Run]:
    """A supervisor that ends, with its children, at the end of the block; `settings` are its own."""
    stop, status, ready = Stop(), [], []
    settings = {"first_backoff_s": 0.01} | settings
    supervisor = Supervisor(children, on_ready=lambda: ready.append(1), **settings)
    thread = threading.Thread(target=lambda: status.append(supervisor.run(stop)))
    thread.start()
    try:
        yield Run(stop, thread, status, ready)
    finally:
        stop.ask(at_once=True)
        thread.join(30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pids(report: Path) -> list[int]:
    """Ids of the processes that were started so far."""
    return [int(line) for line in report.read_text().splitlines()] if report.exists() else []


def exists(pid: int) -> bool:
    """Whether the process still is one; a zombie counts as gone only once it is reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def runs(pid: int) -> bool:
    """Like `exists`, for orphans, which whoever inherits them may leave as zombies."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
