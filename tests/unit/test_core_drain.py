"""The core drains: nothing new is taken, what is there ends, and whoever asked is told."""

import pytest

from scheduler_service.ipc import CancelDrain, Drain, DrainReply
from tests.unit.core_harness import LENGTH, continuation
from tests.unit.engine_harness import FrontEnd, ScriptedExecutor, Setting


async def busy(setting: Setting, num_requests: int = 3) -> tuple[ScriptedExecutor, FrontEnd]:
    """A front end whose requests are with an executor that waits."""
    executor = await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    executor.going.clear()
    for stream in range(1, num_requests + 1):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 10)
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == num_requests)
    return executor, frontend


async def test_draining_refuses_the_new_lets_the_old_end_and_answers_then(setting: Setting):
    executor, frontend = await busy(setting)
    operator = await setting.connect()
    operator.send(Drain(7, None))
    await frontend.until(lambda: frontend.status is not None and frontend.status.draining)
    assert frontend.status is not None
    assert frontend.status.ready
    frontend.submit(9, range(900, 910), 5)
    await frontend.until(lambda: frontend.ends)
    assert frontend.error(9) == ("UNAVAILABLE", "ServerDraining")
    await operator.load()
    assert operator.replies == [], "requests are left"
    executor.going.set()
    await operator.until(lambda: operator.replies)
    assert operator.replies == [DrainReply(7, 3, 0)]
    await frontend.until(lambda: len(frontend.ends) == 4)
    for stream in (1, 2, 3):
        assert frontend.tokens[stream] == continuation(range(100 * stream, 100 * stream + 10), 10)
    frontend.submit(10, range(900, 910), 5)
    await frontend.until(lambda: 10 in frontend.ends)
    assert frontend.error(10) == ("UNAVAILABLE", "ServerDraining"), "it goes on drained"


async def test_draining_an_idle_core_is_answered_at_once(setting: Setting):
    await setting.start_executor()
    frontend = await setting.connect()
    frontend.send(Drain(7, None))
    await frontend.until(lambda: frontend.replies)
    assert frontend.replies == [DrainReply(7, 0, 0)]
    assert frontend.status is not None
    assert frontend.status.draining


async def test_the_limit_ends_what_is_left_and_counts_it(setting: Setting):
    executor, frontend = await busy(setting, 2)
    executor.going.set()
    frontend.submit(3, range(300, 310), 200)
    await frontend.until(lambda: len(frontend.ends) == 2 and len(frontend.tokens.get(3, ())) > 10)
    executor.going.clear()
    frontend.send(Drain(7, 0.2))
    await frontend.until(lambda: frontend.replies)
    assert frontend.replies == [DrainReply(7, 0, 1)]
    assert frontend.error(3) == ("UNAVAILABLE", "ServerDraining")
    executor.going.set()
    assert [frontend.finish_reason(stream) for stream in (1, 2)] == [LENGTH] * 2
    await frontend.until_load(lambda load: load.used_blocks == 0)


async def test_all_who_wait_for_the_end_hear_of_it_and_the_shortest_limit_holds(setting: Setting):
    _, frontend = await busy(setting)
    frontend.send(Drain(7, None))
    frontend.send(Drain(8, 0.2))
    frontend.send(Drain(9, 1000))
    await frontend.until(lambda: len(frontend.replies) == 3)
    assert frontend.replies == [DrainReply(7, 0, 3), DrainReply(8, 0, 3), DrainReply(9, 0, 3)]


@pytest.mark.parametrize("has_ended", [False, True])
async def test_cancelling_takes_requests_again_whether_it_has_ended_or_not(setting: Setting, has_ended: bool):
    executor, frontend = await busy(setting)
    if has_ended:
        executor.going.set()
        await frontend.until(lambda: len(frontend.ends) == 3)
    frontend.send(Drain(7, None))
    await frontend.until(lambda: frontend.status is not None and frontend.status.draining)
    frontend.send(CancelDrain(8))
    await frontend.until(lambda: frontend.status is not None and not frontend.status.draining)
    assert frontend.replies == [DrainReply(7, 0, 0), DrainReply(8, 0, 0)]
    executor.going.set()
    frontend.submit(9, range(900, 910), 5)
    await frontend.until(lambda: len(frontend.ends) == 4)
    assert frontend.tokens[9] == continuation(range(900, 910), 5)


async def test_draining_waits_for_requests_that_outlive_their_clients_and_these_can_be_resumed(setting: Setting):
    executor, frontend = await busy(setting, 0)
    frontend.submit(1, range(10), 10, request_id="kept", detach_s=60.0)
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 1)
    await frontend.close()
    other = await setting.connect()
    other.send(Drain(7, None))
    await other.until(lambda: other.status is not None and other.status.draining)
    assert other.replies == []
    other.submit(2, range(10), 10, request_id="kept", detach_s=60.0, resumes=True)
    executor.going.set()
    await other.until(lambda: other.ends and other.replies)
    assert other.tokens[2] == continuation(range(10), 10)
    assert other.replies == [DrainReply(7, 1, 0)]


async def test_an_operator_who_leaves_changes_nothing(setting: Setting):
    executor, frontend = await busy(setting)
    operator = await setting.connect()
    operator.send(Drain(7, None))
    await frontend.until(lambda: frontend.status is not None and frontend.status.draining)
    await operator.close()
    executor.going.set()
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert (await frontend.load()).load.finished_requests_total == 3
