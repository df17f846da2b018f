"""The queue and its three orders."""

import random

import pytest

from scheduler_service.core.request import Request
from scheduler_service.core.waiting_queue import (
    ORDERS,
    WaitingQueue,
    first_come_first_served,
    priority,
    shortest_remaining_first,
)
from tests.unit.core_harness import new_request


def arrived(arrival: int, *, prompt: int = 4, max_tokens: int = 4, rank: int = 0, generated: int = 0) -> Request:
    request = new_request(f"request-{arrival}", range(prompt), max_tokens, priority=rank)
    request.arrival = arrival
    request.token_ids.extend(range(generated))
    return request


def drained(queue: WaitingQueue) -> list[int]:
    order = []
    while queue.peek() is not None:
        order.append(queue.pop().arrival)
    return order


def test_first_come_is_first_served_and_a_preempted_request_keeps_its_place():
    queue = WaitingQueue(first_come_first_served)
    for arrival in (5, 3, 9):
        queue.push(arrived(arrival))
    assert queue.pop().arrival == 3
    queue.push(arrived(1, generated=3))
    assert drained(queue) == [1, 5, 9]


def test_lower_priority_values_are_served_first_and_ties_by_arrival():
    queue = WaitingQueue(priority)
    for arrival, rank in ((1, 2), (2, -1), (3, 0), (4, -1), (5, 2)):
        queue.push(arrived(arrival, rank=rank))
    assert drained(queue) == [2, 4, 3, 1, 5]


def test_the_shortest_remaining_is_served_first_counting_prompt_and_tokens_still_to_come():
    queue = WaitingQueue(shortest_remaining_first)
    queue.push(arrived(1, prompt=10, max_tokens=10))  # 20 to compute
    queue.push(arrived(2, prompt=2, max_tokens=19))  # 21
    queue.push(arrived(3, prompt=10, max_tokens=20, generated=11))  # 10 + 20 - 11 = 19
    queue.push(arrived(4, prompt=18, max_tokens=2))  # 20, later than the first
    assert drained(queue) == [3, 1, 4, 2]


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_the_queue_serves_by_key_whatever_was_taken_out_of_its_middle(order: str):
    rng = random.Random(order)
    queue, members = WaitingQueue(ORDERS[order]), list[Request]()
    for arrival in range(1, 2000):
        if members and rng.random() < 0.5:
            request = rng.choice(members)
            if rng.random() < 0.5:
                queue.remove(request)
            else:
                request = queue.pop()
                assert request is min(members, key=ORDERS[order])
            members.remove(request)
        else:
            members.append(arrived(arrival, max_tokens=rng.randint(1, 9), rank=rng.randint(0, 3)))
            queue.push(members[-1])
        assert len(queue) == len(members)
    assert set(queue) == set(members)
    assert drained(queue) == [request.arrival for request in sorted(members, key=ORDERS[order])]


def test_an_empty_queue_shows_nothing():
    queue = WaitingQueue(first_come_first_served)
    assert queue.peek() is None
    request = arrived(1)
    queue.push(request)
    queue.remove(request)
    assert queue.peek() is None
    assert len(queue) == 0
