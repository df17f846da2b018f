"""Keeps child processes alive while their parent lives, and never longer. Linux only.

A supervisor and its child meet in two environment variables, read here and nowhere else: DUET_READY_FD is a pipe on
which the child says that it is ready, DUET_PARENT_PID is the process that the child must not outlive. A process that
was started without them, by hand or in a debugger, is neither bound nor heard.
"""

import ctypes
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from servicekit.logs import log_to_stderr

EXIT_GAVE_UP = 2  # status of a process that another start cannot help: bad flags, a bad model, a supervisor at its end

_READY_FD = "DUET_READY_FD"
_PARENT_PID = "DUET_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_TICK_S = 0.05

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Child:
    """A process to keep alive."""

    name: str  # unique among its sisters
    argv: Sequence[str]
    env: Mapping[str, str] | None = None  # added to the supervisor's own environment
    output: int | None = None  # file descriptor for stdout and stderr; None: the supervisor's own


@dataclasses.dataclass
class _Process:
    child: Child
    popen: subprocess.Popen[bytes] | None = None  # None while it waits for its next start
    ready_fd: int | None = None  # read end of the pipe; None once it was heard or closed
    ready_at: float | None = None  # time.monotonic() seconds; None until then
    failed_starts: int = 0  # in a row
    start_at: float = 0.0  # time.monotonic() seconds


class Supervisor:
    """Starts children and restarts those that die.

    A start whose child ends before it was ready, or less than `stable_s` after, is a failed one: the next waits
    0.1 s, twice as long each time, 5 s at most, and after `max_failed_starts` in a row the supervisor gives up. A child
    that was ready for longer is restarted at once and ends the row. A child that exits with EXIT_GAVE_UP ends the
    supervisor too. `on_ready` is called once, when every child has been ready.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        on_ready: Callable[[], None] | None = None,
        max_failed_starts: int = 5,
        stable_s: float = 2.0,
        first_backoff_s: float = 0.1,
        max_backoff_s: float = 5.0,
        grace_s: float = 10.0,
    ) -> None:
        self._processes = [_Process(child) for child in children]
        self._unheard = {child.name for child in children}  # those that have not been ready yet
        self._on_ready = on_ready
        self._max_failed_starts = max_failed_starts
        self._stable_s = stable_s
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._grace_s = grace_s  # between SIGTERM and SIGKILL

    def run(self, stop: threading.Event) -> int:
        """Keep the children alive until `stop` is set; returns 0 then and EXIT_GAVE_UP when a child is hopeless.

        None of them is left when it returns or raises. The children die with the thread that calls this, since the
        kernel's parent-death signal follows the thread that spawned them.
        """
        try:
            while not stop.is_set():
                for process in self._processes:
                    if process.popen is None and process.start_at <= time.monotonic():
                        self._start(process)
                    has_exited = _has_exited(process)  # asked before it is listened to, so that no last word is missed
                    self._listen(process)
                    if has_exited and not self._plan_restart(process, _reap(process)):
                        return EXIT_GAVE_UP
                time.sleep(_TICK_S)
            return 0
        finally:
            self._stop_all()

    def _start(self, process: _Process) -> None:
        process.ready_at = None
        process.ready_fd, write_fd = os.pipe()
        os.set_blocking(process.ready_fd, False)
        links = {_READY_FD: str(write_fd), _PARENT_PID: str(os.getpid())}
        try:
            process.popen = subprocess.Popen(
                process.child.argv,
                env={**os.environ, **(process.child.env or {}), **links},
                stdin=subprocess.DEVNULL,
                stdout=process.child.output,
                stderr=process.child.output,
                pass_fds=(write_fd,),
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor only
            )
        finally:
            os.close(write_fd)

    def _listen(self, process: _Process) -> None:
        """Hear whether the child is ready."""
        if process.ready_fd is None:
            return
        try:
            heard = os.read(process.ready_fd, 1)
        except BlockingIOError:
            return
        os.close(process.ready_fd)
        process.ready_fd = None
        if not heard:  # closed without a word
            return
        process.ready_at = time.monotonic()
        if self._unheard:
            self._unheard.discard(process.child.name)
            if not self._unheard and self._on_ready:
                self._on_ready()

    def _plan_restart(self, process: _Process, status: int) -> bool:
        """Set the time of the next start; False where there shall be none."""
        name, how = process.child.name, _describe(status)
        if status == EXIT_GAVE_UP:
            log.error("%s cannot go on (%s): giving up", name, how)
            return False
        if process.ready_at is not None and time.monotonic() - process.ready_at >= self._stable_s:
            log.warning("%s ended (%s): restarting it", name, how)
            process.failed_starts, process.start_at = 0, 0.0
            return True
        when = "before it was ready" if process.ready_at is None else "as soon as it was ready"
        process.failed_starts += 1
        if process.failed_starts >= self._max_failed_starts:
            log.error("%s ended %s (%s), failed start %d in a row: giving up", name, when, how, process.failed_starts)
            return False
        delay_s = min(self._first_backoff_s * 2 ** (process.failed_starts - 1), self._max_backoff_s)
        log.warning("%s ended %s (%s): starting it again in %.1f s", name, when, how, delay_s)
        process.start_at = time.monotonic() + delay_s
        return True

    def _stop_all(self) -> None:
        running = [process for process in self._processes if process.popen]
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        while running and time.monotonic() < deadline:
            for process in [process for process in running if _has_exited(process)]:
                _reap(process)
                running.remove(process)
            time.sleep(0.01)
        for process in running:  # one that is stopped or stuck
            log.warning("%s did not end within %.0f s: killing it", process.child.name, self._grace_s)
            _signal(process, signal.SIGKILL)
            _reap(process)
        for process in self._processes:
            if process.ready_fd is not None:
                os.close(process.ready_fd)
                process.ready_fd = None


def _signal(process: _Process, number: signal.Signals) -> None:
    assert process.popen
    os.kill(process.popen.pid, number)  # Popen.send_signal would reap it first; not reaped, the id is still its own


def _has_exited(process: _Process) -> bool:
    """Whether the process ended; it stays a zombie, so that its id still names its process group."""
    if process.popen is None:
        return False
    return os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reap(process: _Process) -> int:
    """Wait for the end of a process that ended or was killed, with all of its group; returns its status."""
    assert process.popen
    os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOWAIT)
    os.killpg(process.popen.pid, signal.SIGKILL)
    status = process.popen.wait()
    process.popen = None
    if process.ready_fd is not None:
        os.close(process.ready_fd)
        process.ready_fd = None
    return status


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def supervise(service: str, children: Sequence[Child]) -> int:
    """What a service's __main__ does once it knows its children; returns the exit status."""
    bind_to_parent()
    log_to_stderr(service)
    # Shorter than the default grace, so that an outer supervisor need not kill this one at its work.
    return Supervisor(children, on_ready=notify_ready, grace_s=8.0).run(stop_on_signals())


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set. The main thread must only look at it: waiting could block the handler."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def bind_to_parent() -> None:
    """Make the kernel kill this process when its supervisor dies, however it dies; for a child's first line."""
    parent = os.environ.get(_PARENT_PID)
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before the signal was asked for
        sys.exit(f"supervisor {parent} is gone")


def notify_ready() -> None:
    """Tell the supervisor that this process is ready; nothing happens without one, or the second time."""
    fd = os.environ.pop(_READY_FD, None)
    if fd is None:
        return
    try:
        os.write(int(fd), b"1")
    finally:
        os.close(int(fd))
