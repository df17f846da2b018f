"""Ranks that torchrun starts instead of our own supervisor: on one host, and on two, each in a network namespace."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import FLAGS
from tests.e2e.plain_session import NUM_TOKENS, PROMPTS, run_session
from tests.e2e.system import ROOT, is_alive, wait_until
from tests.faults.processes import descendants

PATIENCE_S = 100
SETTINGS = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | {"num_blocks": 64}).items()]


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace with an address on the one link between the two."""

    namespace: str
    address: str

    def command(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *argv]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    hosts = [Host(f"duet-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(2)]
    first, second = (host.namespace for host in hosts)
    with contextlib.ExitStack() as stack:
        for host in hosts:
            try:
                _ip("netns", "add", host.namespace)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces cannot be made here: {error}")
            stack.callback(_ip, "netns", "del", host.namespace)
        _ip("link", "add", "duet0", "netns", first, "type", "veth", "peer", "name", "duet0", "netns", second)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "duet0")
            for link in ("lo", "duet0"):
                _ip("-n", host.namespace, "link", "set", link, "up")
        yield hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def rank_argv(model: Path, listen: str) -> list[str]:
    return ["-m", "executor_service.rank", "--model", str(model), "--listen", listen, *SETTINGS]


@contextlib.contextmanager
def torchrun(model: Path, *options: str, listen: str, host: Host | None = None) -> Iterator["subprocess.Popen[str]"]:
    """`torchrun` of this host (None: the one of this test) with two ranks in all; killed at the end, if need be."""
    rank = [*rank_argv(model, listen), "--tensor-parallel-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *rank]
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "duet0"} if host else {})
    process = subprocess.Popen(host.command(*command) if host else command, cwd=ROOT, env=environment, text=True)
    try:
        yield process
    finally:
        for pid in ranks_of(process, model):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def ranks_of(process: "subprocess.Popen[str]", model: Path) -> list[int]:
    """Ids of the ranks that a torchrun has started."""
    ranks = descendants("executor_service.rank", str(model))  # and torchrun, whose command names them
    parents = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] for pid in ranks}
    return [pid for pid, parent in parents.items() if parent == str(process.pid)]


def run_session_on(host: Host, address: str) -> dict[str, Any]:
    """What run_session returns in the host's namespace."""
    command = host.command(sys.executable, "-m", "tests.e2e.plain_session", address)
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=PATIENCE_S)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tokens_of_one_process(tiny_model: Path) -> list[list[int]]:
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen([sys.executable, *rank_argv(tiny_model, address)], cwd=ROOT) as process:
        try:
            outcome = run_session(address)
        finally:
            process.terminate()
    assert outcome["tensor_parallel_size"] == 1
    assert [len(tokens) for tokens in outcome["tokens"]] == [NUM_TOKENS] * len(PROMPTS)
    return outcome["tokens"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_ranks_that_torchrun_starts_give_the_tokens_of_one_process_and_end_together(
    tiny_model: Path, tokens_of_one_process: list[list[int]]
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with torchrun(tiny_model, "--nproc-per-node", "2", listen=listen) as process:
        for _ in range(2):  # the second session finds the slots of all ranks empty
            assert run_session(listen) == {"tensor_parallel_size": 2, "tokens": tokens_of_one_process}
        ranks = ranks_of(process, tiny_model)
        assert len(ranks) == 2
        process.terminate()
        process.wait(PATIENCE_S)
        assert not any(is_alive(pid) for pid in ranks)


def test_no_rank_outlives_a_killed_torchrun(tiny_model: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with torchrun(tiny_model, "--nproc-per-node", "2", listen=listen) as process:
        run_session(listen)
        ranks = ranks_of(process, tiny_model)
        assert len(ranks) == 2
        try:
            process.kill()
            wait_until(lambda: not any(is_alive(pid) for pid in ranks))
        finally:
            for pid in filter(is_alive, ranks):
                os.kill(pid, signal.SIGKILL)


def test_ranks_on_two_hosts_give_the_tokens_of_one_process_and_none_outlives_rank_0(
    tiny_model: Path, tokens_of_one_process: list[list[int]], hosts: list[Host]
) -> None:
    listen = "127.0.0.1:50052"  # of the first host
    meeting = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={hosts[0].address}", "--master-port=29400"]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(torchrun(tiny_model, *meeting, f"--node-rank={number}", listen=listen, host=host))
            for number, host in enumerate(hosts)
        )
        outcome = run_session_on(hosts[0], listen)
        assert outcome == {"tensor_parallel_size": 2, "tokens": tokens_of_one_process}
        (rank_0,), (rank_1,) = ranks_of(first, tiny_model), ranks_of(second, tiny_model)
        os.kill(rank_0, signal.SIGKILL)
        assert first.wait(PATIENCE_S)
        assert second.wait(PATIENCE_S)  # not 0: what supervises torchrun starts it again
        assert not is_alive(rank_1)
