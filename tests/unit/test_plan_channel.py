"""The way of plans to ranks of rank 0's node and of others. Threads stand for ranks, a fake for torch.distributed."""

import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from executor_service.distributed import plan_channel
from executor_service.distributed.placement import Placement
from executor_service.distributed.plan_channel import PlanReceiver, PlanSender, open_receiver, open_sender
from executor_service.distributed.plan_ring import RingReader

# Two ranks on each of two nodes.
PLACEMENTS = [Placement(rank, 4, local_rank=rank % 2, local_size=2, node=rank // 2) for rank in range(4)]


class FakeDistributed:
    """Collectives of threads; `on_offer` is called with what rank 0 offers, before the others get it."""

    def __init__(self) -> None:
        self.on_offer: Callable[[plan_channel._Offer], None] = lambda offer: None
        self._offers: queue.SimpleQueue[plan_channel._Offer] = queue.SimpleQueue()
        self.barrier = threading.Barrier(len(PLACEMENTS), timeout=30).wait

    def broadcast_object_list(self, objects: list[plan_channel._Offer]) -> None:
        (offer,) = objects
        if offer is None:
            objects[0] = self._offers.get(timeout=30)
            return
        self.on_offer(offer)
        for _ in PLACEMENTS[1:]:
            self._offers.put(offer)


@pytest.fixture
def distributed(monkeypatch: pytest.MonkeyPatch) -> FakeDistributed:
    fake = FakeDistributed()
    monkeypatch.setattr(plan_channel, "dist", fake)
    return fake


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(len(PLACEMENTS)) as threads:
        yield threads


def open_all(threads: ThreadPoolExecutor) -> tuple[PlanSender, list[PlanReceiver]]:
    sender = threads.submit(open_sender, PLACEMENTS[0])
    receivers = [threads.submit(open_receiver, placement) for placement in PLACEMENTS[1:]]
    return sender.result(), [receiver.result() for receiver in receivers]


def receive_all(receiver: PlanReceiver) -> list[bytes]:
    messages = list(iter(receiver.receive, None))
    receiver.close()
    return messages


def test_ranks_of_every_node_get_all_messages_in_order(
    distributed: FakeDistributed, threads: ThreadPoolExecutor
) -> None:
    rng = random.Random(0)
    messages = [rng.randbytes(length) for length in (45, 0, 1, 5_000_000, 0, 200)]
    sender, receivers = open_all(threads)
    assert [isinstance(receiver, RingReader) for receiver in receivers] == [True, False, False]
    received = [threads.submit(receive_all, receiver) for receiver in receivers]
    for message in messages:
        sender.send(message)
    sender.close()
    assert [future.result() for future in received] == [messages] * 3


def test_the_loss_of_rank_0_is_no_end(distributed: FakeDistributed, threads: ThreadPoolExecutor) -> None:
    sender, (beside, *elsewhere) = open_all(threads)
    sender.send(b"plan")
    for connection in sender._connections:
        connection.sendall(b"\7\0\0\0half")
        connection.close()
    for receiver in elsewhere:
        assert receiver.receive() == b"plan"
        with pytest.raises(ConnectionResetError):
            receiver.receive()
        receiver.close()
    sender._ring.close()
    assert receive_all(beside) == [b"plan"]


def test_who_does_not_know_the_key_is_no_rank(distributed: FakeDistributed, threads: ThreadPoolExecutor) -> None:
    strangers: list[socket.socket] = []

    def intrude(offer: plan_channel._Offer) -> None:
        for said in (bytes(16), b"GET", b""):  # a wrong key, too little, and a silent one
            stranger = socket.create_connection(("127.0.0.1", offer.port))
            stranger.sendall(said)
            strangers.append(stranger)
        strangers[1].shutdown(socket.SHUT_WR)

    distributed.on_offer = intrude
    sender, receivers = open_all(threads)
    received = [threads.submit(receive_all, receiver) for receiver in receivers]
    sender.send(b"plan")
    sender.close()
    assert [future.result() for future in received] == [[b"plan"]] * 3
    for stranger in strangers:
        assert stranger.recv(16) == b""
        stranger.close()


def test_a_rank_that_does_not_come_is_not_awaited_for_ever(
    distributed: FakeDistributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_channel, "_MEET_S", 0.2)
    with pytest.raises(TimeoutError):
        open_sender(PLACEMENTS[0])
