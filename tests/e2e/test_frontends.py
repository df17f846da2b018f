"""Several front end processes on one port: any of them serves, and reaches what another one began."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from duet import LLM, Client
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.e2e.conftest import FLAGS
from tests.e2e.system import ENDLESS, generate_request, tokens_of, wait_until
from tests.faults.processes import descendants

NUM_FRONTENDS = 3
NUM_CHANNELS = 24  # the kernel picks a front end for each connection: three are all met but once in 6,000 runs


@pytest.fixture(scope="module")
def own_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that its processes are told from those of other servers."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("frontends") / "tiny"))


@pytest.fixture(scope="module")
def llm(own_model: Path) -> Iterator[LLM]:
    with LLM(str(own_model), **FLAGS, max_num_seqs=16, num_blocks=1024, num_frontends=NUM_FRONTENDS) as llm:
        yield llm


@pytest.fixture
def stubs(llm: LLM) -> Iterator[list[InferenceServiceStub]]:
    """Each over a connection of its own."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(llm.address, options=options) for _ in range(NUM_CHANNELS)]
    yield [InferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        channel.close()


def frontends(own_model: Path) -> list[int]:
    return descendants("scheduler_service.frontend", str(own_model))


def num_connections(pid: int, port: int) -> int:
    """Established connections to our port that the process holds."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    inodes = {row[9] for row in rows if row[3] == "01" and int(row[1].rpartition(":")[2], 16) == port}
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    return sum(f"socket:[{inode}]" in links for inode in inodes)


def test_every_front_end_gives_the_same_tokens(llm: LLM, stubs: list[InferenceServiceStub], own_model: Path) -> None:
    assert len(frontends(own_model)) == NUM_FRONTENDS
    calls = [stub.Generate(generate_request([5, 6, 7], max_tokens=30)) for stub in stubs]
    tokens = [tokens_of(call) for call in calls]
    assert len(tokens[0]) == 30
    assert all(one == tokens[0] for one in tokens)
    port = int(llm.address.rpartition(":")[2])
    assert all(num_connections(pid, port) > 0 for pid in frontends(own_model))


def test_a_request_is_cancelled_through_whatever_front_end(stubs: list[InferenceServiceStub]) -> None:
    call = stubs[0].Generate(generate_request([1, 2], max_tokens=ENDLESS, request_id="far"))
    assert next(call).HasField("started")
    stubs[-1].Cancel(pb.CancelRequest(request_id="far"))
    assert list(call)[-1].finished.reason == pb.FINISH_REASON_CANCELLED


def test_the_others_serve_while_a_killed_front_end_comes_back(llm: LLM, own_model: Path) -> None:
    before = frontends(own_model)
    os.kill(before[0], signal.SIGKILL)
    # Connections that wait at its socket are lost with it, which lives as long as its last thread.
    wait_until(lambda: not Path(f"/proc/{before[0]}").exists())
    with Client(llm.address) as client:
        wait_until(lambda: client.server().ready)
    wait_until(lambda: len(frontends(own_model)) == NUM_FRONTENDS)
    assert before[0] not in frontends(own_model)
