"""What one subscriber to the prefix cache's changes has not been sent yet."""

import asyncio
from collections import deque

from scheduler_service.kv_messages import KvEvents

MAX_UNSENT_MESSAGES = 4096


class KvSubscription:
    """Messages on their way from the core to a subscriber. The core's side never waits."""

    def __init__(self, number: int) -> None:
        self.number = number  # the subscription's name on the core's socket
        self._messages: deque[KvEvents] = deque()
        self._is_broken = False
        self._news = asyncio.Event()

    def push(self, message: KvEvents) -> None:
        """The next message; one more than a subscriber may leave unread breaks the subscription."""
        if len(self._messages) >= MAX_UNSENT_MESSAGES:
            self.end()
        else:
            self._messages.append(message)
            self._news.set()

    def end(self) -> None:
        """Messages were lost: what was not read is worth nothing without them."""
        self._messages.clear()
        self._is_broken = True
        self._news.set()

    async def take(self) -> KvEvents | None:
        """Wait for the next message; None where messages were lost."""
        while not self._messages:
            if self._is_broken:
                return None
            self._news.clear()
            await self._news.wait()
        return self._messages.popleft()
