"""Starts the scheduler service and the executor service on this machine, both from this Python environment."""

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence

from duet.client import Client
from duet.errors import StartFailed, Unavailable
from servicekit.supervisor import Child, Supervisor

# The flags of `python -m scheduler_service` that may be passed on; all others are the executor's. The services'
# own settings cannot be asked: a client imports neither service.
SCHEDULER_FLAGS = frozenset(
    {
        "model-name",
        "num-frontends",
        "core-socket",
        "queue-order",
        "max-waiting",
        "max-inflight-steps",
        "max-decode-stall-ms",
        "max-pause-s",
    }
)

_LOG_TAIL_BYTES = 4096
_POLL_S = 0.1
_SESSION_TIMEOUT_S = 60.0  # from both services listening to an open session between them


def service_children(
    model: str, listen: str, executor_listen: str, flags: Sequence[str], *, output: int | None = None
) -> list[Child]:
    """Both services, ready for a supervisor.

    `flags` are those of either service; `output` is a file descriptor for all that they print (None: our own).
    """
    scheduler_flags, executor_flags = split_flags(flags)
    services = {
        "executor": ["executor_service", "--listen", executor_listen, *executor_flags],
        "scheduler": ["scheduler_service", "--listen", listen, "--executor", executor_listen, *scheduler_flags],
    }
    return [
        Child(name, [sys.executable, "-m", module, "--model", model, *argv], output=output)
        for name, (module, *argv) in services.items()
    ]


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part flags, each with its values, into the scheduler's and the executor's."""
    scheduler: list[str] = []
    executor: list[str] = []
    target = executor
    for word in flags:
        if word.startswith("--"):
            target = scheduler if word[2:].partition("=")[0] in SCHEDULER_FLAGS else executor
        target.append(word)
    return scheduler, executor


def to_flags(settings: Mapping[str, object]) -> list[str]:
    """Keyword arguments as flags: num_blocks=512 becomes --num-blocks=512, True a flag alone; None and False none."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


def wait_for_session(address: str, stopped: threading.Event, timeout_s: float | None = None) -> bool:
    """Wait until the server at `address` has an executor; False when `stopped` is set or the time is up first."""
    deadline = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    with Client(address) as client:
        while not stopped.is_set() and time.monotonic() < deadline:
            try:
                if client.server().ready:
                    return True
            except Unavailable:
                pass  # its port does not listen yet, or again: asked once more below
            stopped.wait(_POLL_S)
    return False


class LocalServer:
    """Both services as children of this process, on loopback ports of their own; they die with it, however it dies."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        """Start the services; they are ready only when `wait_until_ready` returns."""
        self._log = tempfile.TemporaryFile()  # without a name, so that it ends with the last process that holds it
        port, executor_port = _free_ports(2)
        self.address = f"127.0.0.1:{port}"
        children = service_children(model, self.address, f"127.0.0.1:{executor_port}", flags, output=self._log.fileno())
        self._listening, self._ended, self._stop = threading.Event(), threading.Event(), threading.Event()
        supervisor = Supervisor(children, on_ready=self._listening.set)
        # The children live as long as the thread that starts them, so it lasts until `close`.
        self._thread = threading.Thread(target=self._supervise, args=(supervisor,), name="duet-supervisor", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait until requests are served. Raises: StartFailed, with the end of the services' log."""
        while not self._listening.wait(_POLL_S):
            if self._ended.is_set():
                raise StartFailed(f"the services ended before they were ready:\n{self._log_tail()}")
        if not wait_for_session(self.address, self._ended, _SESSION_TIMEOUT_S):
            raise StartFailed(f"the scheduler found no executor:\n{self._log_tail()}")

    def close(self) -> None:
        """Stop the services and wait for their end; the second time, nothing happens."""
        self._stop.set()
        self._thread.join()
        self._log.close()

    def _supervise(self, supervisor: Supervisor) -> None:
        try:
            supervisor.run(self._stop)
        finally:
            self._ended.set()

    def _log_tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        # By pread, since the services write at the same file's position.
        end = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, max(size - _LOG_TAIL_BYTES, 0))
        return end.decode(errors="replace").strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()
