"""KV blocks: who holds them, which are free, which free ones still hold a prefix worth keeping.

Source: PagedAttention, arXiv:2309.06180, section 4. A block is in exactly one of three places: in the block tables
that hold it (reference count above 0), free, or free but cached. Freed cached blocks are evicted least recently
used first, the tail of a sequence before its head.
"""

from array import array
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.prefix_cache import PrefixCache


class BlockManager:
    """The only writer of block tables and reference counts."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, max_model_len: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_tables: NDArray[np.int32] = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int32)
        self.table_lens: NDArray[np.int32] = np.zeros(num_slots, dtype=np.int32)  # [num_slots] blocks held
        self.ref_counts = [0] * num_blocks
        self.prefix_cache = PrefixCache(block_size)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation could take, cached ones included."""
        return len(self._free) + len(self._cached_free)

    @property
    def num_cached_free_blocks(self) -> int:
        """Blocks that no table holds and a later prompt may hit."""
        return len(self._cached_free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, slot: int) -> NDArray[np.int32]:
        """A view of the slot's block table.  # [num_blocks_held] int32"""
        return self.block_tables[slot, : self.table_lens[slot]]

    def find_prefix(self, digests: list[bytes], token_ids: "array[int]") -> list[int]:
        """Blocks of the longest cached prefix that leaves at least one token to compute."""
        return self.prefix_cache.match(digests, token_ids, (len(token_ids) - 1) // self.block_size)

    def num_free_after(self, hits: list[int], num_tokens: int) -> int:
        """Free blocks left if a table of `num_tokens` tokens began with `hits`; negative: it does not fit."""
        num_revived = sum(1 for block in hits if self.ref_counts[block] == 0)
        return self.num_free_blocks - num_revived - (self.blocks_for(num_tokens) - len(hits))

    def allocate(self, slot: int, hits: list[int], num_tokens: int) -> None:
        """Give an empty slot a table for `num_tokens` tokens that begins with the cached blocks `hits`.

        The caller has seen that num_free_after is not negative.
        """
        assert self.table_lens[slot] == 0
        for block in hits:
            self._hold(block)
        blocks = hits + [self._take() for _ in range(self.blocks_for(num_tokens) - len(hits))]
        self.block_tables[slot, : len(blocks)] = blocks
        self.table_lens[slot] = len(blocks)

    def append(self, slot: int) -> int | None:
        """Extend the slot's table by one block; None, with nothing changed, where none is free."""
        if self.num_free_blocks == 0:
            return None
        block = self._take()
        self.block_tables[slot, self.table_lens[slot]] = block
        self.table_lens[slot] += 1
        return block

    def free(self, slot: int) -> None:
        """Let go of every block of the slot's table."""
        for block in reversed(self.table(slot).tolist()):
            self._drop(block)
        self.table_lens[slot] = 0

    def publish(self, slot: int, digests: list[bytes], token_ids: "array[int]", first: int, last: int) -> None:
        """Enter blocks `first` to `last` - 1 of the slot's table in the prefix cache."""
        for index in range(first, last):
            self.prefix_cache.publish(int(self.block_tables[slot, index]), digests, token_ids, index)

    def retract(self, digest: bytes, index: int) -> None:
        """Forget the prefix that ends with block `index`, known by `digest`, and every prefix that goes on from it."""
        for block in self.prefix_cache.going_on_from(digest, index):
            self.prefix_cache.retract(block)
            if self.ref_counts[block] == 0:
                del self._cached_free[block]
                self._free.append(block)

    def _hold(self, block: int) -> None:
        if self.ref_counts[block] == 0:
            del self._cached_free[block]
        self.ref_counts[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached_free.popitem(last=False)
            self.prefix_cache.retract(block)
        assert self.ref_counts[block] == 0
        self.ref_counts[block] = 1
        return block

    def _drop(self, block: int) -> None:
        assert self.ref_counts[block] > 0
        self.ref_counts[block] -= 1
        if self.ref_counts[block]:
            return
        if block in self.prefix_cache:
            self._cached_free[block] = None
        else:
            self._free.append(block)

    def check(self) -> None:
        """Assert the invariants: every block is in one place, and reference counts are what the tables say."""
        counts = np.zeros(self.num_blocks, dtype=np.int64)
        for slot in range(len(self.table_lens)):
            np.add.at(counts, self.table(slot), 1)
        assert counts.tolist() == self.ref_counts, "a reference count differs from the tables that hold the block"
        free = [*self._free, *self._cached_free]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == set(np.flatnonzero(counts == 0).tolist()), "free and held blocks do not partition all"
        assert all(block in self.prefix_cache for block in self._cached_free), "a cached block holds nothing"
        assert not any(block in self.prefix_cache for block in self._free), "a free block is in the prefix cache"
