"""What all tests share."""

import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# No test asserts a time, and a slow machine must not fail one.
hypothesis.settings.register_profile("duet", deadline=None, print_blob=True)
hypothesis.settings.load_profile("duet")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Directory of the default model, fetched and converted at its first use on this machine."""
    command = [sys.executable, "-m", "executor_service.weights.default_model"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())
