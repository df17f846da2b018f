"""Keeps child processes alive while their parent lives, and never longer. Linux only."""

import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Sequence

from servicekit.child_process import Child, ChildProcess
from servicekit.lifeline import BEAT_S, Heartbeat, bind_to_parent
from servicekit.logs import log_to_stderr

EXIT_GAVE_UP = 2  # status of a process that another start cannot help: bad flags, a bad model, a supervisor at its end

_TICK_S = 0.05

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Stop:
    """How a supervisor is told to end, from any thread and any signal handler, since flags take no lock."""

    asked: bool = False
    at_once: bool = False

    def ask(self, *, at_once: bool) -> None:
        """End, once those children have drained that can, or at once; which no later call takes back."""
        self.asked, self.at_once = True, self.at_once or at_once


@dataclasses.dataclass
class _Group:
    """Processes that start and end together; most often a single one."""

    processes: list[ChildProcess]
    failed_starts: int = 0  # in a row
    early_ends: int = 0  # the same, and those that were ready for a short time only
    start_at: float = 0.0  # time.monotonic() seconds
    was_ready: bool = False  # all of them, at any start
    first_ended: ChildProcess | None = None  # the others of this start have been killed for it
    kill_at: float | None = None  # time.monotonic() seconds; None until it is asked to end for good

    @property
    def running(self) -> list[ChildProcess]:
        return [process for process in self.processes if process.is_running]

    @property
    def ready_at(self) -> float | None:
        """When the last of them was ready, in time.monotonic() seconds; None until then."""
        times = [process.ready_at for process in self.processes if process.ready_at is not None]
        return max(times) if len(times) == len(self.processes) else None

    @property
    def is_over(self) -> bool:
        return self.kill_at is not None and not self.running

    @property
    def stops_after(self) -> set[str]:
        return {name for process in self.processes for name in process.child.stops_after}


