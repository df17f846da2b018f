"""`duet serve --record` under requests of every kind, and `duet replay` of what it recorded, on another executor."""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

from duet import Client, Output, SamplingParams, StructuredOutputsParams
from duet.recording import Kind, RecordingWriter, read_recording
from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1.executor_pb2_grpc import ExecutorServiceStub
from tests.e2e.commands import duet, free_address, running
from tests.e2e.conftest import FLAGS
from tests.e2e.system import PATIENCE_S, ROOT

NUM_BLOCKS = 24  # of 16 tokens: too few for all requests at once
SHARED = list(range(5, 45))  # the beginning of every prompt: two blocks and a half
EXECUTOR_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | {"num_blocks": NUM_BLOCKS}).items()]
GREEDY = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1, seed=1),
    SamplingParams(temperature=1, seed=2, n=2, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(temperature=1, seed=3, logprobs=3, logit_bias={9: 2.0}),
    SamplingParams(temperature=1, seed=4, structured_outputs=StructuredOutputsParams(regex="[a-z ]{80}")),
    SamplingParams(temperature=1, seed=5, stop="e"),
]


def put_load(client: Client) -> None:
    """Requests that share a prefix, preempt each other and end in every way."""

    def generate(index: int) -> None:
        params = dataclasses.replace(REQUESTS[index], max_tokens=90, ignore_eos=index % 2 == 0)
        client.generate([*SHARED, index], params, timeout_s=PATIENCE_S)

    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        list(threads.map(generate, range(len(REQUESTS))))
    load = client.server().load
    assert load.preemptions_total > 0
    assert load.cached_tokens_total > 0


def kill_recorder(serve: "subprocess.Popen[bytes]") -> None:
    children = Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split()
    (pid,) = [pid for pid in children if b"record" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def recording(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of every kind, and one during which the recorder dies: its stream must go on, and the recording too."""
    path, address = tmp_path_factory.mktemp("recordings") / "session", free_address()
    addresses = ["--listen", address, "--executor-listen", free_address()]
    with running("serve", str(tiny_model), *addresses, *EXECUTOR_FLAGS, "--record", str(path)) as serve:
        assert serve.stdout is not None
        assert any(b"Ready" in line for line in serve.stdout)
        with Client(address) as client:
            put_load(client)
            undisturbed = client.generate(SHARED, GREEDY)
            stream = client.stream(SHARED, GREEDY)
            events = list(itertools.islice(stream, 3))
            kill_recorder(serve)
            assert Output.of([*events, *stream]).token_ids == undisturbed.token_ids
        serve.send_signal(signal.SIGINT)
        assert serve.wait() == 0
    return path


@contextlib.contextmanager
def executor_of(model: Path) -> Iterator[str]:
    """An executor without a scheduler; yields its address."""
    address = free_address()
    command = [sys.executable, "-m", "executor_service", "--model", str(model), "--listen", address, *EXECUTOR_FLAGS]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
            yield address
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def executor(tiny_model: Path) -> Iterator[str]:
    with executor_of(tiny_model) as address:
        yield address


def replay(path: Path, executor: str, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status, and what is told of each session."""
    done = duet("replay", str(path), "--executor", executor, "--json", *flags)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)["sessions"]


@pytest.mark.parametrize("pace", ["fastest", "recorded"])
def test_a_replayed_session_samples_the_recorded_tokens(recording: Path, executor: str, pace: str) -> None:
    status, sessions = replay(recording, executor, "--pace", pace)
    assert [session["num_differences"] for session in sessions] == [0, 0]
    assert status == 0
    first, second = sessions
    assert first["num_tokens"] > first["num_steps"] > 100
    assert first["num_sequences"] > len(REQUESTS) + 1  # a preempted one takes a slot again
    assert second["num_tokens"] < GREEDY.max_tokens


def test_a_token_that_was_recorded_otherwise_is_found(recording: Path, executor: str, tmp_path: Path) -> None:
    records = read_recording(recording).records
    results = [index for index, one in enumerate(records) if one.kind is Kind.RESPONSE and one.session == 1]
    middle = results[len(results) // 2]
    response = pb.RunSessionResponse.FromString(records[middle].payload)
    token_ids = array("i", response.result.token_ids)
    token_ids[0] += 1
    response.result.token_ids = token_ids.tobytes()
    with RecordingWriter(tmp_path / "changed") as writer:
        for index, one in enumerate(records):
            payload = response.SerializeToString() if index == middle else one.payload
            writer.write(one.kind, one.session, payload)
    status, (first, _) = replay(tmp_path / "changed", executor)
    assert status == 1
    assert first["num_differences"] == 1
    difference = first["first_difference"]
    assert difference["step_id"] == response.result.step_id
    assert difference["recorded"]["token_id"] == difference["replayed"]["token_id"] + 1 == token_ids[0]


def test_other_weights_are_refused(recording: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with executor_of(other) as address:
        done = duet("replay", str(recording), "--executor", address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "duet: the executor's weights are not those that were recorded\n"


def test_an_executor_that_a_scheduler_has_is_refused_and_goes_on(recording: Path, executor: str) -> None:
    """Opening an epoch would take the executor away from it."""
    with grpc.insecure_channel(executor, options=[("grpc.enable_http_proxy", 0)]) as channel:
        requests: queue.SimpleQueue[pb.RunSessionRequest | None] = queue.SimpleQueue()
        responses: Any = ExecutorServiceStub(channel).RunSession(iter(requests.get, None))
        info = next(responses).info
        opening = pb.OpenSession(
            epoch=info.last_epoch + 1, protocol_version=info.protocol_version, model_digest=info.model_digest
        )
        requests.put(pb.RunSessionRequest(open=opening))
        next(responses)
        done = duet("replay", str(recording), "--executor", executor)
        assert done.returncode == 1
        assert "a scheduler has the executor" in done.stderr
        requests.put(None)
        assert list(responses) == []  # ended by us, in order
