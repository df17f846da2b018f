"""The executor service: keeps its ranks alive. Imports no torch, so that it is up at once."""

import contextlib
import socket
import sys
from collections.abc import Iterator

from executor_service.config import ExecutorConfig
from executor_service.distributed.placement import local_environments
from servicekit.child_process import Child
from servicekit.settings import parse, to_argv
from servicekit.supervisor import supervise


def main() -> int:
    """Run until a signal; returns the exit status."""
    config = parse(ExecutorConfig, None, prog="python -m executor_service", description="Runs a model's step plans.")
    size = config.tensor_parallel_size
    if size == 1:
        return _supervise_ranks(config, [{}])
    with _held_port() as port:
        return _supervise_ranks(config, local_environments(size, port))


def _supervise_ranks(config: ExecutorConfig, environments: list[dict[str, str]]) -> int:
    argv = [sys.executable, "-m", "executor_service.rank", *to_argv(config)]
    # torch then asks for huge pages, which weights that are read from end to end in every step gain from.
    common = {"THP_MEM_ALLOC_ENABLE": "1"}
    ranks = [Child(f"rank {rank}", argv, common | environment) for rank, environment in enumerate(environments)]
    return supervise("executor", ranks, together=True, hang_timeout_s=config.hang_timeout_s)


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """A port where ranks can meet at every start: bound here, it is given to nobody else who asks for a free one.

    Rank 0 can listen on it all the same, since its socket has SO_REUSEADDR too and this one does not listen.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
