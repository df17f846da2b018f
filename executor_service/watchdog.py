"""Notices a device that hangs. Nothing but the end of the process helps then: its thread may be stuck in a kernel."""

import asyncio
import collections
import dataclasses
import logging
import os
from typing import NoReturn

WIPE_TIMEOUT_S = 120.0  # of the emptying of slots, behind whatever the device was at work on
_TICK_S = 0.1

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Watched:
    """Something that the device was told to do."""

    step_id: int | None  # of a plan's first step; None: the wiping of slots
    timeout_s: float  # 0, of a plan: as long as it needs
    is_over: bool = False  # set by whichever thread sees its end, and read on the event loop

    def __str__(self) -> str:
        return "the wiping of slots" if self.step_id is None else f"step {self.step_id}"


class Watchdog:
    """Measures how long the device works on one thing, by looking from time to time, so that work costs no clock."""

    def __init__(self) -> None:
        self._queue: collections.deque[Watched] = collections.deque()  # what the device was told, in order
        self._due: Watched | None = None  # what it worked on when last looked
        self._age_s = 0.0  # since that was first seen

    def expect(self, work: Watched) -> None:
        """Watch what the device does after all that it was told before."""
        self._forget_what_is_over()
        self._queue.append(work)

    def look(self, passed_s: float) -> str | None:
        """What hangs, `passed_s` seconds after the last look; None while nothing does."""
        self._forget_what_is_over()
        due = self._find_due()
        self._age_s = self._age_s + passed_s if due is self._due else 0.0
        self._due = due
        if due is None or self._age_s <= due.timeout_s:
            return None
        return f"{due} has taken {self._age_s:.1f} s, and may take {due.timeout_s:.1f} s"

    async def watch(self) -> NoReturn:
        """Look until something hangs, and end the process then."""
        while True:
            await asyncio.sleep(_TICK_S)
            # However long it was: while this whole process stood still, so did what would have seen the device ready.
            if problem := self.look(_TICK_S):
                log.error("the device hangs: %s", problem)
                os._exit(1)  # whoever supervises this process starts it again, and all other ranks with it

    def _forget_what_is_over(self) -> None:
        while self._queue and self._queue[0].is_over:
            self._queue.popleft()

    def _find_due(self) -> Watched | None:
        """What the device works on; where that may take as long as it needs, the wiping that waits behind it."""
        if self._queue and self._queue[0].timeout_s:
            return self._queue[0]
        return next((work for work in self._queue if work.step_id is None), None)
