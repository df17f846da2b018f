"""Fault points, in real processes that reach one again and again and tell how often they passed."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from servicekit.fault_points import POINTS, VARIABLE, FaultInjected, arm, reach
from tests.faults.arming import FaultPoints

ROOT = Path(__file__).parents[2]
NAME = "core.plan_sent"
# A line on stdin: reach the point, with the line as the key if it is one; answered by a line on stdout.
REACHER = f"""
import os, sys
from servicekit.fault_points import FaultInjected, VARIABLE, arm, reach
arm(os.environ.get(VARIABLE))
for line in sys.stdin:
    try:
        reach({NAME!r}, int(line) if line.strip() else None)
        print("passed", flush=True)
    except FaultInjected as error:
        print("failed at", error, flush=True)
"""


@dataclasses.dataclass
class Reacher:
    popen: "subprocess.Popen[str]"

    def reach(self, key: int | None = None) -> str:
        """What it says; nothing where it died."""
        self.ask(key)
        return self.answer()

    def ask(self, key: int | None = None) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(f"{'' if key is None else key}\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        assert self.popen.stdout
        return self.popen.stdout.readline().strip()


@pytest.fixture
def points(tmp_path: Path) -> FaultPoints:
    return FaultPoints(tmp_path)


@pytest.fixture
def start(points: FaultPoints) -> Iterator[Callable[[], Reacher]]:
    with contextlib.ExitStack() as stack:

        def started() -> Reacher:
            pipe = subprocess.PIPE
            environment = {**os.environ, **points.environment, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", REACHER]
            popen = stack.enter_context(
                subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True
                )
            )
            stack.callback(popen.kill)
            return Reacher(popen)

        yield started


@pytest.fixture
def armed(points: FaultPoints) -> Iterator[FaultPoints]:
    """This process looks into them too."""
    arm(str(points.directory))
    yield points
    arm(None)


def test_nothing_happens_where_nothing_is_armed(points: FaultPoints, start: Callable[[], Reacher]) -> None:
    assert VARIABLE not in os.environ
    points.arm(NAME, "fail")
    reach(NAME)  # this process was not armed
    assert points.is_armed(NAME)
    points.disarm(NAME)
    points.arm("core.starting", "kill")
    assert start().reach() == "passed"
    assert points.is_armed("core.starting")


def test_an_armed_point_kills_its_process_once_and_the_next_one_passes(
    points: FaultPoints, start: Callable[[], Reacher]
) -> None:
    victim, successor = start(), start()
    assert victim.reach() == "passed"
    points.arm(NAME, "kill")
    assert victim.reach() == ""
    assert victim.popen.wait() == -signal.SIGKILL
    assert list(points.directory.iterdir()) == []
    assert successor.reach() == "passed"


def test_a_process_is_stopped_at_the_point_and_nowhere_behind_it(
    points: FaultPoints, start: Callable[[], Reacher]
) -> None:
    victim = start()
    points.arm(NAME, "stop")
    victim.ask()
    os.waitid(os.P_PID, victim.popen.pid, os.WSTOPPED | os.WNOWAIT)
    assert not points.is_armed(NAME)
    assert victim.popen.stdout
    os.set_blocking(victim.popen.stdout.fileno(), False)
    assert victim.answer() == ""
    os.set_blocking(victim.popen.stdout.fileno(), True)
    victim.popen.send_signal(signal.SIGCONT)
    assert victim.answer() == "passed"


def test_a_point_can_fail_and_says_which_it_is(points: FaultPoints, start: Callable[[], Reacher]) -> None:
    points.arm(NAME, "fail")
    victim = start()
    assert victim.reach() == f"failed at {NAME}"
    assert victim.reach() == "passed"


def test_a_point_can_be_delayed(armed: FaultPoints) -> None:
    armed.arm(NAME, "delay 0.2")
    begin = time.monotonic()
    reach(NAME)
    assert time.monotonic() - begin >= 0.2


def test_the_nth_time_is_counted_across_processes(points: FaultPoints, start: Callable[[], Reacher]) -> None:
    points.arm(NAME, "fail after 4")
    first, second = start(), start()
    said = [reacher.reach() for reacher in (first, second, first, second, first)]
    assert said == ["passed", "passed", "passed", f"failed at {NAME}", "passed"]


def test_a_fault_that_is_armed_anew_counts_anew(armed: FaultPoints) -> None:
    for fault in ("fail after 3", "fail after 3"):  # the first is not met
        armed.arm(NAME, fault)
        reach(NAME)
        reach(NAME)
    with pytest.raises(FaultInjected):
        reach(NAME)
    armed.arm(NAME, "fail after 2")
    reach(NAME)


def test_a_fault_with_a_key_meets_that_key_only_and_always_means_every_process(
    points: FaultPoints, start: Callable[[], Reacher]
) -> None:
    points.arm(NAME, "kill always key 666")
    for _ in range(2):
        victim = start()
        assert [victim.reach(), victim.reach(665), victim.reach(666)] == ["passed", "passed", ""]
        assert victim.popen.wait() == -signal.SIGKILL
    assert points.is_armed(NAME)


def test_keys_that_do_not_match_are_not_counted(armed: FaultPoints) -> None:
    armed.arm(NAME, "fail key 7 after 2")
    for key in (1, 7, 1, None):
        reach(NAME, key)
    with pytest.raises(FaultInjected):
        reach(NAME, 7)


def test_from_the_nth_time_on_always(armed: FaultPoints) -> None:
    armed.arm(NAME, "fail after 2 always")
    reach(NAME)
    for _ in range(3):
        with pytest.raises(FaultInjected):
            reach(NAME)


@pytest.mark.parametrize("words", ["explode", "kill sometimes", "delay soon", "fail after x"])
def test_a_file_that_says_nothing_sensible_is_an_error(armed: FaultPoints, words: str) -> None:
    armed.arm(NAME, words)
    with pytest.raises(ValueError, match=r"no fault|could not convert|invalid literal"):
        reach(NAME)


def test_a_file_that_is_being_written_is_none_yet(armed: FaultPoints) -> None:
    (armed.directory / NAME).touch()
    reach(NAME)
    assert armed.is_armed(NAME)


def test_a_point_that_is_on_no_list_is_a_bug(armed: FaultPoints) -> None:
    with pytest.raises(AssertionError, match=r"core\.nowhere"):
        reach("core.nowhere")


def test_every_point_on_the_list_is_reached_somewhere_and_no_other() -> None:
    folders = ("scheduler_service", "executor_service")
    code = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert set(re.findall(r'\breach\("([\w.]+)"', code)) == set(POINTS)
