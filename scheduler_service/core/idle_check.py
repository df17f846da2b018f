"""The core looks for leaks whenever it has nothing better to do."""

import logging

from scheduler_service.core.request_pool import RequestPool

IDLE_S = 1.0  # without a living request, before a look that takes milliseconds where there are many blocks

log = logging.getLogger(__name__)


class IdleCheck:
    """Counts looks and leaks for `duet status`."""

    def __init__(self, pool: RequestPool) -> None:
        self._pool = pool
        self._idle_since: float | None = None  # time.monotonic() seconds; None: busy, or looked at since
        self._seen = (0, 0)  # losses of an executor and ended requests at the last look

    def work(self, now: float) -> None:
        """Look, once after each time of work; `now` in time.monotonic() seconds."""
        pool, counters = self._pool, self._pool.counters
        seen = (counters.executor_losses, counters.finished_requests)
        if pool.epoch is None or pool.requests or pool.epoch.num_plans_in_flight or seen == self._seen:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= IDLE_S:
            self._idle_since, self._seen = None, seen
            self._look()

    def _look(self) -> None:
        assert self._pool.epoch is not None
        try:
            self._pool.check_idle()
            self._pool.epoch.check_idle()
            self._pool.counters.idle_checks += 1
        except AssertionError:
            self._pool.counters.idle_check_failures += 1
            log.exception("the core is idle, and not everything is in order")
