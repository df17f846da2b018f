"""The commands and outputs of clients/README.md, against the default model."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duet import LLM
from duet.client import DEFAULT_ADDRESS
from executor_service.weights.default_model import default_model, models_directory
from tests.e2e.system import PATIENCE_S, ROOT

BUF = ".venv/bin/buf"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    model = default_model(models_directory(os.environ))
    with LLM(str(model), device="cpu", max_num_seqs=1) as llm:
        yield llm.address


def documented_commands() -> list[tuple[str, str]]:
    """Every command of the README's console blocks with the output that is shown below it."""
    readme = (ROOT / "clients" / "README.md").read_text(encoding="utf-8")
    # A command goes on over the lines that are indented.
    return re.findall(r"^```console\n\$ (.*(?:\n .*)*)\n(?s:(.*?))^```$", readme, re.MULTILINE)


def test_readme_tells_how_to_list_methods_describe_the_model_and_generate() -> None:
    commands = [command for command, _ in documented_commands()]
    assert len(commands) == 3
    for command, name in zip(commands, ("--list-methods", "/GetModel", "/Generate"), strict=True):
        assert command.startswith(f"{BUF} curl --protocol grpc --http2-prior-knowledge --reflect ")
        assert name in command


def test_documented_commands_print_what_is_documented(address: str) -> None:
    for command, output in documented_commands():
        command = command.replace(BUF, shlex.quote(str(Path(sys.executable).with_name("buf"))))
        done = subprocess.run(
            command.replace(DEFAULT_ADDRESS, address),
            shell=True,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            timeout=PATIENCE_S,
            check=True,
        )
        assert content(done.stdout) == content(output)


def content(output: str) -> list[Any]:
    """Lines, or JSON messages without times; deltas are joined."""
    if not output.startswith("{"):
        return output.splitlines()
    messages: list[Any] = []
    while output:
        message, end = json.JSONDecoder(object_pairs_hook=without_times).raw_decode(output)
        output = output[end:].lstrip()
        if "delta" in message and "delta" in messages[-1]:
            messages[-1]["delta"]["tokenIds"] += message["delta"]["tokenIds"]
            messages[-1]["delta"]["text"] += message["delta"]["text"]
        else:
            messages.append(message)
    return messages


def without_times(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if not name.endswith("Ns")}
