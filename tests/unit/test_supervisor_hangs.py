"""The supervisor and children that are stopped or hang."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from servicekit.child_process import Child, ChildProcess
from servicekit.lifeline import READY_FD, Heartbeat
from tests.unit.supervisor_harness import (
    BEATING,
    BEATS,
    ENV,
    NEVER_READY,
    PARENT,
    READY,
    REPORT,
    SERVICE,
    child,
    exists,
    pids,
    runs,
    supervising,
    until,
)

HANG_TIMEOUT_S = 1.5
LATER_S = 3.5  # far enough beyond it for anything that is going to happen


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "pids"


@pytest.mark.parametrize("script", [NEVER_READY, READY, BEATS], ids=["before it is ready", "ready", "beating"])
def test_a_child_that_is_stopped_is_killed_and_started_again(report: Path, script: str) -> None:
    with supervising(child(script, report), hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: len(pids(report)) == 1 and (script is NEVER_READY or bool(run.ready)))
        os.kill(pids(report)[0], signal.SIGSTOP)
        until(lambda: len(pids(report)) == 2)
        assert not exists(pids(report)[0])
        assert run.end() == 0


def test_a_child_that_is_stopped_before_its_first_line_is_killed_and_started_again(report: Path) -> None:
    stopped_at_first = (
        "import os, signal, sys\n"
        "if not os.path.exists(sys.argv[1] + '.once'):\n"
        "    open(sys.argv[1] + '.once', 'w')\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    with supervising(child(stopped_at_first + READY, report), hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: bool(run.ready))
        assert run.end() == 0


def test_a_child_whose_event_loop_hangs_is_killed_and_started_again(report: Path) -> None:
    hangs_at_first = BEATING.format("if len(open(sys.argv[1]).readlines()) == 1: time.sleep(600)")
    with supervising(child(REPORT + hangs_at_first, report), hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: len(pids(report)) == 2)
        assert not exists(pids(report)[0])
        assert run.end() == 0


@pytest.mark.parametrize("script", [NEVER_READY, READY, BEATS], ids=["before it is ready", "ready", "beating"])
def test_a_child_that_owes_no_sign_of_life_or_gives_them_is_left_alone(report: Path, script: str) -> None:
    with supervising(child(script, report), hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: len(pids(report)) == 1 and (script is NEVER_READY or bool(run.ready)))
        time.sleep(LATER_S)
        assert len(pids(report)) == 1
        assert run.end() == 0


def test_children_that_are_kept_together_are_all_started_again_when_one_is_stopped(tmp_path: Path) -> None:
    reports = [tmp_path / name for name in "ab"]
    children = [child(script, report, report.name) for script, report in zip((BEATS, READY), reports, strict=True)]
    with supervising(*children, together=True, hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: bool(run.ready))
        os.kill(pids(reports[1])[0], signal.SIGSTOP)
        until(lambda: all(len(pids(report)) == 2 for report in reports))
        assert not any(exists(pids(report)[0]) for report in reports)
        assert run.end() == 0


def test_a_service_that_is_stopped_is_killed_with_its_children_and_started_again(report: Path) -> None:
    service = Child("service", [sys.executable, "-c", SERVICE, str(report), BEATS], ENV)
    with supervising(service, hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: bool(run.ready))
        (first,) = pids(report)
        os.kill(parent_of(first), signal.SIGSTOP)
        until(lambda: len(pids(report)) == 2)
        until(lambda: not runs(first))
        assert run.end() == 0


def test_a_service_gives_signs_of_life_while_its_children_drain(report: Path) -> None:
    drains = REPORT + BEATING.format(
        "asyncio.get_running_loop().add_signal_handler(15, lambda: asyncio.get_running_loop().call_later("
        f"{LATER_S}, lambda: (open(sys.argv[1] + '.drained', 'w'), os._exit(0))))"
    )
    service = Child("service", [sys.executable, "-c", SERVICE, str(report), drains], ENV)
    with supervising(service, hang_timeout_s=HANG_TIMEOUT_S) as run:
        until(lambda: bool(run.ready))
        os.kill(parent_of(pids(report)[0]), signal.SIGTERM)
        until(lambda: len(pids(report)) == 2)  # it ended, and so was started again
        assert report.with_name("pids.drained").exists()
        assert run.end() == 0


def test_a_supervisor_that_was_stopped_itself_takes_no_child_for_hung(report: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(report), BEATS]
    with subprocess.Popen(command, env={**os.environ, **ENV}) as parent, contextlib.ExitStack() as stack:
        stack.callback(parent.kill)
        until(lambda: bool(pids(report)))
        time.sleep(0.5)  # it beats
        for pid in (parent.pid, pids(report)[0]):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # PARENT's limit is 2 s
        parent.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        os.kill(pids(report)[0], signal.SIGCONT)
        time.sleep(1.0)
        assert len(pids(report)) == 1


# --- how silence is counted ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(script: str, report: Path) -> Iterator[ChildProcess]:
    process = ChildProcess(child(script, report))
    process.start()
    try:
        until(lambda: len(pids(report)) == 1)
        yield process
    finally:
        process.signal(signal.SIGKILL)
        process.reap()


def silence_of(process: ChildProcess, *turns_s: float) -> float:
    for turn_s in turns_s:
        process.listen(turn_s)
    return process.silent_s


def test_silence_counts_from_the_stop_and_ends_with_it(report: Path) -> None:
    with started(NEVER_READY, report) as process:
        assert silence_of(process, 5.0, 5.0) == 0.0
        process.signal(signal.SIGSTOP)
        until(lambda: silence_of(process, 0.5) == 0.5)
        assert silence_of(process, 1.0, 1.0) == 2.5
        process.signal(signal.SIGCONT)
        until(lambda: silence_of(process, 0.5) == 0.0)


def test_silence_counts_from_the_last_sign_of_life(report: Path) -> None:
    beats_at_will = REPORT + (
        "from servicekit.lifeline import Heartbeat\n"
        "heartbeat = Heartbeat()\n"
        "for number in range(100):\n"
        "    while not os.path.exists(f'{sys.argv[1]}.{number}'): time.sleep(0.01)\n"
        "    heartbeat.beat()\n"
    )
    with started(beats_at_will, report) as process:
        assert silence_of(process, 5.0, 5.0) == 0.0  # it has promised nothing
        for number in range(3):
            report.with_name(f"pids.{number}").touch()
            until(lambda: silence_of(process, 1e-9) == 0.0 and process.ready_at is not None)
            assert silence_of(process, 2.0, 3.0) == 5.0


def test_signs_of_life_that_nobody_reads_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    monkeypatch.setenv(READY_FD, str(write_fd))
    heartbeat = Heartbeat()
    for _ in range(70_000):  # more than a pipe holds
        heartbeat.beat()
    os.close(read_fd)
    heartbeat.beat()
    heartbeat.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
