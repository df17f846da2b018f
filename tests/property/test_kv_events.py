"""What subscribers to the prefix cache are told, held against what the block manager's model knows to be in it."""

import itertools
from array import array

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from scheduler_service.core import kv_events
from scheduler_service.core.kv_events import KvEventLog
from scheduler_service.core.prefix_cache import PrefixCache, extend_digests
from scheduler_service.kv_messages import KvCleared, KvEvents, KvRemoved, KvStored
from tests.property.block_manager_machine import BlockManagerMachine

Tokens = tuple[int, ...]


class Follower:
    """A subscriber: it knows of a block only what it was told, and names prefixes by their tokens."""

    def __init__(self, number: int, *, is_first: bool) -> None:
        self.number = number
        self.is_first = is_first  # nobody had subscribed when it did
        self.believed: dict[int, Tokens] = {}
        self.seen: dict[int, Tokens] = {}
        self.parts_left: int | None = None  # of the snapshot

    def hear(self, message: KvEvents):
        assert message.subscription == self.number
        if self.parts_left is None:
            assert message.snapshot_parts >= 1
            assert message.events[0] == KvCleared()
            self.parts_left = message.snapshot_parts
        assert bool(message.snapshot_parts) == (self.parts_left > 0)
        self.parts_left = max(0, self.parts_left - 1)
        for event in message.events:
            match event:
                case KvStored(hashes, parent, token_ids, block_size):
                    self.store(hashes, parent, np.frombuffer(token_ids, "<i4").reshape(-1, block_size).tolist())
                case KvRemoved(hashes):
                    for name in hashes:
                        removed = self.believed.pop(name, None)
                        assert removed is not None or not self.is_first, "what was never there is removed"
                case KvCleared():
                    self.believed.clear()

    def store(self, hashes: list[int], parent: int | None, blocks: list[list[int]]):
        assert len(hashes) == len(blocks)
        for name, block in zip(hashes, blocks, strict=True):
            assert parent is None or parent in self.seen or not self.is_first, "a child before its parent"
            if parent is None or parent in self.seen:
                self.believed[name] = self.seen[name] = (*(self.seen[parent] if parent is not None else ()), *block)
            parent = name


class KvEventsMachine(BlockManagerMachine):
    """The block manager's life with subscribers that come and go."""

    @initialize(block_size=st.integers(2, 4), num_blocks=st.integers(3, 10))
    def begin(self, block_size: int, num_blocks: int):
        super().begin(block_size, num_blocks)
        self.log = KvEventLog()
        self.log.begin_epoch(self.manager.prefix_cache)
        self.followers: list[Follower] = []
        self.numbers = itertools.count()
        self.follow()

    @rule()
    def follow(self):
        follower = Follower(next(self.numbers), is_first=not self.followers)
        self.followers.append(follower)
        self.log.subscribe("front end", follower.number, follower.hear)
        assert follower.parts_left == 0, "not the whole snapshot came"
        assert set(follower.believed.values()) == self.reachable()

    @rule(which=st.integers(0, 5))
    def unfollow(self, which: int):
        if self.followers:
            follower = self.followers.pop(which % len(self.followers))
            self.log.unsubscribe("front end", follower.number)

    def unsalted(self) -> set[Tokens]:
        return {tokens for salt, tokens in self.index if salt == ""}

    def reachable(self) -> set[Tokens]:
        """Prefixes that a prompt could hit now: everything before them is held too."""
        held = self.unsalted()
        return {one for one in held if all(one[:end] in held for end in range(self.size, len(one), self.size))}

    @invariant()
    def followers_believe_what_the_index_holds(self):
        self.log.flush()
        for follower in self.followers:
            believed = set(follower.believed.values())
            assert len(believed) == len(follower.believed), "one prefix under two names"
            assert believed <= self.unsalted(), "a prefix is believed to be there that is not"
            if follower.number == 0:
                assert believed == self.unsalted(), "a prefix was not told"

    @invariant()
    def nobody_listens_without_a_follower(self):
        assert (self.manager.prefix_cache.observer is None) == (not self.followers)


TestKvEvents = KvEventsMachine.TestCase
TestKvEvents.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

