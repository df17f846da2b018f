"""The ring of plans: nothing lost, nothing twice, everything in order, whatever the sizes and however slow a reader."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.distributed import plan_ring
from executor_service.distributed.plan_ring import RingReader, RingWriter

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE_S = 10
READERS = 3
# A process that reads all there is, at times slowly, and prints how many messages and the digest of all of them.
READ_ALL = """
import hashlib, random, sys, time
from executor_service.distributed.plan_ring import RingReader
reader, digest, count = RingReader(sys.argv[1], int(sys.argv[2])), hashlib.sha256(), 0
print("open", flush=True)
while (message := reader.receive()) is not None:
    digest.update(len(message).to_bytes(4, "little") + message)
    count += 1
    if count % 500 == 0:
        time.sleep(random.random() / 50)
print(count, digest.hexdigest())
"""
WRITE_AND_WAIT = """
import sys, time
from executor_service.distributed.plan_ring import RingWriter
writer = RingWriter(1, 64)
writer.send(b"first")
print(writer.name, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def ring(num_readers: int, size: int) -> Iterator[tuple[RingWriter, list[RingReader]]]:
    """The test closes the writer, or nobody may wait for it."""
    writer = RingWriter(num_readers, size)
    readers = [RingReader(writer.name, index) for index in range(num_readers)]
    yield writer, readers
    for reader in readers:
        reader.close()


def receive_all(reader: RingReader, pause: Callable[[], None] = lambda: None) -> list[bytes]:
    messages = []
    while (message := reader.receive()) is not None:
        messages.append(message)
        pause()
    return messages


def send_all(writer: RingWriter, messages: list[bytes]) -> None:
    for message in messages:
        writer.send(message)
    writer.close()


def in_thread(work: Callable[..., T], *arguments: object) -> "Future[T]":
    """Like a pool's submit; but a thread that is stuck does not keep the tests from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@settings(max_examples=60)
@given(
    size=st.sampled_from([8, 64, 4096]),
    lengths=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 300), st.integers(3000, 9000)), max_size=30),
    slow=st.lists(st.booleans(), min_size=READERS, max_size=READERS),
)
def test_every_reader_gets_every_message_once_and_in_order(size: int, lengths: list[int], slow: list[bool]) -> None:
    rng = random.Random(len(lengths))
    messages = [rng.randbytes(length) for length in lengths]
    with ring(READERS, size) as (writer, readers):
        pauses = [(lambda: time.sleep(0.0005)) if is_slow else (lambda: None) for is_slow in slow]
        received = [in_thread(receive_all, *pair) for pair in zip(readers, pauses, strict=True)]
        in_thread(send_all, writer, messages).result(PATIENCE_S)
        assert [messages] * READERS == [future.result(PATIENCE_S) for future in received]


def test_processes_get_what_one_process_sends() -> None:
    rng = random.Random(1)
    writer = RingWriter(READERS, 1 << 14)
    readers = [python(READ_ALL, writer.name, str(index)) for index in range(READERS)]
    for reader in readers:
        assert reader.stdout
        assert reader.stdout.readline() == "open\n"
    digest, count = hashlib.sha256(), 5_000
    for number in range(count):
        message = rng.randbytes(100_000 if number % 997 == 0 else rng.choice([0, 1, 45, 200, 1000]))
        digest.update(len(message).to_bytes(4, "little") + message)
        writer.send(message)
    writer.close()
    for reader in readers:
        assert reader.communicate(timeout=60)[0].split() == [str(count), digest.hexdigest()]


def test_counts_pass_the_end_of_their_numbers() -> None:
    with ring(1, 256) as (writer, (reader,)):
        for number in range(2 * (plan_ring._COUNT - plan_ring._FIRST_COUNT) // 49):
            message = number.to_bytes(4, "little") * 11 + b"!"
            writer.send(message)
            assert reader.receive() == message
        assert writer._written < plan_ring._FIRST_COUNT
        writer.close()


def test_a_writer_waits_for_the_slowest_reader_only_where_the_ring_is_full() -> None:
    with ring(2, 64) as (writer, (fast, slow)):
        messages = [bytes([number]) * 28 for number in range(3)]  # 32 bytes each in the ring
        is_sent = [threading.Event() for _ in messages]

        def send_each() -> None:
            for message, event in zip(messages, is_sent, strict=True):
                writer.send(message)
                event.set()

        sending = in_thread(send_each)
        assert [fast.receive() for _ in range(2)] == messages[:2]
        assert is_sent[1].wait(PATIENCE_S)
        assert not is_sent[2].wait(0.3)  # longer than a sleep lasts
        assert slow.receive() == messages[0]
        sending.result(PATIENCE_S)
        assert fast.receive() == messages[2]
        assert [slow.receive() for _ in range(2)] == messages[1:]
        writer.close()


@pytest.mark.parametrize("who", ["reader", "writer"])
def test_a_lost_wake_up_costs_a_moment_only(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    with ring(1, 64) as (writer, (reader,)):
        if who == "reader":
            received = in_thread(reader.receive)
            time.sleep(0.05)  # it sleeps
            monkeypatch.setattr(plan_ring.Futex, "_wake", lambda self: None)
            writer.send(b"plan")
            assert received.result(PATIENCE_S) == b"plan"
        else:
            sent = in_thread(writer.send, bytes(100))
            time.sleep(0.05)
            monkeypatch.setattr(plan_ring.Futex, "_wake", lambda self: None)
            assert reader.receive() == bytes(100)
            sent.result(PATIENCE_S)
        writer.close()


def test_a_sleeper_is_woken_and_does_not_look_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_ring, "_LOOK_AGAIN_S", 600.0)
    with ring(1, 64) as (writer, (reader,)):
        received = in_thread(reader.receive)
        time.sleep(0.05)
        writer.send(b"plan")
        assert received.result(PATIENCE_S) == b"plan"
        sent = in_thread(writer.send, bytes(100))
        time.sleep(0.05)
        assert reader.receive() == bytes(100)
        sent.result(PATIENCE_S)
        writer.close()


def test_waiting_takes_no_processor_time() -> None:
    with ring(1, 64) as (writer, (reader,)):
        received = in_thread(reader.receive)
        start = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - start < 0.3
        writer.send(bytes(10))
        received.result(PATIENCE_S)
        sent = in_thread(writer.send, bytes(200))
        start = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - start < 0.3
        assert reader.receive() == bytes(200)
        sent.result(PATIENCE_S)
        writer.close()


def test_messages_that_came_before_the_end_are_still_received() -> None:
    with ring(1, 64) as (writer, (reader,)):
        writer.send(b"a")
        writer.send(b"")
        writer.close()
        assert [reader.receive() for _ in range(3)] == [b"a", b"", None]


def test_the_death_of_the_writer_is_no_end(tmp_path: Path) -> None:
    writer = python(WRITE_AND_WAIT)
    assert writer.stdout
    reader = RingReader(writer.stdout.readline().strip(), 0)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert reader.receive() == b"first"
    with pytest.raises(ConnectionResetError):
        reader.receive()
    reader.close()


def test_nothing_of_a_ring_is_in_a_file_system() -> None:
    before = set(Path("/dev/shm").iterdir())
    with ring(1, 64) as (writer, _):
        assert set(Path("/dev/shm").iterdir()) == before
        assert os.readlink(writer.name).startswith("/memfd:")
        writer.close()
