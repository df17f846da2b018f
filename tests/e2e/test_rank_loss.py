"""kill -9 of the ranks of an executor, at any moment: streams go on, all ranks start again, and none is left behind."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from duet import LLM, Client, SamplingParams, Unavailable
from tests.e2e.conftest import FLAGS
from tests.e2e.plain_session import SessionOver, run_session
from tests.e2e.system import PATIENCE_S, ROOT, SERVING, is_alive, wait_until
from tests.faults.processes import descendants

RANKS = 2
SYSTEMS = 2  # side by side, so that one computes while another waits
CYCLES, THOROUGH_CYCLES = 2, 5  # of each
ROUNDS_OF_CYCLE = 5  # one while streams run, and as many starts in a row as may fail without the supervisor giving up
LOAD_S = 2.5  # a guess, until a start was measured
STABLE_S = 2.3  # after an end within 2 s of readiness the supervisor waits ever longer
GRACE_S = 5.0  # that a restart may take beside loading
NUM_TOKENS = 200
PARAMS = [
    SamplingParams(temperature=temperature, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True)
    for temperature in (0, 0, 1, 1)
]
PROMPTS = [[number, 2, 3] for number in range(len(PARAMS))]


class Executor:
    """The processes of an executor, from outside."""

    def __init__(self, llm: LLM, model: Path) -> None:
        self._model = str(model)
        self._client = Client(llm.address)
        (self._service,) = descendants("executor_service", self._model)
        command = Path(f"/proc/{self._service}/cmdline").read_bytes().decode().split("\0")
        self._channel = grpc.insecure_channel(
            command[command.index("--listen") + 1],
            options=[("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 100)],
        )
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self.seen: set[int] = {self._service, *self.ranks()}

    def close(self) -> None:
        self._client.close()
        self._channel.close()

    def ranks(self) -> list[int]:
        return descendants("executor_service.rank", self._model)

    def wait_for_new_ranks(self) -> list[int]:
        """All that follow those seen so far, of which none may live any more."""
        wait_until(lambda: len(set(self.ranks()) - self.seen) == RANKS)
        ranks = self.ranks()
        assert len(ranks) == RANKS, "ranks of two starts live side by side"
        self.seen |= set(ranks)
        return ranks

    def wait_for_tokens(self, count: int) -> None:
        """Return once this many more have been generated."""
        enough = self._client.server().load.output_tokens_total + count
        wait_until(lambda: self._client.server().load.output_tokens_total >= enough)

    def wait_until_loaded(self) -> None:
        def is_serving() -> bool:
            try:
                return self._health.Check(health_pb2.HealthCheckRequest(), timeout=1).status == SERVING
            except grpc.RpcError:
                return False

        wait_until(is_serving)

    def wait_until_served(self) -> None:
        """Return once the scheduler has it."""

        def is_ready() -> bool:
            try:
                return self._client.server().ready
            except Unavailable:
                return False

        wait_until(is_ready)


def generate(llm: LLM) -> list[dict[str, Any]]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def run_cycle(executor: Executor, rng: random.Random, load_s: float) -> tuple[float, float]:
    """A kill while streams run, then kills while the executor starts or recovers, then a start in peace.

    load_s: how long a start may last. Returns how long the one in peace took to load, and to be served beside that.
    """
    executor.wait_for_tokens(rng.randint(1, len(PROMPTS) * NUM_TOKENS * 3 // 5))
    os.kill(rng.choice(executor.ranks()), signal.SIGKILL)
    for _ in range(ROUNDS_OF_CYCLE - 1):
        ranks = executor.wait_for_new_ranks()
        time.sleep(1.2 * load_s * rng.random() ** 2)  # more often early, since each moment of loading takes two cores
        os.kill(rng.choice(ranks), signal.SIGKILL)
    killed_at = time.monotonic()
    executor.wait_for_new_ranks()
    started_at = time.monotonic()
    executor.wait_until_loaded()
    loaded_at = time.monotonic()
    executor.wait_until_served()
    load_s = loaded_at - started_at
    return load_s, time.monotonic() - killed_at - load_s


def run_cycles(model: Path, seed: int, num_cycles: int) -> tuple[list[float], int]:
    """Returns how long each start in peace took beside loading, and how often a stream lost its executor."""
    rng = random.Random(seed)
    flags: dict[str, Any] = FLAGS | {"tensor_parallel_size": RANKS, "num_blocks": 1024, "max_pause_s": 300}
    load_s, delays, recoveries = LOAD_S, [], 0
    with LLM(str(model), **flags) as llm, ThreadPoolExecutor(1) as thread:
        executor = Executor(llm, model)
        undisturbed = [output["token_ids"] for output in generate(llm)]
        for _ in range(num_cycles):
            time.sleep(STABLE_S)
            streams = thread.submit(generate, llm)
            load_s, delay_s = run_cycle(executor, rng, load_s)
            delays.append(delay_s)
            outputs = streams.result()
            assert [output["token_ids"] for output in outputs] == undisturbed
            assert all(output["recoveries"] for output in outputs), "a kill met no stream"
            recoveries += sum(output["recoveries"] for output in outputs)
        executor.close()
    assert not [pid for pid in executor.seen if is_alive(pid)]
    return delays, recoveries


@pytest.mark.timeout(600)
def test_streams_outlive_the_loss_of_any_rank_at_any_moment(
    tiny_model: Path, tmp_path: Path, tell: Callable[[str], None], is_thorough: bool
) -> None:
    cycles = THOROUGH_CYCLES if is_thorough else CYCLES
    models = [Path(shutil.copytree(tiny_model, tmp_path / f"model {number}")) for number in range(SYSTEMS)]
    with ThreadPoolExecutor(SYSTEMS) as threads:
        results = threads.map(run_cycles, models, range(SYSTEMS), [cycles] * SYSTEMS)
        delays, recoveries = zip(*results, strict=True)
    longest_s, num_cycles = max(map(max, delays)), SYSTEMS * cycles
    assert longest_s < GRACE_S
    tell(
        f"kill -9 of a rank, {num_cycles * ROUNDS_OF_CYCLE} rounds, {num_cycles} of them while streams ran: "
        f"{num_cycles * len(PROMPTS)} streams ended as if undisturbed, after {sum(recoveries)} losses of an executor; "
        f"a restart took {longest_s:.1f} s beside loading at most"
    )


@contextlib.contextmanager
def running_service(
    model: Path, listen: str = "127.0.0.1:0", environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """An executor service without a scheduler; stderr is a pipe. Ended here, if need be."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | {"num_blocks": 64}).items()]
    argv = ["--model", str(model), "--listen", listen, "--tensor-parallel-size", str(RANKS), *settings]
    command = [sys.executable, "-m", "executor_service", *argv]
    environment = os.environ | (environment or {})
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as service:
        try:
            yield service
        finally:
            service.kill()


