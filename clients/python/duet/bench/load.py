"""A load on a server, spread over client processes, so that one Python interpreter does not set the pace.

The processes are spawned, since gRPC does not survive a fork. They prepare their requests, wait for a common start,
and while streams run note only when bytes came; what came is read after the last of them.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, Self

from duet.bench.metrics import Arrivals
from duet.bench.scenarios import Request, Scenario
from duet.errors import DuetError, StreamCut

LEAD_S = 0.5  # from the last process's readiness to the start, for connections to be made
_STREAMS_PER_PROCESS = 16
_MOST_PROCESSES = 8


class Session(Protocol):
    """A connected client; it belongs to one event loop."""

    async def stream(self, request: Request, begin: "asyncio.Future[float]") -> Callable[[], Arrivals]:
        """Prepare, await the load's beginning on perf_counter's clock, stream; what it returns reads what came.

        Raises: DuetError; so does what it returns.
        """
        ...


class Target(Protocol):
    """A server to be measured. It travels to the client processes."""

    async def connect(self) -> Session:
        """A session in the running loop. Raises: DuetError."""
        ...

    def describe(self) -> dict[str, Any]:
        """What runs there, as JSON: `model` and `server`. Raises: DuetError."""
        ...


class ClientProcesses:
    """Processes that keep their connection to the target between loads."""

    def __init__(self, target: Target, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._members: list[tuple[BaseProcess, Connection]] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(target, theirs), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def run(self, requests: Sequence[Request]) -> list[Arrivals]:
        """Send every request at its time and wait for the last token. Raises: DuetError, OSError."""
        pipes = [pipe for _, pipe in self._members]
        for index, pipe in enumerate(pipes):
            pipe.send(requests[index :: len(pipes)])
        for pipe in pipes:
            _receive(pipe)
        begin = time.perf_counter() + LEAD_S
        for pipe in pipes:
            pipe.send(begin)
        return [arrivals for pipe in pipes for arrivals in _receive(pipe)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
            process.join()


def run_scenario(
    target: Target,
    scenario: Scenario,
    *,
    seed: int,
    repeats: int,
    warm_up: int = 1,
    processes: int | None = None,
    vocab_size: int | None = None,
) -> list[list[Arrivals]]:
    """Run a scenario `warm_up` times for nothing and `repeats` times for its arrivals, each with prompts of its own.

    Another `seed` gives other prompts, of the same lengths. None: as many processes as the streams keep busy; all
    token ids of the scenarios. Raises: DuetError, OSError.
    """
    known = {} if vocab_size is None else {"vocab_size": vocab_size}
    runs: list[list[Arrivals]] = []
    with ClientProcesses(target, processes or default_processes(scenario.streams)) as clients:
        for number in range(warm_up + repeats):
            runs.append(clients.run(scenario.requests(f"{seed}/{number}", **known)))
    return runs[warm_up:]


def default_processes(streams: int) -> int:
    """Enough for the streams, within this machine's cores."""
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), -(-streams // _STREAMS_PER_PROCESS))


async def sleep_until(moment: float) -> None:
    """Sleep until perf_counter reaches `moment`."""
    await asyncio.sleep(max(moment - time.perf_counter(), 0))


def _receive(pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise StreamCut("a client process died") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(target: Target, pipe: Connection) -> None:
    """The life of a client process: a load for each list of requests, until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    with asyncio.Runner() as runner, contextlib.suppress(EOFError, BrokenPipeError):
        try:
            session = runner.run(target.connect())
            while True:
                pipe.send(runner.run(_run_load(session, pipe.recv(), pipe)))
        except (DuetError, OSError) as error:
            pipe.send(error)


async def _run_load(session: Session, requests: list[Request], pipe: Connection) -> list[Arrivals]:
    begin: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    streams = [asyncio.create_task(session.stream(request, begin)) for request in requests]
    await asyncio.sleep(0)  # each prepares its request
    gc.collect()
    gc.disable()  # a collection would be a gap of every stream
    pipe.send("ready")
    begin.set_result(pipe.recv())
    results = await asyncio.gather(*streams)
    gc.enable()
    return [read() for read in results]
