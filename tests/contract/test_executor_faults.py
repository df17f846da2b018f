"""A rank that is killed, fails or hangs at any of its fault points: its session ends, and its next start serves."""

import asyncio
import contextlib
import dataclasses
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from executor_service.server import SERVICE
from protos.duet.executor.v1 import executor_pb2 as pb
from servicekit.child_process import Child
from servicekit.fault_points import POINTS
from servicekit.supervisor import Stop, Supervisor
from tests.contract.session_harness import NEW, Code, Core, column, until
from tests.faults.arming import FaultPoints

ROOT = Path(__file__).parents[2]
SEED, POISON = 1, 666
PREFILL = {
    "prefill_slots": column(0), "prefill_starts": column(0), "prefill_counts": column(2), "prefill_samples": column(1),
    "iterations": 0,
}  # fmt: skip
AT_START = ["executor.starting", "executor.listening"]
IN_SESSION = [name for name in POINTS if name.startswith("executor.") and name not in AT_START]
ON_DEVICE = [  # with a key, and the plan of which that is
    ("executor.step_begun", 1, 1),
    ("executor.sequence", SEED, 1),
    ("executor.step_done", 1, 1),
    ("executor.step_done", 2, 2),
    ("executor.step_begun", 3, 3),
    ("executor.step_done", 4, 3),
    ("executor.step_done", 5, 3),
]
HANGS = "delay 1000"


@dataclasses.dataclass
class Service:
    """A supervised rank with a scripted runner, from outside."""

    channel: grpc.aio.Channel
    points: FaultPoints
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def connect(self) -> tuple[Core, pb.ExecutorInfo]:
        """A stream to the start of it that serves, or the next one to do so."""
        multi = self.channel.stream_stream(
            f"/{SERVICE}/RunSession", response_deserializer=pb.RunSessionResponse.FromString
        )
        while True:
            core = Core(multi(wait_for_ready=True))
            with contextlib.suppress(grpc.aio.AioRpcError):  # it ends
                return core, await core.info()

    async def boot_id(self) -> str:
        core, info = await self.connect()
        core.call.cancel()
        return info.boot_id

    async def assert_serves_after(self, boot_id: str) -> None:
        """The start with this boot id has ended, and the next one computes."""
        while await self.boot_id() == boot_id:  # where it still has to end
            pass
        assert await self.run_session() == (Code.OK, "")

    async def run_session(self, *, seed: int = SEED, timeout_ms: int = 0) -> tuple[grpc.StatusCode, str]:
        """Plans 1, 2 and 3, the last of three steps, unless the session ends before; how it ends."""
        core, info = await self.connect()
        core.epoch = info.last_epoch + 1
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the end says more
            await core.ask(core.epoch)
            assert (await core.read()).opened.epoch == core.epoch
            sequence = pb.NewSequence(**NEW, sampling=pb.SamplingParams(seed=seed))  # pyright: ignore[reportArgumentType]
            await core.plan(1, new_sequences=[sequence], timeout_ms=timeout_ms, **PREFILL)
            assert (await core.result()).token_ids == column(10)
            for step_ids in ([2], [3, 4, 5]):
                await core.plan(step_ids[0], iterations=len(step_ids), join_slots=column(0), timeout_ms=timeout_ms)
                for step_id in step_ids:
                    assert (await core.result()).token_ids == column(10 * step_id)
            await core.call.done_writing()
        return await core.end()


def is_lost(end: tuple[grpc.StatusCode, str]) -> bool:
    """Whether the session ended with its process; where that meets a write, gRPC's client says no more than this."""
    return end[0] is Code.UNAVAILABLE or end == (Code.INTERNAL, "Internal error from Core")


