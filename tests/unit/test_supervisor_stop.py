"""How a supervisor ends its children: one after the other and drained, or all at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servicekit.child_process import Child
from servicekit.supervisor import EXIT_GAVE_UP, Stop, Supervisor
from tests.unit.supervisor_harness import (
    BEATS,
    DEAF,
    ENV,
    READY,
    REPORT,
    SERVICE,
    STILLBORN,
    child,
    exists,
    pids,
    runs,
    supervising,
    until,
)

# Ends on SIGTERM once the file REPORT.go is there and on SIGINT at once, and writes what it does to a log beside it.
DRAINS = (
    REPORT
    + """
import signal
from pathlib import Path
report = Path(sys.argv[1])
log = os.open(report.with_name("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def tell(what):
    os.write(log, f"{report.name} {what}\\n".encode())
def drain(*_):
    tell("drains")
    while not report.with_name(report.name + ".go").exists():
        time.sleep(0.01)
    tell("drained")
    os._exit(0)
def interrupted(*_):
    tell("interrupted")
    os._exit(0)
signal.signal(signal.SIGINT, interrupted)
signal.signal(signal.SIGTERM, drain)
notify_ready()
time.sleep(600)
"""
)
# Ends on SIGTERM, which it writes to the log.
NEEDED = (
    REPORT
    + """
import signal
from pathlib import Path
report = Path(sys.argv[1])
def ended(*_):
    fd = os.open(report.with_name("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{report.name} ended\\n".encode())
    os._exit(0)
signal.signal(signal.SIGTERM, ended)
notify_ready()
time.sleep(600)
"""
)


class Scene:
    """A core that two front ends need, of which each drains until it is let go."""

    def __init__(self, directory: Path) -> None:
        self.core, self.frontends = directory / "core", [directory / name for name in ("f1", "f2")]
        self._log = directory / "log"

    def children(self, *, drain_s: float = 600.0, core: str = NEEDED) -> list[Child]:
        names = [report.name for report in self.frontends]
        frontends = [child(DRAINS, report, report.name, drain_s=drain_s) for report in self.frontends]
        return [child(core, self.core, "core", stops_after=names), *frontends]

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    @property
    def reports(self) -> list[Path]:
        return [self.core, *self.frontends]

    def let_go(self, report: Path) -> None:
        report.with_name(report.name + ".go").touch()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_children_end_after_those_that_need_them_have_drained(scene: Scene) -> None:
    with supervising(*scene.children()) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=False)
        until(lambda: len(scene.log) == 2)
        assert sorted(scene.log) == ["f1 drains", "f2 drains"]
        scene.let_go(scene.frontends[0])
        until(lambda: not exists(pids(scene.frontends[0])[0]))
        time.sleep(0.2)
        assert scene.log[2:] == ["f1 drained"]
        assert exists(pids(scene.core)[0])
        scene.let_go(scene.frontends[1])
        assert run.join() == 0
        assert scene.log[3:] == ["f2 drained", "core ended"]
    assert [len(pids(report)) for report in scene.reports] == [1, 1, 1]


def test_a_child_that_is_needed_by_one_that_drains_is_kept_alive_and_the_drained_one_is_not(scene: Scene) -> None:
    with supervising(*scene.children(), stable_s=0.0) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=False)
        until(lambda: len(scene.log) == 2)
        os.kill(pids(scene.frontends[0])[0], signal.SIGKILL)
        os.kill(pids(scene.core)[0], signal.SIGKILL)
        until(lambda: len(pids(scene.core)) == 2)
        scene.let_go(scene.frontends[1])
        assert run.join() == 0
    assert [len(pids(report)) for report in scene.reports] == [2, 1, 1]
    assert not any(exists(pid) for report in scene.reports for pid in pids(report))


def test_a_child_that_drains_for_too_long_is_killed_and_then_those_that_it_needs_end(scene: Scene) -> None:
    with supervising(*scene.children(drain_s=0.2), grace_s=0.3) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=False)
        assert run.join() == 0
    assert sorted(scene.log[:2]) == ["f1 drains", "f2 drains"]
    assert scene.log[2:] == ["core ended"]


def test_a_child_that_hangs_while_it_drains_is_killed(report: Path) -> None:
    with supervising(child(BEATS, report, drain_s=600), hang_timeout_s=1.5) as run:
        until(lambda: bool(run.ready))
        os.kill(pids(report)[0], signal.SIGSTOP)
        run.stop.ask(at_once=False)
        assert run.join() == 0


def test_at_once_interrupts_those_that_drain_and_ends_all_together(scene: Scene) -> None:
    with supervising(*scene.children(core=DEAF), grace_s=1.0) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=True)
        assert run.join() == 0
    assert sorted(scene.log) == ["f1 interrupted", "f2 interrupted"]
    assert not any(exists(pid) for report in scene.reports for pid in pids(report))


def test_a_drain_that_takes_too_long_can_be_cut_short(scene: Scene) -> None:
    with supervising(*scene.children()) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=False)
        until(lambda: len(scene.log) == 2)
        run.stop.ask(at_once=True)
        assert run.join() == 0
    assert sorted(scene.log[2:]) == ["core ended", "f1 interrupted", "f2 interrupted"]


def test_at_once_is_not_taken_back() -> None:
    stop = Stop()
    stop.ask(at_once=True)
    stop.ask(at_once=False)
    assert stop.asked
    assert stop.at_once


def test_a_supervisor_that_gives_up_while_it_drains_leaves_nothing_running(scene: Scene, tmp_path: Path) -> None:
    gives_up = REPORT + (
        f"import signal; signal.signal(signal.SIGUSR1, lambda *_: sys.exit({EXIT_GAVE_UP}))\n"
        "notify_ready(); time.sleep(600)"
    )
    hopeless = child(gives_up, tmp_path / "x", "x", stops_after=["f1"])
    with supervising(*scene.children(), hopeless) as run:
        until(lambda: bool(run.ready))
        run.stop.ask(at_once=False)
        until(lambda: len(scene.log) == 2)
        os.kill(pids(tmp_path / "x")[0], signal.SIGUSR1)
        assert run.join() == EXIT_GAVE_UP
    assert not any(exists(pid) for report in scene.reports for pid in pids(report))


def test_a_child_that_waits_for_its_next_start_does_not_hold_up_the_end(report: Path) -> None:
    with supervising(child(STILLBORN, report, drain_s=600), max_backoff_s=600.0) as run:
        until(lambda: len(pids(report)) == 1)
        run.stop.ask(at_once=False)
        assert run.join() == 0


def test_a_sister_that_is_not_there_cannot_be_waited_for(report: Path) -> None:
    with pytest.raises(AssertionError, match="not there"):
        Supervisor([child(READY, report, stops_after=["nobody"])])


# --- a service ------------------------------------------------------------------------------------------------------


def start_service(report: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", SERVICE, str(report), DRAINS]
    service = subprocess.Popen(command, env={**os.environ, **ENV})
    until(lambda: bool(pids(report)))
    return service


def ready(report: Path) -> bool:
    """Whether the child catches SIGTERM, and so SIGINT too."""
    (line,) = [line for line in Path(f"/proc/{pids(report)[0]}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(line.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


@pytest.mark.parametrize(
    ("numbers", "last"),
    [
        ([signal.SIGINT], "interrupted"),
        ([signal.SIGTERM, signal.SIGTERM], "interrupted"),
        ([signal.SIGTERM, signal.SIGINT], "interrupted"),
        ([signal.SIGTERM], "drained"),
    ],
)
def test_a_service_drains_on_sigterm_and_ends_at_once_on_sigint_or_a_second_signal(
    scene: Scene, numbers: list[signal.Signals], last: str
) -> None:
    report = scene.frontends[0]
    service = start_service(report)
    until(lambda: ready(report))
    service.send_signal(numbers[0])
    if numbers[0] == signal.SIGTERM:
        until(lambda: scene.log == ["f1 drains"])
        if len(numbers) == 1:
            scene.let_go(report)
        else:
            service.send_signal(numbers[1])
    assert service.wait(30) == 0
    assert scene.log[-1] == f"f1 {last}"
    assert not exists(pids(report)[0])


def test_children_that_drain_do_not_outlive_a_service_that_is_killed(scene: Scene) -> None:
    report = scene.frontends[0]
    service = start_service(report)
    until(lambda: ready(report))
    service.send_signal(signal.SIGTERM)
    until(lambda: scene.log == ["f1 drains"])
    service.kill()
    service.wait()
    until(lambda: not runs(pids(report)[0]))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "pids"
