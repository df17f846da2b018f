"""One server for all pages, as docs/learn/README.md starts it, and what runs the commands that they show."""

import contextlib
import importlib
import io
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import docs.learn.plans
from duet import LLM
from duet.cli.main import main
from executor_service.config import ExecutorConfig
from executor_service.runner.build import build_runner
from executor_service.runner.runner import Runner
from executor_service.weights.default_model import default_model, models_directory
from tests.docs.pages import page
from tests.e2e.system import System

Run = Callable[..., list[str]]


@pytest.fixture(scope="session")
def _docs_server() -> Iterator[System]:
    (flags,) = re.findall(r'^make run ARGS="(.*)"$', page("docs/learn/README.md").text, re.MULTILINE)
    words = shlex.split(flags)
    settings = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    model = default_model(models_directory(os.environ))
    # One thread, since more of them on cores that are busy wait for each other.
    with LLM(str(model), device="cpu", num_threads=1, **settings) as llm:
        system = System(llm.address)
        try:
            yield system
        finally:
            system.close()


@pytest.fixture
def docs_server(_docs_server: System) -> Iterator[System]:
    """A server of the default model, which holds no request after each test."""
    yield _docs_server
    _docs_server.wait_idle()


class _Output(io.TextIOBase):
    """A standard output for each thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def write(self, text: str) -> int:
        self._of_thread.text = getattr(self._of_thread, "text", "") + text
        return len(text)

    def take(self) -> str:
        text, self._of_thread.text = getattr(self._of_thread, "text", ""), ""
        return text


@pytest.fixture
def run(docs_server: System) -> Run:
    """What each of some commands of ours prints; they run in this process against the server, several at once."""
    output = _Output()

    def run_one(command: str) -> str:
        program, *args = shlex.split(command)
        if Path(program).name == "duet":
            assert main([*args, "--address", docs_server.address]) == 0
        else:
            assert (Path(program).name, args[0]) == ("python", "-m")
            learn = importlib.import_module(args[1])
            learn.main([*args[2:], *([docs_server.address] if hasattr(learn, "DEFAULT_ADDRESS") else [])])
        return output.take()

    def run(*commands: str) -> list[str]:
        with contextlib.redirect_stdout(output), ThreadPoolExecutor(4) as threads:
            return list(threads.map(run_one, commands))

    return run


@pytest.fixture(scope="session")
def _runners() -> Iterator[dict[ExecutorConfig, Runner]]:
    num_threads = torch.get_num_threads()
    yield {}
    torch.set_num_threads(num_threads)


@pytest.fixture
def one_runner(_runners: dict[ExecutorConfig, Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs that want a runner of the same settings have the same one, emptied."""

    def build(config: ExecutorConfig) -> Runner:
        if config not in _runners:
            _runners[config] = build_runner(config)
        _runners[config].reset()
        return _runners[config]

    monkeypatch.setattr(docs.learn.plans, "build_runner", build)
