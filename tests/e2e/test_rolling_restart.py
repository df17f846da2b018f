"""Executors that take over from each other while streams run."""

import contextlib
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duet import Client, SamplingParams
from duet.launch import wait_for_session
from tests.e2e.services import executor, free_addresses, listens, scheduler
from tests.e2e.system import wait_until

PARAMS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPTS = [[number, 7, 9] for number in range(5, 9)]


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
    address, first, second, other = free_addresses(4)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(executor(tiny_model, first))
        stack.enter_context(scheduler(tiny_model, address, first, other, second))
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
