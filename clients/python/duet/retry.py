"""When a request is sent again: one that found no server or a full queue, and one whose stream broke."""

import dataclasses
import random
import time

import grpc

from duet.errors import DuetError, InternalError, QueueFull, StreamCut, Unavailable

MAX_BREAKS = 10

_FIRST_RESUMPTION_S, _MAX_RESUMPTION_S = 0.1, 1.0
_MAX_LATENESS = 0.25  # of the server's delay, so that clients that it sent away together do not come back together


@dataclasses.dataclass(frozen=True)
class Retry:
    """How often and how patiently. Only a request of which no event has come is sent again.

    A request with `detach_seconds` is sent again for that long instead, whatever has come; see Client.

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
        self._has_begun = False

    def remaining_s(self) -> float | None:
        """The timeout of the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def hear(self, *, is_new: bool) -> None:
        """The server sent an event; `is_new`: not in an earlier attempt."""
        self._has_begun = True

    def delay_s(self, error: DuetError) -> float | None:
        """Seconds until the next attempt, now that one ended with `error`; None: there is none."""
        retry = self._retry
        if retry is None or self._has_begun or not isinstance(error, QueueFull | Unavailable):
            return None
        self._num_failures += 1
        self._num_attempts += not (retry.waits_for_queue and isinstance(error, QueueFull))
        if self._num_attempts >= retry.max_attempts:
            return None
        return self._within_timeout(_delay_s(error, self._num_failures, retry.first_delay_s, retry.max_delay_s))

    def _within_timeout(self, delay_s: float) -> float | None:
        remaining_s = self.remaining_s()
        return delay_s if remaining_s is None or delay_s < remaining_s else None


class Resumptions(Attempts):
    """The attempts of a request that outlives its connection.

    There is another one until the server has been silent for `detach_s` since an attempt failed: by then it has
    forgotten the request. Nor is there one after `MAX_BREAKS` streams that broke since anything new came: it may be the
    request that breaks the server.
    """

    def __init__(self, detach_s: float, retry: Retry | None, timeout_s: float | None) -> None:
        """Of `retry` counts here whether a full queue is waited for."""
        super().__init__(retry, timeout_s)
        self._waits_for_queue = retry is not None and retry.waits_for_queue
        self._detach_s = detach_s
        self._silent_since: float | None = None  # time.monotonic() seconds; None: no attempt failed since it spoke
        self._num_breaks = 0  # since anything new came
        self._has_spoken = False  # in this attempt

    def hear(self, *, is_new: bool) -> None:
        """The server sent an event; `is_new`: not in an earlier attempt."""
        self._has_spoken = True
        self._silent_since = None
        if is_new:
            self._num_breaks = self._num_failures = 0

    def delay_s(self, error: DuetError) -> float | None:
        """Seconds until the next attempt, now that one ended with `error`; None: there is none."""
        if not isinstance(error, QueueFull | Unavailable | StreamCut) and not _is_broken_connection(error):
            return None
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        self._num_failures += 1
        self._num_breaks += self._has_spoken
        self._has_spoken = False
        delay_s = _delay_s(error, self._num_failures, _FIRST_RESUMPTION_S, _MAX_RESUMPTION_S)
        if self._waits_for_queue and isinstance(error, QueueFull):
            return self._within_timeout(delay_s)
        if self._num_breaks >= MAX_BREAKS or now + delay_s > self._silent_since + self._detach_s:
            return None
        return self._within_timeout(delay_s)


def _delay_s(error: DuetError, num_failures: int, first_s: float, max_s: float) -> float:
    if error.retry_after_s is not None:
        return error.retry_after_s * random.uniform(1, 1 + _MAX_LATENESS)
    doublings = min(num_failures - 1, 30)
    return min(first_s * 2**doublings, max_s) * random.uniform(0.5, 1)


def _is_broken_connection(error: DuetError) -> bool:
    """Whether it is gRPC's own way to say so, instead of UNAVAILABLE; what a server says has a reason."""
    codes = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return isinstance(error, InternalError) and error.reason is None and error.code in codes
