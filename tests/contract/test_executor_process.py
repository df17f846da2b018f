"""The executor service as a process."""

import subprocess
import sys
from pathlib import Path

from servicekit.supervisor import EXIT_GAVE_UP

ROOT = Path(__file__).parents[2]


def test_a_model_that_cannot_be_served_ends_the_service_at_once_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "executor_service", "--model", str(tmp_path), "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == EXIT_GAVE_UP
    # One attempt, and no traceback.
    reason, verdict = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert str(tmp_path / "config.json") in reason
    assert "giving up" in verdict


def test_the_supervisor_of_the_executor_does_not_import_torch() -> None:
    script = "import sys, executor_service.__main__; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=100)
