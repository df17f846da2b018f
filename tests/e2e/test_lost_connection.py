"""The connection between core and executor is lost, with a word or without one, and both of them live on."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duet import Client, SamplingParams
from duet.launch import wait_for_session
from tests.e2e.services import executor, free_addresses, scheduler
from tests.e2e.system import wait_until

PARAMS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPTS = [[number, 7, 9] for number in range(5, 9)]


class Wire:
    """Carries TCP connections to a target, those that were not lost."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._entrance = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._dead: set[socket.socket] = set()
        self.address = f"127.0.0.1:{self._entrance.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Have both ends told that the connections are gone."""
        for end in self._ends:
            with contextlib.suppress(OSError):  # it has ended by itself
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def swallow(self) -> None:
        """From here on nothing arrives of what was sent, and no end is told so: a cable was pulled."""
        self._dead.update(self._ends)

    def close(self) -> None:
        self._entrance.shutdown(socket.SHUT_RDWR)
        self.cut()

    def _accept(self) -> None:
        with self._entrance, contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._entrance.accept()
                host, port = self.target.split(":")
                try:
                    far = socket.create_connection((host, int(port)))
                except OSError:  # no executor yet
                    near.close()
                    continue
                self._ends += [near, far]
                for one, other in [(near, far), (far, near)]:
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with one, contextlib.suppress(OSError):  # either end may be cut at any time
            while data := one.recv(1 << 16):
                if one not in self._dead:
                    other.sendall(data)
            if one not in self._dead:
                other.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    wire = Wire(free_addresses(1)[0])
    yield wire
    wire.close()


@pytest.fixture(scope="module")
def address(wire: Wire, tiny_model: Path) -> Iterator[str]:
    """Of a scheduler whose executor is at the other end of the wire."""
    (address,) = free_addresses(1)
    with executor(tiny_model, wire.target), scheduler(tiny_model, address, wire.address):
        assert wait_for_session(address, lambda: False, 60)
        yield address


@pytest.mark.parametrize("lose", [Wire.cut, Wire.swallow])
def test_streams_outlive_the_connection_to_the_executor(address: str, wire: Wire, lose: Callable[[Wire], None]) -> None:
    with Client(address) as client, ThreadPoolExecutor(len(PROMPTS)) as threads:
        undisturbed = [client.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
        before = client.server()
        streams = [threads.submit(client.generate, prompt, PARAMS) for prompt in PROMPTS]
        wait_until(lambda: client.server().load.output_tokens_total > before.load.output_tokens_total + 40)
        lose(wire)
        outputs = [stream.result() for stream in streams]
        after = client.server()
    assert [output.token_ids for output in outputs] == undisturbed
    assert [output.recoveries for output in outputs] == [1] * len(PROMPTS)
    assert after.epoch == before.epoch + 1
    assert after.load.uptime_seconds > before.load.uptime_seconds, "the core lived on"
