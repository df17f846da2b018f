"""A state machine over the block manager, with its own model of who holds which block and what was written in it.

A device may be ahead of the core by some tokens, so a step is sent with its token known to the model alone and
settled later, perhaps when its sequence has gone.
"""

import dataclasses
from array import array
from collections import Counter, deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler_service.core import prefix_cache, settlement
from scheduler_service.core.epoch import Epoch, ExecutorLimits
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.waiting_queue import first_come_first_served
from scheduler_service.ipc import Sampling

NUM_SLOTS = 4
MAX_MODEL_LEN = 20
TOKENS = st.integers(0, 1)
SALTS = st.sampled_from(["", "", "pepper"])
WHICH = st.integers(0, NUM_SLOTS - 1)

Prefix = tuple[str, tuple[int, ...]]  # the salt, and every token to the end of a block


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request, as the model sees it."""

    request: Request
    slot: int
    table: list[int]
    device_tokens: list[int]  # those still in flight included
    num_sent: int  # positions that the steps sent so far write
    alive: bool = True

    def prefix(self, num_tokens: int) -> Prefix:
        """Salt and tokens of the leading positions."""
        return self.request.cache_salt, tuple(self.device_tokens[:num_tokens])


class BlockManagerMachine(RuleBasedStateMachine):
    """Admissions with hits, chunks, decode steps ahead of their tokens, ends at any time, and retractions."""

    @initialize(block_size=st.integers(2, 4), num_blocks=st.integers(3, 10))
    def begin(self, block_size: int, num_blocks: int):
        limits = ExecutorLimits(block_size, num_blocks, NUM_SLOTS, 64, MAX_MODEL_LEN, 4)
        self.pool = RequestPool(first_come_first_served, 100)
        self.pool.begin_epoch(limits)
        assert self.pool.epoch is not None
        self.epoch: Epoch = self.pool.epoch
        self.manager = self.epoch.blocks
        self.size, self.num_blocks = block_size, num_blocks
        self.sequences: list[Sequence] = []  # alive
        self.gone: list[Sequence] = []
        self.in_flight: deque[tuple[Sequence, int]] = deque()  # (whose, token)
        self.written: dict[int, Prefix] = {}  # what each full block holds
        self.index: dict[Prefix, int] = {}
        self.cached: list[int] = []  # free blocks of the index, least recently used first

    # --- the model's own view ------------------------------------------------------------------------------------

    def held(self) -> Counter[int]:
        return Counter(block for sequence in self.sequences for block in sequence.table)

    def plainly_free(self) -> set[int]:
        return set(range(self.num_blocks)) - set(self.held()) - set(self.cached)

    def took(self, sequence: Sequence, block: int):
        """The manager gave a block that held nothing of use, or else the least recently used of the index."""
        plain = self.plainly_free()
        if block not in plain:
            assert not plain, "evicted while a plainly free block was there"
            assert self.cached[:1] == [block], "not the least recently used block, or a held one"
            self.cached.pop(0)
            del self.index[self.written[block]]
        self.written.pop(block, None)
        sequence.table.append(block)

    def write(self, sequence: Sequence, start: int, end: int):
        for index in range(start // self.size, end // self.size):
            block = sequence.table[index]
            assert self.held()[block] == 1, "a write to a block that another table holds"
            self.written[block] = sequence.prefix((index + 1) * self.size)

    def enter(self, sequence: Sequence, first: int, last: int):
        """What publishing the table's blocks `first` to `last` - 1 should do to the index."""
        for index in range(first, last):
            prefix, block = sequence.prefix((index + 1) * self.size), sequence.table[index]
            if prefix not in self.index and block not in self.index.values():
                self.index[prefix] = block

    def expected_hits(self, tokens: list[int], salt: str) -> list[int]:
        hits: list[int] = []
        for end in range(self.size, len(tokens), self.size):  # at least one token is left to compute
            block = self.index.get((salt, tuple(tokens[:end])))
            if block is None:
                break
            hits.append(block)
        return hits

    # --- rules ---------------------------------------------------------------------------------------------------

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=14), salt=SALTS)
    def admit(self, tokens: list[int], salt: str):
        if len(self.sequences) == NUM_SLOTS:
            return
        request = new_request(tokens, salt)
        prefix_cache.extend_digests(request.block_digests, request.token_ids, self.size, salt)
        hits = self.manager.find_prefix(request.block_digests, request.token_ids)
        assert len(hits) * self.size < len(tokens), "a prefill of no token"
        for index, block in enumerate(hits):
            assert self.written[block] == (salt, tuple(tokens[: (index + 1) * self.size])), "a hit holds another prefix"
        assert hits == self.expected_hits(tokens, salt)
        num_fresh = -(-len(tokens) // self.size) - len(hits)
        num_free = len(self.plainly_free()) + len(set(self.cached) - set(hits)) - num_fresh
        assert self.manager.num_free_after(hits, len(tokens)) == num_free
        if num_free < 0:
            return
        slot = self.epoch.seat(request, hits)
        table = self.manager.table(slot).tolist()
        assert table[: len(hits)] == hits, "the table does not begin with the hits"
        assert len(table) == len(hits) + num_fresh
        sequence = Sequence(request, slot, list(hits), list(tokens), len(hits) * self.size)
        self.cached = [block for block in self.cached if block not in hits]
        self.sequences.append(sequence)
        for block in table[len(hits) :]:
            self.took(sequence, block)

    @rule(which=WHICH, count=st.integers(1, 8), sampled=TOKENS)
    def send_chunk(self, which: int, count: int, sampled: int):
        """A chunk of known tokens; its blocks are published at once, and after the last one a token is sampled."""
        sequence = self.pick(which, prefilling=True)
        if sequence is None:
            return
        request, start = sequence.request, sequence.num_sent
        end = min(start + count, len(request.token_ids))
        sequence.num_sent = end
        self.write(sequence, start, end)
        first, last = start // self.size, end // self.size
        self.manager.publish(sequence.slot, request.block_digests, request.token_ids, first, last)
        self.enter(sequence, first, last)
        if end == len(request.token_ids):
            self.sample(sequence, sampled)

    @rule(which=WHICH, sampled=TOKENS)
    def send_step(self, which: int, sampled: int):
        """One decode step, for which the table grows where it must."""
        sequence = self.pick(which, prefilling=False)
        if sequence is None or len(sequence.device_tokens) == MAX_MODEL_LEN:
            return
        position = sequence.num_sent
        if position == len(sequence.table) * self.size:
            block = self.manager.append(sequence.slot)
            assert (block is None) == (not self.plainly_free() and not self.cached)
            if block is None:
                return
            self.took(sequence, block)
        sequence.num_sent += 1
        self.write(sequence, position, position + 1)
        self.sample(sequence, sampled)

    @rule()
    def settle_step(self):
        """The oldest sampled token becomes known; a request that has ended takes none."""
        if not self.in_flight:
            return
        sequence, token = self.in_flight.popleft()
        settlement._accept_token(self.pool, self.epoch, sequence.request, sequence.slot, token, 0)
        num_written = len(sequence.request.token_ids) - 1
        if sequence.alive and num_written % self.size == 0:
            self.enter(sequence, num_written // self.size - 1, num_written // self.size)

    @rule(which=WHICH)
    def free(self, which: int):
        """The sequence ends or is preempted; what is in flight still comes."""
        if not self.sequences:
            return
        sequence = self.sequences.pop(which % len(self.sequences))
        self.epoch.unseat(sequence.request)
        sequence.alive = False
        self.gone.append(sequence)
        held = self.held()
        for block in reversed(sequence.table):
            if not held[block] and block in self.index.values():
                self.cached.append(block)

    @rule(which=st.integers(0, 20), index=st.integers(0, 4))
    def retract(self, which: int, index: int):
        """Forget a block of some sequence, there or gone, and all that was built upon it."""
        everyone = self.sequences + self.gone
        if not everyone:
            return
        sequence = everyone[which % len(everyone)]
        digests = sequence.request.block_digests
        if index >= len(digests):
            return
        salt, tokens = sequence.prefix((index + 1) * self.size)
        self.manager.retract(digests[index], index)
        for prefix in [prefix for prefix in self.index if prefix[0] == salt and prefix[1][: len(tokens)] == tokens]:
            block = self.index.pop(prefix)
            if block in self.cached:
                self.cached.remove(block)

    def pick(self, which: int, *, prefilling: bool) -> Sequence | None:
        able = [one for one in self.sequences if (one.num_sent < one.request.num_prompt_tokens) == prefilling]
        return able[which % len(able)] if able else None

    def sample(self, sequence: Sequence, token: int):
        sequence.device_tokens.append(token)
        self.in_flight.append((sequence, token))

    # --- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def tables_and_reference_counts_agree(self):
        held = self.held()
        assert self.manager.ref_counts == [held[block] for block in range(self.num_blocks)], "a wrong reference count"
        for sequence in self.sequences:
            assert self.manager.table(sequence.slot).tolist() == sequence.table
        assert self.manager.table_lens.sum() == sum(len(sequence.table) for sequence in self.sequences)

    @invariant()
    def free_and_held_blocks_partition_all(self):
        free = [*self.manager._free, *self.manager._cached_free]
        assert sorted([*free, *self.held()]) == list(range(self.num_blocks)), "free and held do not partition all"
        assert set(self.manager._free) == self.plainly_free()
        assert list(self.manager._cached_free) == self.cached
        assert self.manager.num_free_blocks == len(free)
        assert self.manager.num_cached_free_blocks == len(self.cached)

    @invariant()
    def the_index_holds_what_was_written(self):
        cache = self.manager.prefix_cache
        assert len(cache) == len(self.index), "the index is larger or smaller than it should be"
        for (salt, tokens), block in self.index.items():
            digests: list[bytes] = []
            prefix_cache.extend_digests(digests, array("i", tokens), self.size, salt)
            assert block in cache
            assert cache.holder(digests[-1]) == block, "another block than the one that was published"
            assert self.written[block] == (salt, tokens), "the index promises another prefix than the block holds"
        self.manager.check()  # last, so that it hides nothing that the model sees


def new_request(tokens: list[int], salt: str) -> Request:
    prompt = array("i", tokens)
    return Request("", Outbox(), 0, prompt, len(tokens), MAX_MODEL_LEN, Sampling(), [], 0, salt, 0.0, None)
