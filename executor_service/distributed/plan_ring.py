"""Messages from one process to others of its machine, through a ring of bytes in shared memory.

The writer counts the bytes that it wrote, each reader those that it read, modulo 2**32; what lies between the two is
unread, and never more than the ring holds. A message is its length and its bytes, and may be longer than the ring:
then it passes in pieces. Nobody spins: each sleeps on the count that it waits for.

The memory has no name in any file system, so that nothing is left of it however its users end: readers open it as a
file of the writer's process. The writer keeps that file locked as long as it lives.
"""

import fcntl
import mmap
import os
import struct

from executor_service.distributed.futex import Futex

LENGTH = struct.Struct("<I")  # before each message
END = LENGTH.pack(2**32 - 1)  # instead of another message

_LINE_BYTES = 64  # a cache line for each count
_HEADER_BYTES = 4096
_COUNT = 2**32  # counts are modulo this
_FIRST_COUNT = _COUNT - 2**16  # so that every ring soon passes the end of the numbers, and not after months
_LOOK_AGAIN_S = 0.1  # how long a sleep may last: whether the writer lives, nobody wakes a reader to say


class _Ring:
    """The mapping: the writer's count, those of the readers, and the bytes."""

    def __init__(self, fd: int) -> None:
        header = memoryview(mmap.mmap(fd, 0))
        self.bytes = header[_HEADER_BYTES:]
        self.size = len(self.bytes)
        counts = [header[start : start + 4] for start in range(0, _HEADER_BYTES, _LINE_BYTES)]
        self.written = Futex(counts[0])
        self.read = [Futex(count) for count in counts[1:]]

    def store(self, count: int, data: memoryview) -> None:
        """Copy in what follows byte `count`."""
        start = count % self.size
        head = min(len(data), self.size - start)
        self.bytes[start : start + head] = data[:head]
        self.bytes[: len(data) - head] = data[head:]

    def load(self, count: int, num_bytes: int) -> bytes:
        """Copy out what follows byte `count`."""
        start = count % self.size
        end = start + num_bytes
        return bytes(self.bytes[start:end]) + bytes(self.bytes[: max(end - self.size, 0)])


class RingWriter:
    """The end of the one process that sends."""

    def __init__(self, num_readers: int, size: int = 1 << 20) -> None:
        """size: bytes that may be unread, a power of two."""
        assert size & (size - 1) == 0, "counts would lose their place when they start again"
        self._fd = os.memfd_create("duet-plans")
        os.ftruncate(self._fd, _HEADER_BYTES + size)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._ring = _Ring(self._fd)
        self._readers = self._ring.read[:num_readers]
        self._written = _FIRST_COUNT
        self._room = size  # bytes that no reader needs any more, as far as is known
        for count in (self._ring.written, *self._readers):
            count.publish(_FIRST_COUNT)

    @property
    def name(self) -> str:
        """What readers open, as long as this is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def send(self, message: bytes) -> None:
        """Hand a message to every reader; waits while the slowest has no room for it, for ever where it died."""
        self._write(LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """Say that no message follows. Every reader must have opened the ring."""
        self._write(END)
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[: self._room or self._wait_for_room()]
            self._room -= len(piece)
            self._ring.store(self._written, piece)
            self._written = (self._written + len(piece)) % _COUNT
            self._ring.written.publish(self._written)
            rest = rest[len(piece) :]

    def _wait_for_room(self) -> int:
        self._room = self._ring.size - max((self._wait_for(reader) for reader in self._readers), default=0)
        return self._room

    def _wait_for(self, reader: Futex) -> int:
        """Wait until the reader has room; returns the bytes that it has not read yet."""
        while (unread := (self._written - (count := reader.load())) % _COUNT) == self._ring.size:
            reader.wait(count, _LOOK_AGAIN_S)
        return unread


class RingReader:
    """The end of one process that receives."""

    def __init__(self, name: str, index: int) -> None:
        """name: the writer's; index: this reader's own, from 0 to the number of readers less one."""
        self._fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        self._ring = _Ring(self._fd)
        self._count = self._ring.read[index]
        self._read = self._published = self._written = _FIRST_COUNT  # the last is the writer's count when last asked

    def receive(self) -> bytes | None:
        """Wait for the next message; None when the writer has closed. Raises: ConnectionResetError, when it died."""
        length = self._take(LENGTH.size)
        message = None if length == END else self._take(*LENGTH.unpack(length))
        self._publish()
        return message

    def close(self) -> None:
        """Nothing is received after this."""
        os.close(self._fd)

    def _take(self, num_bytes: int) -> bytes:
        taken = b""
        while len(taken) < num_bytes:
            piece = self._ring.load(self._read, min(num_bytes - len(taken), self._wait_for_bytes()))
            self._read = (self._read + len(piece)) % _COUNT
            taken += piece
        return taken

    def _wait_for_bytes(self) -> int:
        """Returns how many there are; at least one."""
        while self._written == self._read:
            self._written = self._ring.written.load()
            if self._written != self._read:
                break
            self._publish()  # the writer may need the room to go on
            if not self._ring.written.wait(self._read, _LOOK_AGAIN_S):
                self._check_writer()
        return (self._written - self._read) % _COUNT

    def _check_writer(self) -> None:
        # Asked in this order: what it wrote last, it wrote while it lived.
        if self._is_unlocked() and self._ring.written.load() == self._written:
            raise ConnectionResetError("the writer of the ring has died")

    def _is_unlocked(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _publish(self) -> None:
        if self._published != self._read:
            self._count.publish(self._read)
            self._published = self._read
