"""Two ranks, one of which is killed or hangs at its fault points: all start again, and give the same tokens."""

from pathlib import Path

import grpc
import pytest

from tests.e2e.plain_session import run_session
from tests.e2e.system import PATIENCE_S
from tests.e2e.test_rank_loss import running_service
from tests.e2e.test_torchrun import free_port
from tests.faults.arming import FaultPoints


@pytest.fixture
def points(tmp_path: Path) -> FaultPoints:
    (tmp_path / "points").mkdir()
    return FaultPoints(tmp_path / "points")


@pytest.mark.parametrize(
    ("fault", "log"),
    [
        ("kill key 2", "fault point follower.plan_received: kill"),
        ("delay 1000 key 2", "the device hangs: step 2 has taken"),  # rank 0's, which waits for the other
    ],
)
def test_all_ranks_start_again_when_one_is_lost_in_the_middle_of_a_plan(
    tiny_model: Path, points: FaultPoints, fault: str, log: str
) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running_service(tiny_model, address, points.environment) as service:
        undisturbed = run_session(address)
        points.arm("follower.plan_received", fault)
        with pytest.raises(grpc.RpcError):
            run_session(address, timeout_ms=3000)
        assert not points.is_armed("follower.plan_received")
        assert run_session(address) == undisturbed
        service.terminate()
        _, said = service.communicate(timeout=PATIENCE_S)
    assert log in said


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_start_again_when_one_is_killed_before_it_has_its_model(
    tiny_model: Path, points: FaultPoints, rank: int
) -> None:
    points.arm("executor.starting", f"kill key {rank}")
    address = f"127.0.0.1:{free_port()}"
    with running_service(tiny_model, address, points.environment) as service:
        assert run_session(address)["tensor_parallel_size"] == 2
        service.terminate()
        _, said = service.communicate(timeout=PATIENCE_S)
    assert f"rank {rank} ended before it was ready (killed by SIGKILL)" in said
