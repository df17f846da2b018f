"""The waiting queue and the orders in which it admits."""

import heapq
from collections.abc import Callable, Iterator

from scheduler_service.core.request import Request

Order = Callable[[Request], tuple[int, ...]]
"""Sort key of a waiting request, smallest first, fixed while it waits. Ties go to the earlier arrival."""


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
    """A heap of requests; removal is lazy."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._heap: list[tuple[tuple[int, ...], Request]] = []
        self._members: set[Request] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def push(self, request: Request) -> None:
        """Add a request that is not in the queue."""
        assert request not in self._members
        self._members.add(request)
        heapq.heappush(self._heap, (self._order(request), request))

    def peek(self) -> Request | None:
        """The next request to admit, or None."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Remove and return what peek shows."""
        request = self.peek()
        assert request is not None
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        self._members.remove(request)
        if self._heap and self._heap[0][1] is request:
            heapq.heappop(self._heap)
