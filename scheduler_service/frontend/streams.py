"""What a client has not been sent yet, one buffer per choice."""

import asyncio

from scheduler_service import ipc
from scheduler_service.errors import DuetError

End = ipc.Finished | DuetError


class TokenStream:
    """One choice's events on their way from the core to a client.

    The core's side never waits. A client that is slow to drain finds all its unsent tokens together, so it costs the
    memory of its own tokens and nothing else. The choices of a request share one `news`, set whenever one of them has
    something to say.
    """

    def __init__(self, number: int, news: asyncio.Event) -> None:
        self.number = number  # the stream's name on the core's socket
        self.started: ipc.Started | None = None
        self.prompt_logprobs: ipc.PromptLogprobs | None = None
        self.logprobs: list[ipc.TokenLogprobs] = []  # of tokens in order; the reader removes those it has sent
        self.end: End | None = None
        self._token_ids: list[int] = []
        self._news = news

    def start(self, started: ipc.Started) -> None:
        """The choice was admitted for the first time."""
        self.started = started
        self._news.set()

    def push(self, token_id: int) -> None:
        """A token was generated."""
        self._token_ids.append(token_id)
        self._news.set()

    def finish(self, end: End) -> None:
        """Nothing follows."""
        self.end = end
        self._news.set()

    def take(self) -> list[int]:
        """The tokens pushed since the last call."""
        token_ids, self._token_ids = self._token_ids, []
        return token_ids
