"""The two services as processes of their own, each with an address that the test chooses."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.conftest import FLAGS

Process = subprocess.Popen[bytes]


def free_addresses(count: int) -> list[str]:
    """Addresses at which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def listens(address: str) -> bool:
    """Whether somebody does."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def executor(model: Path, address: str) -> contextlib.AbstractContextManager[Process]:
    """The executor service for as long as the context is open."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    return _running("executor_service", "--model", str(model), "--listen", address, "--num-blocks=512", *flags)


def scheduler(model: Path, address: str, *executors: str) -> contextlib.AbstractContextManager[Process]:
    """The scheduler service, which uses the first of the `executors` that serves."""
    flags = ["--model", str(model), "--listen", address, "--executor", ",".join(executors)]
    return _running("scheduler_service", *flags)


@contextlib.contextmanager
def _running(module: str, *flags: str) -> Iterator[Process]:
    process = subprocess.Popen([sys.executable, "-m", module, *flags])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
