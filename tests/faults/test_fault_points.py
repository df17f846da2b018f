"""Every named place at which a process can die, once: streams that may be resumed go on, and nothing is left behind."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duet import LLM, AsyncClient, Client, Output, SamplingParams
from servicekit.fault_points import POINTS
from tests.e2e.conftest import FLAGS, tiny_model
from tests.faults.arming import PATIENCE_S, FaultPoints
from tests.faults.processes import descendants

__all__ = ["tiny_model"]

NUM_STREAMS = 6
PARAMS = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
PROMPTS = [[number + 5, 7, 9, *range(20, 20 + 3 * number)] for number in range(NUM_STREAMS)]
STABLE_S = 2.2  # after a death within 2 s of readiness the supervisor waits ever longer
MODULES = {
    "executor": "executor_service.rank",
    "core": "scheduler_service.core",
    "frontend": "scheduler_service.frontend",
}
# Reached by a process that takes the place of a dead one.
REACHED_BY_SUCCESSORS = {
    "executor.starting": "executor",
    "executor.listening": "executor",
    "executor.opening": "executor",
    "core.epoch_begun": "executor",
    "core.starting": "core",
    "core.listening": "core",
    "core.resubmit_read": "core",
    "frontend.starting": "frontend",
    "frontend.listening": "frontend",
}
REACHED_ONCE_A_STREAM = (
    "executor.sequence",
    "core.submit_read",
    "frontend.request_read",
    "frontend.submitted",
    "frontend.finished",
)
STOPPED = (
    "executor.step_begun",
    "executor.starting",
    "core.result_applied",
    "core.epoch_begun",
    "frontend.tokens_read",
)
ON_DEVICE = ("executor.step_begun", "executor.sequence", "executor.step_done")
FOLLOWERS = [name for name in POINTS if name.startswith("follower.")]
LEADERS = [name for name in POINTS if name not in FOLLOWERS]
BY_TURNS = [name for first in range(7) for name in LEADERS[first::7]]  # so that no process dies all the time


class Server:
    """Both services, and what their undisturbed streams are."""

    def __init__(self, llm: LLM, model: Path, points: FaultPoints) -> None:
        self.points = points
        self._llm = llm
        self._model = str(model)
        self._last_deaths: dict[str, float] = {}
        self.undisturbed = [output.token_ids for output in asyncio.run(self.generate())]

    async def generate(self, disturb: str | None = None) -> list[Output]:
        """All streams at once; `disturb` names the process that is killed when they have begun."""
        async with AsyncClient(self._llm.address) as client:
            streams = [asyncio.create_task(client.generate(prompt, PARAMS, detach_seconds=60)) for prompt in PROMPTS]
            if disturb is not None:
                await asyncio.sleep(0.1)
                for pid in descendants(MODULES[disturb], self._model):
                    os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*streams)

    def wait_until_stable(self, process: str) -> None:
        time.sleep(max(0.0, self._last_deaths.get(process, 0.0) + STABLE_S - time.monotonic()))

    def note_death(self, process: str) -> None:
        self._last_deaths[process] = time.monotonic()

    def assert_nothing_leaked(self) -> None:
        end = time.monotonic() + PATIENCE_S
        with Client(self._llm.address) as client:
            while (server := client.server()).load.idle_checks_total == 0 or not server.ready:
                assert time.monotonic() < end, "the core never found time to look for leaks"
                time.sleep(0.05)
            load = server.load
        assert load.idle_check_failures_total == 0
        assert (load.used_blocks, load.running_requests, load.waiting_requests) == (0, 0, 0)
        assert load.quarantined_requests == 0


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultPoints]:
    points = FaultPoints(tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in points.environment.items():
            patch.setenv(name, value)
        yield points


@pytest.fixture(scope="module")
def server(tiny_model: Path, points: FaultPoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("models") / "by-which-its-processes-are-found"
    model.symlink_to(tiny_model)
    with LLM(str(model), **FLAGS, max_num_seqs=16, num_blocks=512, hang_timeout_s=2.0) as llm:
        yield Server(llm, model, points)


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, points: FaultPoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("models") / "on-two-ranks"
    model.symlink_to(tiny_model)
    with LLM(str(model), **FLAGS, max_num_seqs=16, num_blocks=512, tensor_parallel_size=2) as llm:
        yield Server(llm, model, points)


def outlive(server: Server, name: str, action: str, process: str) -> None:
    """Let the process die where `name` is, in the middle of all streams; they end as if nothing had been."""
    server.wait_until_stable(process)
    server.points.arm(name, action)
    outputs = asyncio.run(server.generate(disturb=REACHED_BY_SUCCESSORS.get(name)))
    server.note_death(process)
    assert not server.points.is_armed(name), "the place was never reached"
    assert [output.token_ids for output in outputs] == server.undisturbed
    assert [output.finish_reason for output in outputs] == ["length"] * NUM_STREAMS


@pytest.mark.parametrize("name", BY_TURNS)
def test_streams_outlive_a_process_that_is_killed_at(name: str, server: Server) -> None:
    when = "" if name in REACHED_BY_SUCCESSORS else " after 3" if name in REACHED_ONCE_A_STREAM else " after 10"
    outlive(server, name, f"kill{when}", name.partition(".")[0])


@pytest.mark.parametrize("name", STOPPED)
def test_streams_outlive_a_process_that_is_stopped_at(name: str, server: Server) -> None:
    when = "" if name in REACHED_BY_SUCCESSORS else " after 10"
    outlive(server, name, f"stop{when}", name.partition(".")[0])


@pytest.mark.parametrize("name", ON_DEVICE)
def test_streams_outlive_a_device_that_fails_at(name: str, server: Server) -> None:
    outlive(server, name, f"fail after {3 if name in REACHED_ONCE_A_STREAM else 10}", "executor")


def test_nothing_leaked_in_all_of_that(server: Server) -> None:
    server.assert_nothing_leaked()


@pytest.mark.parametrize("name", FOLLOWERS)
def test_streams_outlive_a_rank_that_is_killed_at(name: str, two_ranks: Server) -> None:
    outlive(two_ranks, name, "kill after 10", "executor")
