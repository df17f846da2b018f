"""When a device counts as hanging; what happens then: tests/contract/test_executor_faults.py."""

import pytest

from executor_service.watchdog import Watchdog, Watched


def plan(step_id: int, timeout_s: float) -> Watched:
    return Watched(step_id, timeout_s)


def wiping(timeout_s: float = 120.0) -> Watched:
    return Watched(None, timeout_s)


def expecting(*queue: Watched) -> Watchdog:
    """One that has just seen what is first in the queue."""
    watchdog = Watchdog()
    for work in queue:
        watchdog.expect(work)
    assert watchdog.look(100.0) is None  # nobody knows how much of it belongs to this
    return watchdog


def test_a_plan_hangs_when_it_has_taken_longer_than_it_may_and_is_named() -> None:
    watchdog = expecting(plan(7, 2.0))
    assert watchdog.look(1.5) is None
    assert watchdog.look(0.5) is None
    assert watchdog.look(0.1) == "step 7 has taken 2.1 s, and may take 2.0 s"


def test_a_plan_that_is_over_never_hangs() -> None:
    first = plan(1, 2.0)
    watchdog = expecting(first)
    first.is_over = True
    assert watchdog.look(1000.0) is None


def test_the_time_of_a_plan_begins_when_all_before_it_is_over() -> None:
    first, second = plan(1, 2.0), plan(2, 1.0)
    watchdog = expecting(first, second)
    assert watchdog.look(1.9) is None  # of the first; the second one waits
    first.is_over = True
    assert watchdog.look(1.0) is None
    assert watchdog.look(1.0) is None
    assert watchdog.look(0.1) == "step 2 has taken 1.1 s, and may take 1.0 s"


def test_what_is_dropped_out_of_turn_changes_nothing_for_the_plan_at_work() -> None:
    first, second, third = plan(1, 2.0), plan(2, 1.0), plan(3, 1.0)
    watchdog = expecting(first, second, third)
    second.is_over = True  # of a session that ended
    assert watchdog.look(1.5) is None
    assert watchdog.look(1.0) == "step 1 has taken 2.5 s, and may take 2.0 s"


@pytest.mark.parametrize("behind", [[], [plan(2, 1.0)], [plan(2, 1.0), plan(3, 0.0)]])
def test_a_plan_without_a_bound_may_take_for_ever_whatever_plans_wait_behind_it(behind: list[Watched]) -> None:
    watchdog = expecting(plan(1, 0.0), *behind)
    assert watchdog.look(1e6) is None
    assert watchdog.look(1e6) is None


def test_a_plan_without_a_bound_hangs_when_a_wiping_waits_behind_it_for_too_long() -> None:
    watchdog = expecting(plan(1, 0.0), plan(2, 1.0))
    assert watchdog.look(1000.0) is None
    watchdog.expect(wiping())
    assert watchdog.look(0.1) is None
    assert watchdog.look(120.0) is None
    assert watchdog.look(0.1) == "the wiping of slots has taken 120.1 s, and may take 120.0 s"


def test_a_plan_with_a_bound_keeps_it_although_a_wiping_waits_behind_it() -> None:
    first = plan(1, 300.0)
    watchdog = expecting(first, wiping())
    assert watchdog.look(299.0) is None
    first.is_over = True
    assert watchdog.look(2.0) is None
    assert watchdog.look(119.0) is None
    assert watchdog.look(2.0) == "the wiping of slots has taken 121.0 s, and may take 120.0 s"


def test_a_wiping_itself_may_hang() -> None:
    assert expecting(wiping()).look(121.0)


def test_nothing_hangs_where_nothing_is_to_do() -> None:
    watchdog = expecting()
    assert watchdog.look(1e6) is None
    watchdog.expect(plan(1, 1.0))
    assert watchdog.look(5.0) is None  # it may have begun just now
    assert watchdog.look(1.1)
