"""What a batch reads and writes: lines of JSON, one for each prompt, the output in the order of the input."""

import asyncio
import dataclasses
import io
import json
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from duet.cli.exit_status import CommandFailed

_MAX_LINE_BYTES = 16 * 2**20  # as much as a server takes in a message
_BLOCK_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input that is not blank."""

    index: int  # among these lines, from 0
    number: int  # among all lines of the file, from 1
    text: bytes


async def read_lines(file: BinaryIO) -> AsyncIterator[Line]:
    """The lines of the input, as they come and no sooner than they are wanted. Raises: CommandFailed."""
    index = number = 0
    async for text in _pieces(file):
        number += 1
        if len(text) > _MAX_LINE_BYTES:
            raise CommandFailed(f"line {number} is longer than {_MAX_LINE_BYTES} bytes")
        if text := text.strip():
            yield Line(index, number, text)
            index += 1


class OutputFile:
    """Where records go; one that was begun by an earlier run is read first, record by record."""

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        """`path` None: standard output. An existing file is replaced unless `resume` is set."""
        self._path = path
        self._num_read: int | None = None  # None: there is nothing more to be read
        if path is None:
            self._file = sys.stdout.buffer
        elif resume and path.exists():
            self._file = path.open("r+b")
            _cut_torn_line(self._file)
            self._num_read = 0
        else:
            self._file = path.open("wb")

    def next_finished(self) -> dict[str, Any] | None:
        """The next record of the earlier run; None behind the last. Raises: CommandFailed."""
        if self._num_read is None:
            return None
        text = self._file.readline()
        if not text:
            self._num_read = None
            return None
        self._num_read += 1
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CommandFailed(f"{self.where} is no record of a batch")
        return record

    @property
    def where(self) -> str:
        """The place of the record that was read last."""
        return f"{self._path}, line {self._num_read}"

    def write(self, record: bytes) -> None:
        """Append a record of one line, so that it outlives a kill of this process."""
        self._file.write(record + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._path is not None:
            self._file.close()


def encode(record: dict[str, Any]) -> bytes:
    """A record as one line of JSON in UTF-8."""
    # What UTF-8 cannot encode, half of a surrogate pair, becomes the escape that JSON has for it.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def count_lines(file: BinaryIO) -> int | None:
    """Lines that are not blank, from here to the end of a regular file, which stays where it is; None for others."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return None
    start = file.tell()
    count = sum(1 for text in file if text.strip())
    file.seek(start)
    return count


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    """Lines with their ends; one that is too long is cut."""
    if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        while text := file.readline(_MAX_LINE_BYTES + 1):
            yield text
        return
    # A pipe may be slow, and streams go on meanwhile.
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), file
    )
    try:
        while text := await _read_line(reader):
            yield text
    finally:
        transport.close()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError:
        return bytes(_MAX_LINE_BYTES + 1)


def _cut_torn_line(file: BinaryIO) -> None:
    """Drop what follows the last end of a line, and go to the start."""
    end = file.seek(0, io.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
    file.seek(0)