BITE = settings(
    max_examples=200,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


def assert_caught():
    with pytest.raises(AssertionError) as caught:
        run_state_machine_as_test(KvEventsMachine, settings=BITE)
    print(f"{caught.typename}: {caught.value}")


def test_catches_a_salted_prefix_that_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_events, "starts_with_salt", lambda digest, token_ids: False)
    assert_caught()


def test_catches_a_removal_that_is_not_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(KvEventLog, "on_removed", lambda self, digest: None)
    assert_caught()


def test_catches_a_snapshot_without_what_goes_on_from_other_blocks(monkeypatch: pytest.MonkeyPatch):
    def first_blocks(cache: PrefixCache):
        return [entry for entry in original(cache) if entry.index == 0]

    original = kv_events._parents_first
    monkeypatch.setattr(kv_events, "_parents_first", first_blocks)
    assert_caught()


# --- what the machine does not reach ------------------------------------------------------------------------------


def publish(cache: PrefixCache, tokens: list[int], first_block: int = 0):
    """Enter every full block of a prompt; block ids count from `first_block`."""
    prompt, digests = array("i", tokens), []
    extend_digests(digests, prompt, cache.block_size, "")
    for index in range(len(digests)):
        cache.publish(first_block + index, digests, prompt, index)


def subscribed(log: KvEventLog) -> list[KvEvents]:
    heard: list[KvEvents] = []
    log.subscribe("front end", 0, heard.append)
    return heard


def test_the_end_of_an_epoch_clears_and_the_next_one_is_followed():
    log, cache = KvEventLog(), PrefixCache(2)
    log.begin_epoch(cache)
    heard = subscribed(log)
    publish(cache, [1, 2, 3, 4])
    log.end_epoch()
    assert [message.events for message in heard[1:]] == [[KvCleared()]]
    successor = PrefixCache(2)
    log.begin_epoch(successor)
    publish(successor, [1, 2])
    log.flush()
    (stored,) = heard[-1].events
    assert isinstance(stored, KvStored)
    assert np.frombuffer(stored.token_ids, "<i4").tolist() == [1, 2]


def test_a_subscriber_without_an_executor_is_told_that_nothing_is_held():
    assert subscribed(KvEventLog()) == [KvEvents(0, [KvCleared()], snapshot_parts=1)]


def test_the_blocks_of_one_prompt_go_out_as_one_event():
    log, cache = KvEventLog(), PrefixCache(2)
    log.begin_epoch(cache)
    heard = subscribed(log)
    publish(cache, [1, 2, 3, 4, 5, 6])
    log.flush()
    (stored,) = heard[-1].events
    assert isinstance(stored, KvStored)
    assert (len(set(stored.hashes)), stored.parent, stored.block_size) == (3, None, 2)
    assert np.frombuffer(stored.token_ids, "<i4").tolist() == [1, 2, 3, 4, 5, 6]


def test_a_large_snapshot_is_cut_into_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_events, "MAX_EVENT_TOKENS", 6)
    monkeypatch.setattr(kv_events, "MAX_PART_TOKENS", 12)
    log, cache = KvEventLog(), PrefixCache(2)
    log.begin_epoch(cache)
    for number in range(5):
        publish(cache, [100 * number + offset for offset in range(10)], first_block=10 * number)
    heard = subscribed(log)
    assert len(heard) > 1
    assert {message.snapshot_parts for message in heard} == {len(heard)}
    stored = [[event for event in message.events if isinstance(event, KvStored)] for message in heard]
    tokens = [[np.frombuffer(event.token_ids, "<i4").tolist() for event in events] for events in stored]
    assert all(sum(map(len, part)) <= 12 for part in tokens)
    assert sorted(itertools.chain(*itertools.chain(*tokens))) == sorted(
        100 * number + offset for number in range(5) for offset in range(10)
    )


def test_the_subscriptions_of_a_front_end_that_is_gone_are_ended():
    log, cache = KvEventLog(), PrefixCache(2)
    log.begin_epoch(cache)
    log.subscribe("gone", 0, lambda message: None)
    heard = subscribed(log)
    log.unsubscribe("gone")
    publish(cache, [1, 2])
    log.flush()
    assert len(heard) == 2
    log.unsubscribe("front end")
    assert cache.observer is None
