"""Recordings: what went over the sessions between a scheduler and its executor, message by message.

A recording begins with the line `Duet recording 1`. Records follow, each a head of 17 bytes and its payload. The
numbers of a head are little-endian and unsigned:

    kind      1 byte   what the payload is: see Kind
    session   4 bytes  which session it belongs to; in the order of their first messages they count up from 1
    time_ns   8 bytes  when the recorder had it, on its machine's monotonic clock
    length    4 bytes  of the payload

A message is written before the other side can see it, so what is said in answer to a message stands behind it. The
last record may be cut off, where the recorder was killed. One that goes on in the same file removes it first.
"""

import dataclasses
import enum
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

MAX_MESSAGE_BYTES = 64 << 20  # as much as executor and scheduler take

_MAGIC = b"Duet recording 1\n"
_HEAD = struct.Struct("<BIQI")


class Kind(enum.IntEnum):
    """What the payload of a record is."""

    REQUEST = 1  # a RunSessionRequest, from the scheduler
    RESPONSE = 2  # a RunSessionResponse, from the executor
    END = 3  # a google.rpc.Status: the session's end


_KINDS = frozenset(Kind)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One message of a session, or its end."""

    kind: Kind
    session: int
    time_ns: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Recording:
    """A file's content; it is all in memory."""

    records: list[Record]
    num_cut_bytes: int  # of a last record that is not whole; 0: there is none


class InvalidRecording(Exception):
    """A file is no recording, is damaged, or is being written by another recorder."""


def read_recording(path: Path) -> Recording:
    """Read a whole recording. Raises: InvalidRecording, OSError."""
    with path.open("rb") as file:
        size = _check_magic(file, path)
        records: list[Record] = []
        end = file.tell()
        for kind, session, time_ns, length in _heads(file, size, path):
            records.append(Record(kind, session, time_ns, file.read(length)))
            end = file.tell()
    return Recording(records, size - end)


class RecordingWriter:
    """Appends to a recording, which is made where there is none, for its owner alone: it holds what users wrote.

    A record is with the kernel when `write` returns, so that a killed recorder loses none but the one it was writing.
    """

    def __init__(self, path: Path) -> None:
        """Raises: InvalidRecording, OSError."""
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
        try:
            self._num_sessions = self._find_end(path)
        except BaseException:
            self._file.close()
            raise

    def begin_session(self) -> int:
        """A number for a session."""
        self._num_sessions += 1
        return self._num_sessions

    def write(self, kind: Kind, session: int, payload: bytes) -> None:
        """Append a record, with the time of now. Raises: OSError."""
        rest = memoryview(_HEAD.pack(kind, session, time.monotonic_ns(), len(payload)) + payload)
        while rest:  # a disk that is full takes a part before it refuses
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_end(self, path: Path) -> int:
        """Go behind the last whole record, and remove what follows it; returns the number of sessions so far."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRecording(f"{path}: another recorder writes to it") from None
        if not os.fstat(self._file.fileno()).st_size:
            self._file.write(_MAGIC)
            return 0
        size = _check_magic(self._file, path)
        num_sessions, end = 0, self._file.tell()
        for _, session, _, length in _heads(self._file, size, path):
            num_sessions = max(num_sessions, session)
            end = self._file.seek(length, os.SEEK_CUR)
        self._file.truncate(end)
        self._file.seek(end)
        return num_sessions


def _check_magic(file: BinaryIO, path: Path) -> int:
    """Read the first line; returns the size of the file."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise InvalidRecording(f"{path}: it is no recording, or one of another version")
    return os.fstat(file.fileno()).st_size


def _heads(file: BinaryIO, size: int, path: Path) -> Iterator[tuple[Kind, int, int, int]]:
    """The head of every whole record; the caller reads or skips each payload."""
    while (start := file.tell()) + _HEAD.size <= size:
        kind, session, time_ns, length = _HEAD.unpack(file.read(_HEAD.size))
        if kind not in _KINDS or not session or length > MAX_MESSAGE_BYTES:
            raise InvalidRecording(f"{path}: damaged at byte {start}")
        if file.tell() + length > size:
            return
        yield Kind(kind), session, time_ns, length
