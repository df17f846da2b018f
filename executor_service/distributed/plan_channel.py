"""The way of plans from rank 0 to all others: shared memory within its node, TCP to other nodes.

Both ends are opened by all ranks at the same time, over torch.distributed, and then need it no more.
"""

import dataclasses
import io
import secrets
import socket
from typing import Protocol

import torch.distributed as dist

from executor_service.distributed.placement import Placement
from executor_service.distributed.plan_ring import END, LENGTH, RingReader, RingWriter

_KEY_BYTES = 16
_MEET_S = 60.0  # between the offer and the last connection


@dataclasses.dataclass(frozen=True)
class _Offer:
    """What rank 0 tells the others."""

    node: int
    ring_name: str
    port: int
    key: bytes  # tells a rank from whoever else finds the port


class PlanReceiver(Protocol):
    """The end of any other rank."""

    def receive(self) -> bytes | None:
        """Wait for the next message; None when rank 0 has closed. Raises: ConnectionResetError, when it died."""
        ...

    def close(self) -> None:
        """Nothing is received after this."""
        ...


class PlanSender:
    """The end of rank 0."""

    def __init__(self, ring: RingWriter, connections: list[socket.socket]) -> None:
        self._ring = ring
        self._connections = connections

    def send(self, message: bytes) -> None:
        """Hand a message to every other rank; waits while one of them lags far behind. Raises: OSError."""
        self._ring.send(message)
        for connection in self._connections:
            connection.sendall(LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """Say that no message follows. Raises: OSError."""
        self._ring.close()
        for connection in self._connections:
            connection.sendall(END)
            connection.close()


class _TcpReceiver:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def receive(self) -> bytes | None:
        """See PlanReceiver."""
        length = _read(self._stream, LENGTH.size)
        return None if length == END else _read(self._stream, *LENGTH.unpack(length))

    def close(self) -> None:
        """See PlanReceiver."""
        self._stream.close()
        self._connection.close()


def open_sender(placement: Placement) -> PlanSender:
    """Rank 0's end, while the other ranks call `open_receiver`. Raises: OSError, TimeoutError, where one is missing."""
    ring = RingWriter(placement.local_size - 1)
    # On every address: a host name may mean another one here than it does elsewhere.
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=has_both) as server:
        offer = _Offer(placement.node, ring.name, server.getsockname()[1], secrets.token_bytes(_KEY_BYTES))
        dist.broadcast_object_list([offer])
        server.settimeout(_MEET_S)
        connections: list[socket.socket] = []
        while len(connections) < placement.size - placement.local_size:
            connection, _ = server.accept()
            if _is_rank(connection, offer.key):
                _set_up(connection)
                connections.append(connection)
            else:
                connection.close()
    dist.barrier()  # all have opened the ring
    return PlanSender(ring, connections)


def open_receiver(placement: Placement) -> PlanReceiver:
    """Another rank's end, while rank 0 calls `open_sender`. Raises: OSError."""
    offers: list[_Offer] = [None]  # pyright: ignore[reportAssignmentType]
    dist.broadcast_object_list(offers)
    (offer,) = offers
    if offer.node == placement.node:
        receiver = RingReader(offer.ring_name, placement.local_rank - 1)  # rank 0 is the first of its node
    else:
        connection = socket.create_connection((placement.master_addr, offer.port), _MEET_S)
        connection.sendall(offer.key)
        _set_up(connection)
        receiver = _TcpReceiver(connection)
    dist.barrier()
    return receiver


def _is_rank(connection: socket.socket, key: bytes) -> bool:
    connection.settimeout(1.0)
    try:
        with connection.makefile("rb") as stream:
            return secrets.compare_digest(stream.read(_KEY_BYTES), key)
    except OSError:
        return False


def _set_up(connection: socket.socket) -> None:
    """Wait for ever, send at once, and notice within half a minute that the other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)


def _read(stream: io.BufferedReader, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise ConnectionResetError("rank 0 has died")
    return data
