"""The Unix socket between a front end and the core, carried frame by frame at the test's word.

Both ends are the real ones, with neither an event loop nor a socket under them.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any, cast

from scheduler_service.core.frontends import Frontends
from scheduler_service.frontend.core_client import CoreClient

Side = Coroutine[Any, Any, None]


class _Pause:
    """Awaited where there is nothing to read."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class Pipe:
    """One direction: what is written is under way until it is carried. Stands for a StreamWriter and a StreamReader."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()  # under way
        self._arrived = bytearray()
        self._is_ended = False  # nothing follows what is under way

    @property
    def has_news(self) -> bool:
        """Whether there is something to carry, the end of file included."""
        return bool(self.frames) or self._is_ended

    @property
    def transport(self) -> "Pipe":
        """Of the StreamWriter."""
        return self

    def get_write_buffer_size(self) -> int:
        """Of the transport, in bytes."""
        return 0

    def write(self, frame: bytes) -> None:
        """Of the StreamWriter."""
        if not self._is_ended:
            self.frames.append(frame)

    def close(self) -> None:
        """Of the StreamWriter."""
        self._is_ended = True

    def cut(self, num_kept: int) -> None:
        """The writer died: but for the oldest frames, what is under way is lost."""
        self._is_ended = True
        while len(self.frames) > num_kept:
            self.frames.pop()

    def carry(self) -> None:
        """The oldest frame arrives."""
        if self.frames:
            self._arrived += self.frames.popleft()

    async def readexactly(self, count: int) -> bytes:
        """Of the StreamReader."""
        while len(self._arrived) < count:
            if self._is_ended and not self.frames:
                raise asyncio.IncompleteReadError(b"", count)
            await _Pause()
        data = bytes(self._arrived[:count])
        del self._arrived[:count]
        return data


class Link:
    """One connection. A side is over once it has read the end of file, or with its process."""

    def __init__(self, client: CoreClient, frontends: Frontends) -> None:
        self.up, self.down = Pipe(), Pipe()  # to the core, and to the front end
        up, down = cast(Any, self.up), cast(Any, self.down)
        self.core_side = _go_on(frontends._serve_one(up, down))
        self.front_end_side = _go_on(client._serve(down, up))

    @property
    def is_over(self) -> bool:
        """Whether both sides are."""
        return self.core_side is None and self.front_end_side is None

    @property
    def is_quiet(self) -> bool:
        """Whether no side has anything to read."""
        goes_up = self.core_side is not None and self.up.has_news
        return not goes_up and not (self.front_end_side is not None and self.down.has_news)

    def carry_up(self) -> None:
        """The core reads on."""
        if self.core_side is not None and self.up.has_news:
            self.up.carry()
            self.core_side = _go_on(self.core_side)

    def carry_down(self) -> None:
        """The front end reads on."""
        if self.front_end_side is not None and self.down.has_news:
            self.down.carry()
            self.front_end_side = _go_on(self.front_end_side)

    def lose_core(self, num_kept: int) -> None:
        """The core died; of what it wrote, the front end will read no more than so many frames."""
        self.down.cut(num_kept)
        self.up.cut(0)
        if self.core_side is not None:
            self.core_side.close()
            self.core_side = None

    def lose_front_end(self, num_kept: int) -> None:
        """The front end died; of what it wrote, the core will read no more than so many frames."""
        self.up.cut(num_kept)
        self.down.cut(0)
        if self.front_end_side is not None:
            self.front_end_side.close()
            self.front_end_side = None

    def close(self) -> None:
        """The test is over; where it failed, nothing need be in order."""
        for side in (self.core_side, self.front_end_side):
            if side is not None:
                with contextlib.suppress(Exception):
                    side.close()


def _go_on(side: Side) -> Side | None:
    """Run until there is nothing to read; None where that was the end."""
    try:
        side.send(None)
    except StopIteration:
        return None
    return side
