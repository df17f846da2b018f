"""The executor service: keeps its rank alive. Imports no torch, so that it is up at once."""

import sys

from executor_service.config import ExecutorConfig
from servicekit.settings import parse, to_argv
from servicekit.supervisor import Child, supervise


def main() -> int:
    """Run until a signal; returns the exit status."""
    config = parse(ExecutorConfig, None, prog="python -m executor_service", description="Runs a model's step plans.")
    rank = Child("rank 0", [sys.executable, "-m", "executor_service.rank", *to_argv(config)])
    return supervise("executor", [rank])


if __name__ == "__main__":
    sys.exit(main())
