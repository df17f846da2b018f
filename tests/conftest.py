"""What all tests share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported, which any test may do

# No test asserts a time, and a slow machine must not fail one.
hypothesis.settings.register_profile("duet", deadline=None, print_blob=True)
hypothesis.settings.load_profile("duet")


TOLD = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts that belong into the summary of a run that passes, too."""
    return request.config.stash.setdefault(TOLD, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(TOLD, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Directory of the default model, fetched and converted at its first use on this machine."""
    command = [sys.executable, "-m", "executor_service.weights.default_model"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())
