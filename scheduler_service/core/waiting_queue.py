"""The waiting queue and the orders in which it admits."""

import bisect
from collections.abc import Callable, Iterator

from scheduler_service.core.request import Request

Order = Callable[[Request], tuple[int, ...]]
"""Sort key of a waiting request, smallest first, taken when it is queued. Ties go to the earlier arrival."""


def first_come_first_served(request: Request) -> tuple[int, ...]:
    """By arrival; a preempted request keeps its place."""
    return (request.arrival,)


def priority(request: Request) -> tuple[int, ...]:
    """By the client's priority, lower first."""
    return (request.priority, request.arrival)


def shortest_remaining_first(request: Request) -> tuple[int, ...]:
    """By the tokens still to be computed: uncomputed prompt + max_tokens - generated.

    Source: shortest remaining processing time, Schrage 1968; a long request may wait as long as shorter ones come.
    """
    return (request.max_total_tokens - request.num_output_tokens, request.arrival)


ORDERS: dict[str, Order] = {
    "fcfs": first_come_first_served,
    "priority": priority,
    "shortest-remaining": shortest_remaining_first,
}


class WaitingQueue:
    """The waiting requests, sorted by the order's key."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._entries: list[tuple[tuple[int, ...], Request]] = []  # keys end with the arrival, so they are unique
        self._keys: dict[Request, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._keys)

    def push(self, request: Request) -> None:
        """Add a request that is not in the queue."""
        assert request not in self._keys
        self._keys[request] = self._order(request)
        bisect.insort(self._entries, (self._keys[request], request))

    def peek(self) -> Request | None:
        """The next request to admit, or None."""
        return self._entries[0][1] if self._entries else None

    def pop(self) -> Request:
        """Remove and return what peek shows."""
        request = self._entries.pop(0)[1]
        del self._keys[request]
        return request

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        key = self._keys.pop(request)
        del self._entries[bisect.bisect_left(self._entries, key, key=lambda entry: entry[0])]
