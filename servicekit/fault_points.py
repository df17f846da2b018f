"""Named places at which a test can make a process die, stop, wait or fail; where none is armed, a place is one check.

`arm` names a directory. From then on `reach("core.plan_sent")` looks for a file of that name there, which says what
happens, in one line:

    kill | stop | delay SECONDS | fail   [key K]   [after N]   [always]

kill and stop are SIGKILL and SIGSTOP, delay sleeps in the calling thread, and fail raises FaultInjected. With `key K`
only a call with that key counts, with `after N` the first N - 1 that count pass, whichever process they were made in
(the file core.plan_sent.count beside it keeps the number). The file is removed before anything happens, so that the
process that takes the dead one's place passes; with `always` it stays.

Write a file under another name and rename it, or it may be read half written; `tests/faults/arming.py` does.
"""

import dataclasses
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Literal

VARIABLE = "DUET_FAULT_POINTS"  # the environment variable by which a process's main is told the directory

POINTS = {
    "executor.starting": "a rank, before it builds its model",
    "executor.listening": "the server listens, the supervisor has not been told that it is ready",
    "executor.opening": "a session is opened, the KV cache is not wiped yet",
    "executor.plan_received": "a plan was read from the session, and is not queued yet",
    "executor.step_begun": "the device is about to launch a plan",
    "executor.step_done": "the device has a plan's result, the session does not",
    "executor.result_written": "a result was written to the session",
    "executor.sequence": "a plan brings a new sequence; the key is its sampling seed",
    "follower.plan_received": "a rank above 0 was given a plan by rank 0",
    "core.starting": "the core, before it opens its socket",
    "core.listening": "the core's socket listens, the supervisor has not been told that it is ready",
    "core.epoch_begun": "an executor took a new session, nothing was planned in it yet",
    "core.plan_sent": "a plan was written to the executor",
    "core.result_read": "a result was read from the executor, and changed nothing yet",
    "core.result_applied": "a result was applied, the front ends have not been told",
    "core.submit_read": "a new request was read from a front end, and is not waiting yet",
    "core.resubmit_read": "a request was read that a front end had submitted to a core that died",
    "frontend.starting": "a front end, before it loads the tokenizer",
    "frontend.listening": "the port listens, the supervisor has not been told that it is ready",
    "frontend.request_read": "a request was read from a client, and is not submitted yet",
    "frontend.submitted": "a request was written to the core",
    "frontend.tokens_read": "tokens were read from the core, and are not written to the client yet",
    "frontend.delta_written": "a delta was written to a client",
    "frontend.finished": "a stream has ended, and the client has not been told",
}

log = logging.getLogger(__name__)

_directory: Path | None = None  # set once, by main: what arms a process is its environment, and belongs to no object


class FaultInjected(Exception):
    """What an armed `fail` raises; nothing but a test's file makes it."""


@dataclasses.dataclass(frozen=True)
class _Fault:
    """What a file says."""

    action: Literal["kill", "stop", "delay", "fail"]
    delay_s: float = 0.0
    key: int | None = None  # None: any
    after: int = 1
    always: bool = False


def arm(directory: str | None) -> None:
    """Look into `directory` whenever a point is reached; None, which is where a process begins: never."""
    global _directory
    _directory = Path(directory) if directory else None
    if _directory:
        log.warning("fault points are armed by %s", _directory)


def reach(name: str, key: int | None = None) -> None:
    """Do what the file `name` says, if there is one. Raises: FaultInjected, where it says fail."""
    if _directory is not None:
        _reach(_directory / name, key)


def _reach(file: Path, key: int | None) -> None:
    assert file.name in POINTS, file.name
    try:
        text = file.read_text()
    except FileNotFoundError:
        return
    if not text:  # being written
        return
    fault = _parse(text)
    if fault.key in (None, key) and _count(file) >= fault.after and (fault.always or _disarm(file)):
        _act(file.name, fault)


def _parse(text: str) -> _Fault:
    words = iter(text.split())
    action = next(words, "")
    if action not in ("kill", "stop", "delay", "fail"):
        raise ValueError(f"no fault: {text!r}")
    fault = _Fault(action, delay_s=float(next(words)) if action == "delay" else 0.0)
    for word in words:
        if word == "always":
            fault = dataclasses.replace(fault, always=True)
        elif word == "after":
            fault = dataclasses.replace(fault, after=int(next(words)))
        elif word == "key":
            fault = dataclasses.replace(fault, key=int(next(words)))
        else:
            raise ValueError(f"no fault: {text!r}")
    return fault


def _count(file: Path) -> int:
    """How often the point was reached, this time included: the length of a file, which no two writers see alike."""
    fd = os.open(_count_file(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, b".")
        return os.lseek(fd, 0, os.SEEK_CUR)
    finally:
        os.close(fd)


def _disarm(file: Path) -> bool:
    """Remove the file; False where another process or thread was first."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    _count_file(file).unlink(missing_ok=True)
    return True


def _count_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.count")


def _act(name: str, fault: _Fault) -> None:
    log.warning("fault point %s: %s", name, fault.action)
    match fault.action:
        case "kill":
            _signal_here(signal.SIGKILL)
        case "stop":
            _signal_here(signal.SIGSTOP)
        case "delay":
            time.sleep(fault.delay_s)
        case "fail":
            raise FaultInjected(name)


def _signal_here(number: signal.Signals) -> None:
    """Signal this process through this thread, so that it does nothing more: another could be picked otherwise."""
    signal.pthread_kill(threading.get_ident(), number)
