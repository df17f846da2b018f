"""The executor service: keeps its rank alive. Imports no torch, so that it is up at once."""

import sys

from executor_service.config import ExecutorConfig
from servicekit.settings import parse, to_argv
from servicekit.supervisor import Child, supervise


def main() -> int:
    """Run until a signal; returns the exit status."""
    config = parse(ExecutorConfig, None, prog="python -m executor_service", description="Runs a model's step plans.")
    # torch then asks for huge pages, which weights that are read from end to end in every step gain from.
    environment = {"THP_MEM_ALLOC_ENABLE": "1"}
    rank = Child("rank 0", [sys.executable, "-m", "executor_service.rank", *to_argv(config)], environment)
    return supervise("executor", [rank])


if __name__ == "__main__":
    sys.exit(main())
