"""What front end and core say to each other of the prefix cache: a part of ipc.py."""

import msgspec


class KvSubscribe(msgspec.Struct, frozen=True, tag=True):
    """Hear of the prefix cache from now on: KvEvents with what it holds, then with each change."""

    subscription: int  # the front end's own number, unique while its connection lives


class KvUnsubscribe(msgspec.Struct, frozen=True, tag=True):
    """End a subscription; messages that are under way still come."""

    subscription: int


class KvStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Full blocks, each continuing the one before it, entered the prefix cache. Blocks of salted prompts are left out.

    A block is named by a hash of all tokens up to its end.
    """

    hashes: list[int]  # int64
    parent: int | None  # hash of what the first of the blocks continues; None: nothing
    token_ids: bytes  # [len(hashes), block_size] little-endian int32
    block_size: int


class KvRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks left the prefix cache."""

    hashes: list[int]  # int64


class KvCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The prefix cache is empty: the executor is gone, or this is the beginning of what a new subscriber is told."""


class KvEvents(msgspec.Struct, frozen=True, tag=True):
    """Changes of the prefix cache, in order; a subscription begins with `snapshot_parts` messages of what it holds."""

    subscription: int
    events: list[KvStored | KvRemoved | KvCleared]
    snapshot_parts: int = 0  # 0: not part of the snapshot
