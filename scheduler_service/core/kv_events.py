"""What enters and leaves the prefix cache, told to front ends that asked: a router sends prompts where their prefix is.

Nobody listens to the cache while nobody has subscribed. Blocks of salted prompts are never told: those who route by
these events do not know the salt, and would look for the tokens alone.
"""

import dataclasses
from array import array
from collections.abc import Callable, Hashable

from scheduler_service.core.prefix_cache import CachedBlock, PrefixCache, starts_with_salt
from scheduler_service.kv_messages import KvCleared, KvEvents, KvRemoved, KvStored

MAX_EVENT_TOKENS = 1 << 16  # of one KvStored
MAX_PART_TOKENS = 1 << 17  # of one message of a snapshot

Event = KvStored | KvRemoved | KvCleared


@dataclasses.dataclass
class _Run:
    """A KvStored that may still grow."""

    hashes: list[int]
    parent: int | None
    token_ids: bytearray


class KvEventLog:
    """The subscribers, and the changes that they have not been told yet. An observer of the epoch's prefix cache."""

    def __init__(self) -> None:
        self._cache: PrefixCache | None = None  # None: no executor
        self._subscribers: dict[tuple[Hashable, int], Callable[[KvEvents], None]] = {}
        self._told: set[int] = set()  # hashes that subscribers believe to be cached
        self._pending: list[_Run | KvRemoved | KvCleared] = []

    def begin_epoch(self, cache: PrefixCache) -> None:
        """Follow the empty prefix cache of a new executor."""
        self._cache = cache
        cache.observer = self if self._subscribers else None

    def end_epoch(self) -> None:
        """The cache is gone with its executor."""
        self._cache = None
        self._told.clear()
        self._pending = [KvCleared()]
        self.flush()

    def subscribe(self, owner: Hashable, number: int, send: Callable[[KvEvents], None]) -> None:
        """Tell `send` what the cache holds now, and from now on what changes; `number` is the owner's own."""
        self.flush()
        parts = self._snapshot()
        for events in parts:
            send(KvEvents(number, events, snapshot_parts=len(parts)))
        self._subscribers[owner, number] = send
        if self._cache is not None:
            self._cache.observer = self

    def unsubscribe(self, owner: Hashable, number: int | None = None) -> None:
        """End one subscription, or all of an owner; nothing happens where there is none."""
        self._subscribers = {
            key: send
            for key, send in self._subscribers.items()
            if not (key[0] == owner and (number is None or key[1] == number))
        }
        if self._subscribers:
            return
        self._told.clear()
        self._pending.clear()
        if self._cache is not None:
            self._cache.observer = None

    def flush(self) -> None:
        """Send every subscriber what is new."""
        if not self._pending:
            return
        events = self._take()
        for (_, number), send in self._subscribers.items():
            send(KvEvents(number, events))

    def on_stored(self, digests: list[bytes], index: int, token_ids: "array[int]", block: bytes) -> None:
        """The prefix that ends with block `index`, whose tokens are `block`, entered the cache."""
        assert self._cache is not None
        first_block = token_ids[: self._cache.block_size].tobytes()
        if not starts_with_salt(digests[0], first_block):
            self._store(digests, index, block)

    def on_removed(self, digest: bytes) -> None:
        """A prefix left the cache."""
        name = _hash(digest)
        if name not in self._told:
            return
        self._told.remove(name)
        last = self._pending[-1] if self._pending else None
        if isinstance(last, KvRemoved):
            last.hashes.append(name)
        else:
            self._pending.append(KvRemoved([name]))

    def _store(self, digests: list[bytes], index: int, block: bytes) -> None:
        assert self._cache is not None
        name, parent = _hash(digests[index]), _hash(digests[index - 1]) if index else None
        self._told.add(name)
        last = self._pending[-1] if self._pending else None
        if isinstance(last, _Run) and last.hashes[-1] == parent and not self._is_long(last):
            last.hashes.append(name)
            last.token_ids += block
        else:
            self._pending.append(_Run([name], parent, bytearray(block)))

    def _is_long(self, run: _Run) -> bool:
        return len(run.token_ids) >= 4 * MAX_EVENT_TOKENS

    def _take(self) -> list[Event]:
        pending, self._pending = self._pending, []
        block_size = self._cache.block_size if self._cache is not None else 0
        return [
            KvStored(event.hashes, event.parent, bytes(event.token_ids), block_size)
            if isinstance(event, _Run)
            else event
            for event in pending
        ]

    def _snapshot(self) -> list[list[Event]]:
        """What the cache holds as the events of a few messages, parents before children. It begins with KvCleared."""
        for entry in _parents_first(self._cache) if self._cache is not None else ():
            self._store(entry.digests, entry.index, entry.token_ids)
        parts: list[list[Event]] = [[KvCleared()]]
        num_bytes = 0
        for event in self._take():
            assert isinstance(event, KvStored)
            if num_bytes and num_bytes + len(event.token_ids) > 4 * MAX_PART_TOKENS:
                parts.append([])
                num_bytes = 0
            parts[-1].append(event)
            num_bytes += len(event.token_ids)
        return parts


def _parents_first(cache: PrefixCache) -> list[CachedBlock]:
    """The cache's entries of prompts without salt, those of one prompt in a row as far as possible.

    Left out are those that go on from an evicted block: nothing can hit them until it is computed again.
    """
    children: dict[bytes, list[CachedBlock]] = {}
    stack: list[CachedBlock] = []
    for entry in cache.entries():
        if entry.index:
            children.setdefault(entry.digests[entry.index - 1], []).append(entry)
        elif not starts_with_salt(entry.digests[0], entry.token_ids):
            stack.append(entry)
    entries: list[CachedBlock] = []
    while stack:
        entry = stack.pop()
        entries.append(entry)
        stack += children.get(entry.digests[entry.index], ())
    return entries


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
