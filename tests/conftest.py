"""What all tests share."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from tests.golden.oracle import Oracle

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported, which any test may do

# What a shell starts in the background ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a time, and a slow machine must not fail one.
hypothesis.settings.register_profile("duet", deadline=None, print_blob=True)
hypothesis.settings.load_profile("duet")

ROOT = Path(__file__).parents[1]
TOLD = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="more rounds of kills and more random runs: minutes more")


@pytest.fixture(scope="session")
def is_thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to take the time for as many rounds as the documents speak of."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts that belong into the summary of a run that passes, too."""
    return request.config.stash.setdefault(TOLD, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(TOLD, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> "Oracle":
    """The oracle for the default model, which is fetched and converted at its first use on this machine."""
    from executor_service.weights.default_model import default_model, models_directory
    from tests.golden.oracle import Oracle  # transformers takes seconds to import, and few tests need it

    return Oracle(default_model(models_directory(os.environ)), tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="session", autouse=True)
def compilers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, "subprocess.Popen[bytes]"]]:
    """Processes that compile the kernels of two dtypes, by what they write to; none where no test wants `variants`.

    They begin with the session, since many tests before those of the kernels leave a core idle.
    """
    is_wanted = any("variants" in getattr(item, "fixturenames", ()) for item in request.session.items)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    directory = tmp_path_factory.mktemp("compiled")
    processes: dict[Path, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        for dtype in ("bfloat16", "float32") if is_wanted else ():
            command = ["nice", sys.executable, "-m", "tests.kernels.gpu.compile_sm90", dtype]
            path = directory / dtype
            with path.open("wb") as output, path.with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=log)
            processes[path] = stack.enter_context(process)
            stack.callback(process.kill)
        yield processes
