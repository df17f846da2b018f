"""When a request that found no server, or a full queue, is sent again."""

import dataclasses
import random
import time

from duet.errors import DuetError, QueueFull, Unavailable

_MAX_LATENESS = 0.25  # of the server's delay, so that clients that it sent away together do not come back together


@dataclasses.dataclass(frozen=True)
class Retry:
    """How often and how patiently. Only a request of which no event has come is sent again.

    Delays double from `first_delay_s` to `max_delay_s`, each shortened by up to half at random; a delay that the
    server names wins, never shortened. No delay goes beyond the request's timeout.
    """

    max_attempts: int = 4  # the first one included
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    waits_for_queue: bool = False  # whether a full queue is no attempt, so that the request waits for a place in it


class Attempts:
    """The attempts of one request."""

    def __init__(self, retry: Retry | None, timeout_s: float | None) -> None:
        """`retry` None: there is one attempt. `timeout_s` is for all of them and the delays between them."""
        self._retry = retry
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._num_failures = 0
        self._num_attempts = 0  # that failed and count

    def remaining_s(self) -> float | None:
        """The timeout of the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def delay_s(self, error: DuetError) -> float | None:
        """Seconds until the next attempt, now that one ended with `error`; None: there is none."""
        retry = self._retry
        if retry is None or not isinstance(error, QueueFull | Unavailable):
            return None
        self._num_failures += 1
        self._num_attempts += not (retry.waits_for_queue and isinstance(error, QueueFull))
        if self._num_attempts >= retry.max_attempts:
            return None
        if error.retry_after_s is not None:
            delay_s = error.retry_after_s * random.uniform(1, 1 + _MAX_LATENESS)
        else:
            doublings = min(self._num_failures - 1, 30)
            delay_s = min(retry.first_delay_s * 2**doublings, retry.max_delay_s) * random.uniform(0.5, 1)
        remaining_s = self.remaining_s()
        return delay_s if remaining_s is None or delay_s < remaining_s else None
