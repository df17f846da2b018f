"""The core looks for leaks when it has nothing to do, counts what it finds, and goes on."""

import logging
from collections.abc import Callable

import pytest

from scheduler_service.core.idle_check import IDLE_S, IdleCheck
from tests.unit.core_harness import LENGTH, Core, continuation


def look(core: Core, check: IdleCheck, *, idle_s: float = IDLE_S) -> tuple[int, int]:
    """The core sweeps, and again after a time without work; returns checks that passed and that failed so far."""
    check.work(core.now)
    core.now += idle_s
    check.work(core.now)
    return core.pool.counters.idle_checks, core.pool.counters.idle_check_failures


def work(core: Core) -> None:
    for start in (0, 100, 200):
        core.submit(range(start, start + 10), 9)
    core.run()


def leak_block(core: Core) -> None:
    core.epoch.blocks.allocate(0, [], 4)


def leak_slot(core: Core) -> None:
    core.epoch.free_slots.pop()


def leak_reference(core: Core) -> None:
    core.epoch.blocks.ref_counts[0] += 1


def leak_planned(core: Core) -> None:
    request = core.submit(range(4), 9)
    core.run()
    core.epoch.leaving.append(request)


def leak_suspect(core: Core) -> None:
    request = core.submit(range(4), 9)
    core.run()
    core.pool.suspects.add(request)


def leak_quarantined(core: Core) -> None:
    request = core.submit(range(4), 9)
    core.run()
    core.pool.quarantine[request] = None


def test_a_look_after_work_finds_all_in_order_once_each_time():
    core = Core(inflight=2)
    check = IdleCheck(core.pool)
    for num_looks in range(1, 4):
        work(core)
        assert look(core, check) == (num_looks, 0)
        assert look(core, check) == (num_looks, 0), "nothing was done since"


def test_a_core_that_did_nothing_yet_has_nothing_to_look_at():
    core = Core()
    assert look(core, IdleCheck(core.pool)) == (0, 0)


def test_nobody_looks_while_there_is_work_or_a_moment_after():
    core = Core()
    check = IdleCheck(core.pool)
    work(core)
    assert look(core, check, idle_s=IDLE_S / 2) == (0, 0)
    core.submit(range(10), 9)
    core.step()
    assert look(core, check) == (0, 0)
    core.run()
    assert look(core, check, idle_s=IDLE_S / 2) == (0, 0), "the time of idleness begins anew"
    assert look(core, check) == (1, 0)


def test_the_loss_of_an_executor_is_a_reason_to_look_and_without_one_nobody_does():
    core = Core()
    check = IdleCheck(core.pool)
    core.pool.end_epoch()
    assert look(core, check) == (0, 0)
    core.begin_epoch()
    assert look(core, check) == (1, 0)


@pytest.mark.parametrize("leak", [leak_block, leak_slot, leak_reference, leak_planned, leak_suspect, leak_quarantined])
def test_a_leak_is_counted_and_told_to_the_log_and_the_core_goes_on(
    leak: Callable[[Core], None], caplog: pytest.LogCaptureFixture
):
    core = Core()
    check = IdleCheck(core.pool)
    work(core)
    leak(core)
    with caplog.at_level(logging.ERROR):
        assert look(core, check) == (0, 1)
    assert "not everything is in order" in caplog.text
    core.pool.end_epoch()
    core.pool.suspects.clear()
    core.pool.quarantine.clear()
    core.begin_epoch()
    request = core.submit(range(10), 5)
    core.run()
    assert (core.streamed(request), core.reason(request)) == (continuation(range(10), 5), LENGTH)
    assert look(core, check) == (1, 1)
