"""Starts the scheduler service and the executor service on this machine, both from this Python environment."""

import argparse
import contextlib
import math
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from duet.client import Client
from duet.errors import StartFailed, Unavailable
from servicekit.child_process import Child
from servicekit.supervisor import Stop, Supervisor

# The flags of `python -m scheduler_service` that may be passed on; all others are the executor's, and those of
# COMMON_FLAGS too. The services' own settings cannot be asked: a client imports neither service.
SCHEDULER_FLAGS = frozenset(
    {
        "model-name",
        "num-frontends",
        "core-socket",
        "admin-secret-file",
        "queue-order",
        "max-waiting",
        "max-inflight-steps",
        "max-decode-stall-ms",
        "step-timeout-s",
        "max-pause-s",
        "drain-s",
        "hang-timeout-s",
    }
)
COMMON_FLAGS = frozenset({"hang-timeout-s"})

_HANG_TIMEOUT_S = 10.0  # the services' own default
_LOG_TAIL_BYTES = 4096
_POLL_S = 0.1
_SESSION_TIMEOUT_S = 60.0  # from both services listening to an open session between them


def service_children(
    model: str,
    listen: str,
    executor_listen: str,
    flags: Sequence[str],
    *,
    record: str | None = None,
    output: int | None = None,
) -> list[Child]:
    """Both services, ready for a supervisor, and between them a recorder where there is a file `record` for it.

    `flags` are those of either service; `output` is a file descriptor for all that they print (None: our own).
    """
    scheduler_flags, executor_flags = split_flags(flags)
    command = (sys.executable, "-m")
    executor = [*command, "executor_service", "--model", model, "--listen", executor_listen, *executor_flags]
    recorders: list[Child] = []
    executor_address = executor_listen
    if record is not None:
        executor_address = f"127.0.0.1:{_free_ports(1)[0]}"
        recorder = [*command, "duet", "record", record, "--listen", executor_address, "--executor", executor_listen]
        recorders.append(Child("recorder", recorder, output=output, stops_after=["scheduler"]))
    scheduler = [*command, "scheduler_service", "--model", model, "--listen", listen, "--executor", executor_address]
    return [
        *recorders,
        # While streams drain they need the executor; how long they may, the scheduler service knows.
        Child("executor", executor, output=output, stops_after=["scheduler"]),
        Child("scheduler", [*scheduler, *scheduler_flags], output=output, drain_s=math.inf),
    ]


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part flags, each with its values, into the scheduler's and the executor's."""
    scheduler: list[str] = []
    executor: list[str] = []
    takers = [executor]
    for word in flags:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            takers = [scheduler] if name in SCHEDULER_FLAGS else [executor]
            if name in COMMON_FLAGS:
                takers = [scheduler, executor]
        for taker in takers:
            taker.append(word)
    return scheduler, executor


def hang_timeout_s(flags: Sequence[str]) -> float:
    """What --hang-timeout-s says among the services' flags, for who supervises them; 10 where it is not there.

    A value that the services refuse is theirs to refuse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hang-timeout-s", type=float, default=_HANG_TIMEOUT_S)
    try:
        value = parser.parse_known_args(flags)[0].hang_timeout_s
    except argparse.ArgumentError:
        return _HANG_TIMEOUT_S
    return value if value > 0 else _HANG_TIMEOUT_S


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


def wait_for_session(address: str, is_stopped: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Wait until the server at `address` has an executor; False when `is_stopped` or the time is up first."""
    deadline = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    with Client(address) as client:
        while not is_stopped() and time.monotonic() < deadline:
            with contextlib.suppress(Unavailable):  # its port does not listen yet, or again
                if client.server().ready:
                    return True
            time.sleep(_POLL_S)
    return False


class LocalServer:
    """Both services as children of this process, on loopback ports of their own; they die with it, however it dies."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        """Start the services; they are ready only when `wait_until_ready` returns."""
        self._log = tempfile.TemporaryFile()  # without a name, so that it ends with the last process that holds it
        port, executor_port = _free_ports(2)
        self.address = f"127.0.0.1:{port}"
        children = service_children(model, self.address, f"127.0.0.1:{executor_port}", flags, output=self._log.fileno())
        self._listening, self._ended, self._stop = threading.Event(), threading.Event(), Stop()
        supervisor = Supervisor(children, on_ready=self._listening.set, hang_timeout_s=hang_timeout_s(flags))
        # The children live as long as the thread that starts them, so it lasts until `close`.
        self._thread = threading.Thread(target=self._supervise, args=(supervisor,), name="duet-supervisor", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait until requests are served. Raises: StartFailed, with the end of the services' log."""
        while not self._listening.wait(_POLL_S):
            if self._ended.is_set():
                raise StartFailed(f"the services ended before they were ready:\n{self._log_tail()}")
        if not wait_for_session(self.address, self._ended.is_set, _SESSION_TIMEOUT_S):
            raise StartFailed(f"the scheduler found no executor:\n{self._log_tail()}")

    def close(self) -> None:
        """Stop the services at once and wait for their end; the second time, nothing happens."""
        self._stop.ask(at_once=True)
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