def wait_until_all_are_ready(service: "subprocess.Popen[str]") -> str:
    """Returns the address at which rank 0 listens."""
    assert service.stderr
    said = " ".join(service.stderr.readline() for _ in range(RANKS))
    assert "following rank 0" in said
    (port,) = re.findall(r"listening on port (\d+)", said)
    return f"127.0.0.1:{port}"


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that no other service runs, by which processes are told apart."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("is_ready", [False, True])
def test_no_rank_outlives_a_killed_service(own_model: Path, is_ready: bool) -> None:
    with running_service(own_model) as service:
        wait_until(lambda: len(descendants("executor_service.rank", str(own_model))) == RANKS)
        ranks = descendants("executor_service.rank", str(own_model))
        if is_ready:
            wait_until_all_are_ready(service)
        service.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in ranks))


def test_a_service_that_is_told_to_stop_ends_all_ranks_in_good_order(own_model: Path) -> None:
    with running_service(own_model) as service:
        address = wait_until_all_are_ready(service)
        ranks = descendants("executor_service.rank", str(own_model))
        with pytest.raises(SessionOver):
            run_session(address, num_tokens=100, on_result=service.terminate)  # the plan at work needs all ranks
        _, said = service.communicate(timeout=PATIENCE_S)
        assert service.returncode == 0
        assert not re.search("WARNING|ERROR|Traceback", said), said  # such as that one had to be killed
        assert not any(is_alive(pid) for pid in ranks)
