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


@dataclasses.dataclass
class _Group:
    """Processes that start and end together; most often a single one."""

    processes: list[_Process]
    failed_starts: int = 0  # in a row
    start_at: float = 0.0  # time.monotonic() seconds
    was_ready: bool = False  # all of them, at any start

    @property
    def is_running(self) -> bool:
        return any(process.popen for process in self.processes)

    @property
    def ready_at(self) -> float | None:
        """When the last of them was ready, in time.monotonic() seconds; None until then."""
        times = [process.ready_at for process in self.processes if process.ready_at is not None]
        return max(times) if len(times) == len(self.processes) else None


class Supervisor:
    """Starts children and restarts those that die.

    A start whose child ends before it was ready, or less than `stable_s` after, is a failed one: the next waits
    0.1 s, twice as long each time, 5 s at most, and after `max_failed_starts` in a row the supervisor gives up. A child
    that was ready for longer is restarted at once and ends the row. A child that exits with EXIT_GAVE_UP ends the
    supervisor too. `on_ready` is called once, when every child has been ready.

    Children that are kept `together` live and die as one: when any of them ends, the others are killed, at once since
    they may wait for it forever, and all are started again. What is said of a child above then holds for all as one.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        together: bool = False,
        on_ready: Callable[[], None] | None = None,
        max_failed_starts: int = 5,
        stable_s: float = 2.0,
        first_backoff_s: float = 0.1,
        max_backoff_s: float = 5.0,
        grace_s: float = 10.0,
    ) -> None:
        self._processes = [_Process(child) for child in children]
        self._groups = [_Group(self._processes)] if together else [_Group([process]) for process in self._processes]
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
                for group in self._groups:
                    if not group.is_running and group.start_at <= time.monotonic():
                        for process in group.processes:
                            _start(process)
                    # Asked before they are listened to, so that no last word is missed.
                    ended = [process for process in group.processes if _has_exited(process)]
                    self._listen(group)
                    if ended and not self._plan_restart(group, *_end(group, ended)):
                        return EXIT_GAVE_UP
                time.sleep(_TICK_S)
            return 0
        finally:
            self._stop_all()

    def _listen(self, group: _Group) -> None:
        """Hear whether the group is ready."""
        for process in group.processes:
            _listen(process)
        if group.was_ready or group.ready_at is None:
            return
        group.was_ready = True
        if self._on_ready and all(group.was_ready for group in self._groups):
            self._on_ready()

    def _plan_restart(self, group: _Group, name: str, status: int) -> bool:
        """Set the time of the next start, now that the child `name` has ended; False where there shall be none."""
        how, ready_at = _describe(status), group.ready_at
        if status == EXIT_GAVE_UP:
            log.error("%s cannot go on (%s): giving up", name, how)
            return False
        them = "it" if len(group.processes) == 1 else f"all {len(group.processes)}"
        if ready_at is not None and time.monotonic() - ready_at >= self._stable_s:
            log.warning("%s ended (%s): restarting %s", name, how, them)
            group.failed_starts, group.start_at = 0, 0.0
            return True
        when = "before it was ready" if ready_at is None else "as soon as it was ready"
        group.failed_starts += 1
        if group.failed_starts >= self._max_failed_starts:
            log.error("%s ended %s (%s), failed start %d in a row: giving up", name, when, how, group.failed_starts)
            return False
        delay_s = min(self._first_backoff_s * 2 ** (group.failed_starts - 1), self._max_backoff_s)
        log.warning("%s ended %s (%s): starting %s again in %.1f s", name, when, how, them, delay_s)
        group.start_at = time.monotonic() + delay_s
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


def _start(process: _Process) -> None:
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


def _listen(process: _Process) -> None:
    """Hear whether the child is ready."""
    if process.ready_fd is None:
        return
    try:
        heard = os.read(process.ready_fd, 1)
    except BlockingIOError:
        return
    os.close(process.ready_fd)
    process.ready_fd = None
    if heard:  # not closed without a word
        process.ready_at = time.monotonic()


def _end(group: _Group, ended: Sequence[_Process]) -> tuple[str, int]:
    """Kill what is left of a group in which some have ended; returns the name and the status of the one to blame."""
    for process in group.processes:
        _signal(process, signal.SIGKILL)
    statuses = {process.child.name: _reap(process) for process in group.processes}
    gave_up = [name for name, status in statuses.items() if status == EXIT_GAVE_UP]
    name = gave_up[0] if gave_up else ended[0].child.name
    return name, statuses[name]


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


def supervise(service: str, children: Sequence[Child], *, together: bool = False) -> int:
    """What a service's __main__ does once it knows its children; returns the exit status."""
    bind_to_parent()
    log_to_stderr(service)
    # Shorter than the default grace, so that an outer supervisor need not kill this one at its work.
    supervisor = Supervisor(children, together=together, on_ready=notify_ready, grace_s=8.0)
    return supervisor.run(stop_on_signals())


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
