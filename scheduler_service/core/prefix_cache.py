"""Which KV block holds which prefix of tokens.

A full block is known by the digest of everything before it and in it: a chain of xxh3-128 over blocks of token
ids, begun with the request's salt. Idea: vLLM's automatic prefix caching.
"""

import dataclasses
from array import array
from collections.abc import Iterable
from typing import Protocol

import xxhash


@dataclasses.dataclass(frozen=True, slots=True)
class CachedBlock:
    """What stands in the index for one block."""

    digests: list[bytes]  # its publisher's, which only grow: [:index + 1] lead from the first block to this one
    index: int  # of the block in a table that holds it
    token_ids: bytes  # [block_size] int32, compared at every hit


def extend_digests(digests: list[bytes], token_ids: "array[int]", block_size: int, salt: str) -> None:
    """Append to `digests` the digests of the full blocks of `token_ids` that it lacks."""
    parent = digests[-1] if digests else _root(salt)
    for index in range(len(digests), len(token_ids) // block_size):
        parent = xxhash.xxh3_128_digest(parent + _block_bytes(token_ids, index, block_size))
        digests.append(parent)


def starts_with_salt(digest: bytes, token_ids: bytes) -> bool:
    """Whether a salt went into the `digest` of a first block, whose tokens are `token_ids`  # [block_size] int32."""
    return digest != xxhash.xxh3_128_digest(_root("") + token_ids)


class CacheObserver(Protocol):
    """One who wants to know of every change."""

    def on_stored(self, digests: list[bytes], index: int, token_ids: "array[int]", block: bytes) -> None:
        """The prefix of `token_ids` that ends with block `index`, whose tokens are `block`, was entered."""
        ...

    def on_removed(self, digest: bytes) -> None:
        """The prefix was forgotten."""
        ...


class PrefixCache:
    """The index from digest to block and back."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.observer: CacheObserver | None = None
        self._block_of: dict[bytes, int] = {}
        self._entries: dict[int, CachedBlock] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, digests: list[bytes], token_ids: "array[int]", max_blocks: int) -> list[int]:
        """The blocks of the longest prefix that is held, at most `max_blocks`; tokens are compared too."""
        blocks: list[int] = []
        for index, digest in enumerate(digests[:max_blocks]):
            block = self._block_of.get(digest)
            if block is None:
                break
            entry = self._entries[block]
            if entry.token_ids != _block_bytes(token_ids, index, self.block_size) or (
                index and entry.digests[index - 1] != digests[index - 1]
            ):
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digests: list[bytes], token_ids: "array[int]", index: int) -> None:
        """Enter `block` as the holder of the prefix that ends with block `index` of the tokens.

        A prefix that is held already keeps its block; a block that is in the index stays as it is.
        """
        digest = digests[index]
        if block in self._entries or digest in self._block_of:
            return
        self._entries[block] = CachedBlock(digests, index, _block_bytes(token_ids, index, self.block_size))
        self._block_of[digest] = block
        if self.observer is not None:
            self.observer.on_stored(digests, index, token_ids, self._entries[block].token_ids)

    def retract(self, block: int) -> None:
        """Forget what the block, which is in the index, holds."""
        entry = self._entries.pop(block)
        del self._block_of[entry.digests[entry.index]]
        if self.observer is not None:
            self.observer.on_removed(entry.digests[entry.index])

    def entries(self) -> Iterable[CachedBlock]:
        """Everything that is in the index."""
        return self._entries.values()

    def holder(self, digest: bytes) -> int | None:
        """The block that holds the prefix, or None."""
        return self._block_of.get(digest)

    def going_on_from(self, digest: bytes, index: int) -> list[int]:
        """The blocks of every prefix whose block `index` is known by `digest`."""
        entries = self._entries.items()
        return [block for block, entry in entries if entry.index >= index and entry.digests[index] == digest]


def _root(salt: str) -> bytes:
    return xxhash.xxh3_128_digest(salt.encode())


def _block_bytes(token_ids: "array[int]", index: int, block_size: int) -> bytes:
    return token_ids[index * block_size : (index + 1) * block_size].tobytes()