@contextlib.asynccontextmanager
async def supervised(directory: Path, wipe_timeout_s: float = 120.0) -> AsyncIterator[Service]:
    points, log_file, stop = FaultPoints(directory / "points"), directory / "log", Stop()
    points.directory.mkdir()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket())  # keeps the port for the next start, since it does not listen
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        log = stack.enter_context(log_file.open("wb"))
        argv = ["-m", "tests.contract.scripted_rank", str(wipe_timeout_s), "--model", "none", "--listen", address]
        environment = {"PYTHONPATH": str(ROOT)} | points.environment
        rank = Child("rank 0", [sys.executable, *argv], environment, output=log.fileno())
        supervisor = Supervisor([rank], stable_s=0.0)  # however soon it ends, it is started again
        thread = threading.Thread(target=supervisor.run, args=(stop,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.ask, at_once=True)
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield Service(channel, points, log_file)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with supervised(tmp_path) as service:
        yield service


# --- killed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", IN_SESSION)
async def test_a_rank_that_is_killed_at_a_point_ends_the_session_and_serves_the_next_one(
    service: Service, point: str
) -> None:
    first = await service.boot_id()
    service.points.arm(point, "kill")
    assert is_lost(await service.run_session())
    assert not service.points.is_armed(point)
    await service.assert_serves_after(first)


@pytest.mark.parametrize("point", AT_START)
async def test_a_rank_that_is_killed_as_it_starts_is_started_again(service: Service, point: str) -> None:
    first = await service.boot_id()
    service.points.arm(point, "kill")
    service.points.arm("executor.plan_received", "kill")
    assert is_lost(await service.run_session())
    service.points.wait_for(point)
    await service.assert_serves_after(first)


async def test_a_poisoned_sequence_kills_every_rank_that_it_is_given_to_and_no_other_does(service: Service) -> None:
    service.points.arm("executor.sequence", f"kill always key {POISON}")
    boots = [await service.boot_id()]
    for _ in range(2):
        assert await service.run_session() == (Code.OK, "")
        assert await service.boot_id() == boots[-1]
        assert is_lost(await service.run_session(seed=POISON))
        boots.append(await service.boot_id())
    assert len(set(boots)) == 3


# --- failed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "key", "step_id"), ON_DEVICE)
async def test_a_failure_of_the_device_is_an_internal_error_and_ends_the_rank(
    service: Service, point: str, key: int, step_id: int
) -> None:
    first = await service.boot_id()
    service.points.arm(point, f"fail key {key}")
    code, message = await service.run_session()
    assert (code, point in message) == (Code.INTERNAL, True)
    await service.assert_serves_after(first)


# --- hung --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "key", "step_id"), ON_DEVICE)
async def test_a_device_that_hangs_in_a_plan_ends_the_rank_and_the_next_start_serves(
    service: Service, point: str, key: int, step_id: int
) -> None:
    first = await service.boot_id()
    service.points.arm(point, f"{HANGS} key {key}")
    assert is_lost(await service.run_session(timeout_ms=1000))
    assert f"the device hangs: step {step_id} has taken" in service.log
    await service.assert_serves_after(first)


async def test_a_plan_without_a_bound_may_take_as_long_as_it_needs(service: Service) -> None:
    first = await service.boot_id()
    service.points.arm("executor.step_begun", "delay 1.5")  # the watchdog looks every 0.1 s
    assert await service.run_session() == (Code.OK, "")
    assert await service.boot_id() == first


async def test_a_plan_without_a_bound_that_hangs_ends_the_rank_once_a_wiping_waits_too_long_behind_it(
    tmp_path: Path,
) -> None:
    async with supervised(tmp_path, wipe_timeout_s=0.3) as service:
        first = await service.boot_id()
        service.points.arm("executor.step_begun", HANGS)
        stuck = asyncio.create_task(service.run_session())
        await until(lambda: not service.points.is_armed("executor.step_begun"))
        assert not stuck.done()
        assert is_lost(await service.run_session())
        assert (await stuck)[0] is Code.ABORTED  # by the other one's opening
        assert "the device hangs: the wiping of slots has taken" in service.log
        await service.assert_serves_after(first)