class Supervisor:
    """Starts children and restarts those that die or hang.

    A child that ends before it was ready, or less than `stable_s` after, is started again after 0.1 s, twice as long
    each time, 5 s at most; one that was ready for longer at once. After `max_failed_starts` in a row of which it was
    never ready the supervisor gives up: one that was ready may have died of what it was given, which passes. A child
    that exits with EXIT_GAVE_UP ends the supervisor too. `on_ready` is called once, when every child has been ready,
    and `beat` at every turn from then on.

    A child that is stopped, or gave signs of life and gives none, for `hang_timeout_s` is killed, and so has died.

    Children that are kept `together` live and die as one: when any of them ends, the others are killed, at once since
    they may wait for it forever, and all are started again. What is said of a child above then holds for all as one.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        together: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
        max_failed_starts: int = 5,
        stable_s: float = 2.0,
        first_backoff_s: float = 0.1,
        max_backoff_s: float = 5.0,
        hang_timeout_s: float = 10.0,
        grace_s: float = 10.0,
    ) -> None:
        processes = [ChildProcess(child) for child in children]
        self._groups = [_Group(processes)] if together else [_Group([process]) for process in processes]
        names = {child.name for child in children}
        assert all(group.stops_after <= names for group in self._groups), "a child stops after one that is not there"
        self._on_ready = on_ready
        self._beat = beat
        self._max_failed_starts = max_failed_starts
        self._stable_s = stable_s
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._hang_timeout_s = hang_timeout_s
        self._grace_s = grace_s  # from when a child should have ended to SIGKILL
        self._is_ready = False
        self._turn_at = time.monotonic()

    def run(self, stop: Stop) -> int:
        """Keep the children alive until told to `stop`; returns 0 then and EXIT_GAVE_UP when a child is hopeless.

        Children are asked to end by SIGTERM, each after those that it `stops_after`, and the others are kept alive
        meanwhile. At once means all together, and SIGINT for those that would drain. None of them is left when it
        returns or raises. The children die with the thread that calls this, since the kernel's parent-death signal
        follows the thread that spawned them.
        """
        try:
            while not stop.at_once:
                turn_s = self._next_turn()
                if not all(self._tend(group, turn_s) for group in self._groups):
                    return EXIT_GAVE_UP
                if stop.asked:
                    self._stop_next()
                    if all(group.is_over for group in self._groups):
                        break
                time.sleep(_TICK_S)
            return 0
        finally:
            self._stop_all()

    def _next_turn(self) -> float:
        """Begin a turn; returns the seconds since the last, at most BEAT_S.

        No more, since whatever held up this process, as a stop does, may have held up its children as long.
        """
        if self._is_ready:
            self._beat()
        last, self._turn_at = self._turn_at, time.monotonic()
        return min(self._turn_at - last, BEAT_S)

    def _tend(self, group: _Group, turn_s: float) -> bool:
        """Do what there is to do for a group; False where there is no hope for it."""
        if not group.running and group.kill_at is None and group.start_at <= time.monotonic():
            for process in group.processes:
                process.start()
        # Asked before they are listened to, so that no last word is missed.
        ended = [process for process in group.processes if process.has_exited()]
        for process in group.running:
            process.listen(turn_s)
            self._kill_if_hung(process)
        self._note_ready(group)
        if group.kill_at is not None:
            for process in ended:
                process.reap()
        elif ended:
            return self._end(group, ended)
        return True

    def _kill_if_hung(self, process: ChildProcess) -> None:
        if process.silent_s <= self._hang_timeout_s:
            return
        log.error("%s is stopped or hangs, silent for %.1f s: killing it", process.child.name, process.silent_s)
        process.silent_s = 0.0
        process.signal(signal.SIGKILL)

    def _note_ready(self, group: _Group) -> None:
        if group.was_ready or group.ready_at is None:
            return
        group.was_ready = True
        if all(group.was_ready for group in self._groups):
            self._is_ready = True
            self._on_ready()

    def _end(self, group: _Group, ended: Sequence[ChildProcess]) -> bool:
        """Kill what is left of a group and, once all has ended, plan its next start; False where there is none."""
        if group.first_ended is None:
            group.first_ended = ended[0]
            for process in group.processes:
                process.signal(signal.SIGKILL)
        if not all(process.has_exited() for process in group.processes):  # a device's driver may take its time
            return True
        statuses = {process: process.reap() for process in group.processes}
        gave_up = [process for process, status in statuses.items() if status == EXIT_GAVE_UP]
        to_blame, group.first_ended = gave_up[0] if gave_up else group.first_ended, None
        return self._plan_restart(group, to_blame.child.name, statuses[to_blame])

    def _plan_restart(self, group: _Group, name: str, status: int) -> bool:
        """Set the time of the next start, now that the child `name` has ended; False where there shall be none."""
        how, ready_at = _describe(status), group.ready_at
        if status == EXIT_GAVE_UP:
            log.error("%s cannot go on (%s): giving up", name, how)
            return False
        them = "it" if len(group.processes) == 1 else f"all {len(group.processes)}"
        group.failed_starts = group.failed_starts + 1 if ready_at is None else 0
        if ready_at is not None and time.monotonic() - ready_at >= self._stable_s:
            log.warning("%s ended (%s): restarting %s", name, how, them)
            group.early_ends, group.start_at = 0, 0.0
            return True
        if group.failed_starts >= self._max_failed_starts:
            log.error("%s ended before it was ready (%s), %d times in a row: giving up", name, how, group.failed_starts)
            return False
        when = "before it was ready" if ready_at is None else "as soon as it was ready"
        delay_s = min(self._first_backoff_s * 2**group.early_ends, self._max_backoff_s)
        log.warning("%s ended %s (%s): starting %s again in %.1f s", name, when, how, them, delay_s)
        group.early_ends += 1
        group.start_at = time.monotonic() + delay_s
        return True

    def _stop_next(self) -> None:
        """Ask those to end that nobody needs any more, and kill those that took too long."""
        over = {process.child.name for group in self._groups if group.is_over for process in group.processes}
        for group in self._groups:
            if group.kill_at is None and group.stops_after <= over:
                drain_s = max(process.child.drain_s or 0.0 for process in group.processes)
                group.kill_at = time.monotonic() + drain_s + self._grace_s
                for process in group.running:
                    process.signal(signal.SIGTERM)
            elif group.kill_at is not None and group.kill_at < time.monotonic():
                self._kill(group)

    def _stop_all(self) -> None:
        """End at once what is left."""
        for group in self._groups:
            for process in group.running:
                if process.child.drain_s is not None:
                    process.signal(signal.SIGINT)
                elif group.kill_at is None:  # otherwise it was asked before
                    process.signal(signal.SIGTERM)
            group.kill_at = time.monotonic() + self._grace_s
        while left := [group for group in self._groups if not group.is_over]:
            turn_s = self._next_turn()
            for group in left:
                self._tend(group, turn_s)
                if group.kill_at is not None and group.kill_at < time.monotonic():
                    self._kill(group)
            time.sleep(0.01)

    def _kill(self, group: _Group) -> None:
        group.kill_at = float("inf")
        for process in group.running:  # one that is stuck
            log.warning("%s did not end within %.0f s: killing it", process.child.name, self._grace_s)
            process.signal(signal.SIGKILL)


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def supervise(service: str, children: Sequence[Child], *, together: bool = False, hang_timeout_s: float = 10.0) -> int:
    """What a service's __main__ does once it knows its children; returns the exit status."""
    bind_to_parent()
    log_to_stderr(service)
    supervisor = Supervisor(
        children,
        together=together,
        beat=Heartbeat().beat,
        hang_timeout_s=hang_timeout_s,
        grace_s=8.0,  # shorter than the default, so that an outer supervisor need not kill this one at its work
    )
    return supervisor.run(stop_on_signals())


def stop_on_signals() -> Stop:
    """What SIGTERM asks to end, and SIGINT or a second signal at once."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.ask(at_once=number == signal.SIGINT or stop.asked))
    return stop
