"""The ranks of a group as threads of one process, with collectives that wait for each other at a barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadGroup:
    """Collectives of `size` threads, each of which calls them as its own rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._parts: list[Any] = [None] * size

    def exchange(self, rank: int, part: T) -> list[T]:
        """What each rank called with, in rank order."""
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()  # or the next exchange would overwrite what another thread still has to read
        return parts

    def all_reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        """The sum over ranks, added up in rank order."""
        return lambda x: torch.stack(self.exchange(rank, x.clone())).sum(0)

    def all_gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Rows beside each other, in rank order."""
        return lambda x: torch.cat(self.exchange(rank, x), dim=1)

    def run(self, rank_main: Callable[[int], T]) -> list[T]:
        """What `rank_main` returns on each rank."""
        with ThreadPoolExecutor(self.size) as threads:
            futures = [threads.submit(self._run_one, rank_main, rank) for rank in range(self.size)]
            return [future.result() for future in futures]

    def _run_one(self, rank_main: Callable[[int], T], rank: int) -> T:
        try:
            return rank_main(rank)
        except BaseException:
            self._barrier.abort()  # the others must not wait for this one
            raise
