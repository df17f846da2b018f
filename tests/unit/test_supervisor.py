"""The supervisor, with real processes: tiny Python children that write their process id to a file."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servicekit import supervisor as supervisor_module
from servicekit.child_process import Child
from servicekit.supervisor import EXIT_GAVE_UP
from tests.unit.supervisor_harness import (
    BEATING,
    DEAF,
    ENV,
    HOPELESS,
    NEVER_READY,
    PARENT,
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


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "pids"


def test_readiness_is_announced_once_when_every_child_is_ready(report: Path, tmp_path: Path) -> None:
    late = tmp_path / "go"
    waits = REPORT + f"while not os.path.exists({str(late)!r}): time.sleep(0.01)\nnotify_ready(); time.sleep(600)"
    other = tmp_path / "other"
    with supervising(child(READY, report, "a"), child(waits, other, "b")) as run:
        until(lambda: len(pids(report)) == 1 and len(pids(other)) == 1)
        assert not run.ready
        late.touch()
        until(lambda: bool(run.ready))
        os.kill(pids(report)[0], signal.SIGKILL)
        until(lambda: len(pids(report)) == 2)
        assert run.end() == 0
        assert run.ready == [1]


def test_ready_child_that_is_killed_is_restarted_and_its_sister_left_alone(report: Path, tmp_path: Path) -> None:
    sister = tmp_path / "sister"
    ready_first = "from servicekit.lifeline import notify_ready; notify_ready()" + READY
    with supervising(child(ready_first, report, "a"), child(READY, sister, "b"), stable_s=0.0) as run:
        until(lambda: bool(run.ready) and len(pids(report)) == 1)
        for killed in range(1, 8):  # more often than starts may fail: a stable child resets the count
            os.kill(pids(report)[-1], signal.SIGKILL)
            until(lambda killed=killed: len(pids(report)) == killed + 1)
        assert not run.status
        assert len(pids(sister)) == 1


def test_failed_starts_count_in_a_row_only(report: Path) -> None:
    ready_every_fifth_time = REPORT + "if sum(1 for _ in open(sys.argv[1])) % 5 == 0: notify_ready()\nsys.exit(1)"
    with supervising(child(ready_every_fifth_time, report), max_backoff_s=0.1) as run:
        until(lambda: len(pids(report)) == 10 or bool(run.status))
        assert run.end() == 0


def test_a_child_that_dies_as_soon_as_it_is_ready_is_started_ever_later_and_never_given_up(report: Path) -> None:
    dies = REPORT + "open(sys.argv[1] + '.times', 'a').write(f'{time.monotonic()}\\n'); notify_ready(); sys.exit(1)"
    with supervising(child(dies, report), stable_s=60.0, first_backoff_s=0.05, max_backoff_s=0.8) as run:
        until(lambda: len(pids(report)) == 7 or bool(run.status))
        assert run.end() == 0
    starts = [float(line) for line in report.with_name(f"{report.name}.times").read_text().split()]
    delays = [later - start for start, later in itertools.pairwise(starts)]
    for delay, expected in zip(delays, [0.05, 0.1, 0.2, 0.4, 0.8, 0.8], strict=False):
        assert delay >= expected


def test_supervisor_gives_up_after_five_failed_starts_and_stops_the_others(report: Path, tmp_path: Path) -> None:
    sister = tmp_path / "sister"
    with supervising(child(READY, sister, "b"), child(STILLBORN, report, "a")) as run:
        assert run.join() == EXIT_GAVE_UP
    assert len(pids(report)) == 5
    assert not any(exists(pid) for pid in pids(report) + pids(sister))


def test_child_that_cannot_be_helped_is_not_started_again(report: Path) -> None:
    with supervising(child(HOPELESS, report)) as run:
        assert run.join() == EXIT_GAVE_UP
    assert len(pids(report)) == 1


def test_stop_leaves_no_child_ready_or_not(report: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with supervising(child(READY, report, "a"), child(NEVER_READY, other, "b")) as run:
        until(lambda: bool(pids(report)) and bool(pids(other)))
        assert run.end() == 0
    assert not any(exists(pid) for pid in pids(report) + pids(other))


@pytest.mark.parametrize("how", ["stopped by a signal", "deaf to SIGTERM"])
def test_child_that_does_not_end_is_killed(report: Path, how: str) -> None:
    with supervising(child(DEAF if how.startswith("deaf") else READY, report), grace_s=0.3) as run:
        until(lambda: bool(run.ready))
        if how.startswith("stopped"):
            os.kill(pids(report)[0], signal.SIGSTOP)
        assert run.end() == 0
    assert not exists(pids(report)[0])


def test_processes_that_a_dead_child_left_in_its_group_are_killed_before_the_restart(report: Path) -> None:
    breeds = REPORT + (
        "if os.fork() == 0:\n"
        "    open(sys.argv[1] + '.grandchild', 'a').write(f'{os.getpid()}\\n')\n"
        "else: notify_ready()\n"
        "time.sleep(600)"
    )
    grandchildren = report.with_name("pids.grandchild")
    with supervising(child(breeds, report)) as run:
        until(lambda: bool(run.ready) and len(pids(grandchildren)) == 1)
        os.kill(pids(report)[0], signal.SIGKILL)
        until(lambda: len(pids(report)) == 2)
        until(lambda: not runs(pids(grandchildren)[0]))


def test_child_does_not_outlive_a_supervisor_that_is_killed(report: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(report), READY], env={**os.environ, **ENV})
    until(lambda: bool(pids(report)))
    assert runs(pids(report)[0])
    parent.kill()
    parent.wait()
    until(lambda: not runs(pids(report)[0]))


def test_a_killed_service_takes_its_grandchildren_with_it_and_is_restarted(report: Path) -> None:
    service = Child("service", [sys.executable, "-c", SERVICE, str(report), READY], ENV)
    with supervising(service) as run:
        until(lambda: bool(run.ready))  # the service hands its child's readiness on
        (first,) = pids(report)
        os.kill(int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
        until(lambda: len(pids(report)) == 2)
        until(lambda: not runs(first))
        assert run.end() == 0
    assert not runs(pids(report)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_ends_cleanly_on_a_signal(report: Path, number: signal.Signals) -> None:
    service = subprocess.Popen([sys.executable, "-c", SERVICE, str(report), READY], env={**os.environ, **ENV})
    until(lambda: bool(pids(report)))
    service.send_signal(number)
    assert service.wait(30) == 0
    assert not exists(pids(report)[0])


def test_a_service_passes_on_that_its_child_cannot_be_helped(report: Path) -> None:
    service = Child("service", [sys.executable, "-c", SERVICE, str(report), STILLBORN], ENV)
    with supervising(service) as run:
        assert run.join() == EXIT_GAVE_UP
    assert len(pids(report)) == 5  # and not five times five


@pytest.mark.parametrize("script", [REPORT + "notify_ready(); notify_ready()", REPORT + BEATING.format("return")])
def test_program_that_was_started_by_hand_runs_without_a_supervisor(report: Path, script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DUET_")}
    subprocess.run([sys.executable, "-c", script, str(report)], env={**environment, **ENV}, check=True, timeout=60)
    assert len(pids(report)) == 1


def test_child_whose_supervisor_died_before_it_was_bound_ends(report: Path) -> None:
    environment = {**os.environ, **ENV, "DUET_PARENT_PID": "1"}
    assert subprocess.run([sys.executable, "-c", REPORT, str(report)], env=environment, timeout=60).returncode == 1
    assert not pids(report)


# --- children that are kept together -----------------------------------------------------------------------------


@pytest.fixture
def reports(tmp_path: Path) -> list[Path]:
    """One for each of three children."""
    return [tmp_path / name for name in "abc"]


def group_of(reports: list[Path], *scripts: str) -> list[Child]:
    return [child(script, report, report.name) for script, report in zip(scripts, reports, strict=True)]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_end_of_one_child_ends_the_others_at_once_and_all_are_started_again(
    reports: list[Path], victim: int
) -> None:
    # The deaf ones would have all of the grace, if they were asked to end.
    with supervising(*group_of(reports, DEAF, DEAF, READY), together=True, grace_s=20.0, stable_s=0.0) as run:
        until(lambda: bool(run.ready))
        firsts = [pids(report)[0] for report in reports]
        os.kill(firsts[victim], signal.SIGKILL)
        until(lambda: all(len(pids(report)) == 2 for report in reports))
        assert not any(exists(pid) for pid in firsts)
        run.stop.ask(at_once=True)
        for report in reports:
            os.kill(pids(report)[1], signal.SIGKILL)


def test_a_clean_exit_of_one_child_ends_the_others_too(reports: list[Path]) -> None:
    leaves = REPORT + "notify_ready(); time.sleep(0.3 if len(open(sys.argv[1]).readlines()) == 1 else 600)"
    with supervising(*group_of(reports, READY, leaves, READY), together=True, stable_s=0.0) as run:
        until(lambda: all(len(pids(report)) == 2 for report in reports))
        assert run.end() == 0
    assert not any(exists(pid) for report in reports for pid in pids(report))


def test_a_group_is_ready_when_all_of_it_was_ready_at_the_same_start(reports: list[Path], tmp_path: Path) -> None:
    late = tmp_path / "go"
    waits = REPORT + f"while not os.path.exists({str(late)!r}): time.sleep(0.01)\nnotify_ready(); time.sleep(600)"
    ready_only_at_first = REPORT + "len(open(sys.argv[1]).readlines()) == 1 and notify_ready()\ntime.sleep(600)"
    with supervising(*group_of(reports, ready_only_at_first, waits, READY), together=True) as run:
        until(lambda: all(len(pids(report)) == 1 for report in reports))
        time.sleep(0.2)  # what the first one says is heard
        os.kill(pids(reports[0])[0], signal.SIGKILL)
        until(lambda: all(len(pids(report)) == 2 for report in reports))
        late.touch()
        time.sleep(0.3)
        assert not run.ready
        assert run.end() == 0


def test_a_failed_start_of_several_children_is_one_failed_start(reports: list[Path]) -> None:
    die_when_all_were_started = REPORT + (
        f"reports = {[str(report) for report in reports]}\n"
        "count = lambda report: len(open(report).readlines()) if os.path.exists(report) else 0\n"
        "while min(map(count, reports)) < count(sys.argv[1]): time.sleep(0.002)\n"
        "sys.exit(1)"
    )
    with supervising(*group_of(reports, *[die_when_all_were_started] * 3), together=True) as run:
        assert run.join() == EXIT_GAVE_UP
    assert [len(pids(report)) for report in reports] == [5, 5, 5]


def test_a_group_is_stable_only_when_all_of_it_has_been_ready_for_long(reports: list[Path]) -> None:
    dies_unready = REPORT + "time.sleep(0.3); sys.exit(1)"
    with supervising(*group_of(reports, READY, dies_unready, READY), together=True, stable_s=0.05) as run:
        assert run.join() == EXIT_GAVE_UP
    assert [len(pids(report)) for report in reports] == [5, 5, 5]


@pytest.mark.parametrize("place", [0, 2])
def test_a_child_that_cannot_be_helped_ends_the_group_for_good(
    reports: list[Path], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_TICK_S", 1.0)  # the ends of all are seen at once
    hopeless = reports[place]
    dies_of_it = REPORT + (
        f"while not os.path.exists({str(hopeless)!r}) or not open({str(hopeless)!r}).read(): time.sleep(0.002)\n"
        f"stat = '/proc/' + open({str(hopeless)!r}).read().strip() + '/stat'\n"
        "while open(stat).read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.002)\n"
        "sys.exit(1)"
    )
    scripts = [dies_of_it, READY, dies_of_it]
    scripts[place] = HOPELESS
    with supervising(*group_of(reports, *scripts), together=True) as run:
        assert run.join() == EXIT_GAVE_UP
    assert [len(pids(report)) for report in reports] == [1, 1, 1]
