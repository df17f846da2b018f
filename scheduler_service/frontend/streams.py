"""What a client has not been sent yet, one buffer per stream."""

import asyncio
import dataclasses

from scheduler_service import ipc
from scheduler_service.errors import DuetError

End = ipc.Finished | DuetError


@dataclasses.dataclass(frozen=True)
class News:
    """Everything that happened on a stream since the last look."""

    started: ipc.Started | None
    token_ids: list[int]
    end: End | None


class TokenStream:
    """One request's events on their way from the core to a client.

    The core's side never waits. A client that is slow to drain finds all its unsent tokens in one News, so it costs
    the memory of its own tokens and nothing else.
    """

    def __init__(self, number: int) -> None:
        self.number = number  # the stream's name on the core's socket
        self._started: ipc.Started | None = None
        self._token_ids: list[int] = []
        self._end: End | None = None
        self._news = asyncio.Event()

    def start(self, started: ipc.Started) -> None:
        """The request was admitted for the first time."""
        self._started = started
        self._news.set()

    def push(self, token_id: int) -> None:
        """A token was generated."""
        self._token_ids.append(token_id)
        self._news.set()

    def end(self, end: End) -> None:
        """Nothing follows."""
        self._end = end
        self._news.set()

    async def take(self) -> News:
        """Wait for something to happen; returns all of it at once."""
        await self._news.wait()
        self._news.clear()
        news = News(self._started, self._token_ids, self._end)
        self._started, self._token_ids = None, []
        return news
