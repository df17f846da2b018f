"""Letting the requests that are there end, and taking no others."""

import dataclasses
from collections.abc import Callable

from scheduler_service.core.request_pool import RequestPool
from scheduler_service.errors import ServerDraining
from scheduler_service.ipc import DrainReply


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A call that is answered when no request is left."""

    call: int
    send: Callable[[DrainReply], None]
    finished_before: int
    cut_before: int
    ends_at: float | None  # time.monotonic() seconds; None: whenever


class Drain:
    """Whether the core drains, and who waits for the end of it."""

    def __init__(self, pool: RequestPool) -> None:
        self._pool = pool
        self._waiting: list[_Waiting] = []
        self._num_cut = 0

    def begin(self, call: int, limit_s: float | None, send: Callable[[DrainReply], None]) -> None:
        """Refuse new requests; `send` hears when none is left, at the latest after `limit_s` seconds."""
        self._pool.is_draining = True
        ends_at = None if limit_s is None else self._pool.clock() + limit_s
        finished = self._pool.counters.finished_requests - self._num_cut
        self._waiting.append(_Waiting(call, send, finished, self._num_cut, ends_at))

    def cancel(self) -> None:
        """Take requests again; whoever waits hears so."""
        self._pool.is_draining = False
        self._answer_all()

    def enforce(self, now: float) -> None:
        """End what is left at a limit; `now` in time.monotonic() seconds."""
        if any(waiting.ends_at is not None and waiting.ends_at <= now for waiting in self._waiting):
            for request in list(self._pool.requests.values()):
                self._num_cut += 1
                self._pool.fail(request, ServerDraining("the server is draining, and the time for it is up"))

    def answer(self) -> None:
        """Tell those who wait, if no request is left."""
        if self._waiting and not self._pool.requests:
            self._answer_all()

    def _answer_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        finished = self._pool.counters.finished_requests - self._num_cut
        for one in waiting:
            one.send(DrainReply(one.call, finished - one.finished_before, self._num_cut - one.cut_before))
