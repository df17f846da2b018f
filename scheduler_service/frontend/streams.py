"""What a client has not been sent yet, one buffer per choice."""

import asyncio
import time
from array import array

from scheduler_service import ipc
from scheduler_service.errors import DuetError

End = ipc.Finished | DuetError


class TokenStream:
    """One choice's events on their way from the core to a client.

    The core's side never waits. A client that is slow to drain finds all its unsent tokens together, so it costs the
    memory of its own tokens and nothing else. The choices of a request share one `news`, set whenever one of them has
    something to say. Tokens are kept to the end, so that another core can go on from them.
    """

    def __init__(self, number: int, news: asyncio.Event) -> None:
        self.number = number  # the stream's name on the core's socket
        self.started: ipc.Started | None = None
        self.prompt_logprobs: ipc.PromptLogprobs | None = None
        self.logprobs: list[ipc.TokenLogprobs] = []  # of tokens in order; the reader removes those it has sent
        self.end: End | None = None
        self.token_ids: array[int] = array("i")  # all that have come
        self.first_token_time: float | None = None  # time.monotonic() seconds
        self.is_stopped = False  # the core was told that a stop string was completed
        self._num_taken = 0
        self._news = news

    def start(self, started: ipc.Started) -> None:
        """The choice was admitted for the first time."""
        self.started = started
        self._news.set()

    def push(self, token_id: int) -> None:
        """A token was generated."""
        if not self.token_ids:
            self.first_token_time = time.monotonic()
        self.token_ids.append(token_id)
        self._news.set()

    def finish(self, end: End) -> None:
        """Nothing follows."""
        self.end = end
        self._news.set()

    def take(self) -> list[int]:
        """The tokens pushed since the last call."""
        token_ids = self.token_ids[self._num_taken :].tolist()
        self._num_taken += len(token_ids)
        return token_ids
