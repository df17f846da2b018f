"""Executors that take over from each other while streams run."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duet import Client, SamplingParams
from duet.launch import wait_for_session
from tests.e2e.conftest import FLAGS
from tests.e2e.system import wait_until

PARAMS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPTS = [[number, 7, 9] for number in range(5, 9)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def running(module: str, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-m", module, *flags])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def executor(model: Path, address: str) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    return running("executor_service", "--model", str(model), "--listen", address, "--num-blocks=512", *flags)


@pytest.fixture
def other_weights(tiny_model: Path, tmp_path: Path) -> Path:
    """The same model, trained a little further."""
    directory = tmp_path / "other"
    shutil.copytree(tiny_model, directory)
    weights = load_file(directory / "model.safetensors")
    weights = {name: torch.nextafter(tensor, tensor + 1) for name, tensor in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_streams_go_on_while_executors_of_the_same_weights_replace_each_other(
    tiny_model: Path, other_weights: Path
) -> None:
    port, *executor_ports = free_ports(4)
    address, (first, second, other) = f"127.0.0.1:{port}", [f"127.0.0.1:{number}" for number in executor_ports]
    scheduler_flags = ["--model", str(tiny_model), "--listen", address, "--executor", f"{first},{other},{second}"]
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(executor(tiny_model, first))
        stack.enter_context(running("scheduler_service", *scheduler_flags))
        assert wait_for_session(address, lambda: False, 60)
        stack.enter_context(executor(tiny_model, second))
        stack.enter_context(executor(other_weights, other))
        wait_until(lambda: all(map(listens, (second, other))))
        with Client(address) as client, ThreadPoolExecutor(len(PROMPTS)) as threads:
            undisturbed = [client.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
            done = client.server().load.output_tokens_total
            streams = [threads.submit(client.generate, prompt, PARAMS) for prompt in PROMPTS]
            wait_until(lambda: client.server().load.output_tokens_total > done + 40)
            old.send_signal(signal.SIGTERM)
            outputs = [stream.result() for stream in streams]
            server = client.server()
        assert old.wait() == 0

    assert [output.token_ids for output in outputs] == undisturbed
    assert [output.recoveries for output in outputs] == [1] * len(PROMPTS)
    assert (server.ready, server.epoch) == (True, 2), "the executor of other weights was refused, the third one taken"


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
