"""The block manager: what it must keep true whatever happens, and proof that a breach is seen."""

from array import array

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler_service.core import prefix_cache, settlement
from scheduler_service.core.block_manager import BlockManager
from scheduler_service.core.epoch import Epoch
from scheduler_service.core.request import Request
from tests.property.block_manager_machine import BlockManagerMachine

TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

BITE = settings(
    max_examples=300,
    stateful_step_count=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
FAILURES = (AssertionError, KeyError, IndexError, ValueError)


def assert_caught():
    with pytest.raises(FAILURES) as caught:
        run_state_machine_as_test(BlockManagerMachine, settings=BITE)
    print(f"{caught.typename}: {caught.value}")


def test_catches_a_leaked_reference(monkeypatch: pytest.MonkeyPatch):
    def free_all_but_the_first(self: BlockManager, slot: int):
        for block in reversed(self.table(slot)[1:].tolist()):
            self._drop(block)
        self.table_lens[slot] = 0

    monkeypatch.setattr(BlockManager, "free", free_all_but_the_first)
    assert_caught()


def test_catches_a_double_free(monkeypatch: pytest.MonkeyPatch):
    original = BlockManager.free

    def free_the_last_twice(self: BlockManager, slot: int):
        last = int(self.table(slot)[-1])
        original(self, slot)
        if self.ref_counts[last] == 0 and last not in self.prefix_cache:
            self._free.append(last)

    monkeypatch.setattr(BlockManager, "free", free_the_last_twice)
    assert_caught()


def test_catches_the_last_block_counted_as_a_hit(monkeypatch: pytest.MonkeyPatch):
    def find_all(self: BlockManager, digests: list[bytes], token_ids: "array[int]") -> list[int]:
        return self.prefix_cache.match(digests, token_ids, len(token_ids) // self.block_size)

    monkeypatch.setattr(BlockManager, "find_prefix", find_all)
    assert_caught()


def test_catches_the_eviction_of_a_held_block(monkeypatch: pytest.MonkeyPatch):
    def hold_but_leave_evictable(self: BlockManager, block: int):
        self.ref_counts[block] += 1

    def take_unchecked(self: BlockManager) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached_free.popitem(last=False)
            self.prefix_cache.retract(block)
        self.ref_counts[block] = 1
        return block

    monkeypatch.setattr(BlockManager, "_hold", hold_but_leave_evictable)
    monkeypatch.setattr(BlockManager, "_take", take_unchecked)
    assert_caught()


def test_catches_a_block_published_for_a_request_that_no_longer_holds_it(monkeypatch: pytest.MonkeyPatch):
    def publish_whatever_is_there(epoch: Epoch, request: Request, slot: int):
        prefix_cache.extend_digests(
            request.block_digests, request.token_ids, epoch.blocks.block_size, request.cache_salt
        )
        last = (len(request.token_ids) - 1) // epoch.blocks.block_size
        epoch.blocks.publish(slot, request.block_digests, request.token_ids, last - 1, last)

    monkeypatch.setattr(settlement, "_publish_last_block", publish_whatever_is_there)
    assert_caught()


def test_catches_an_eviction_of_the_most_recently_used(monkeypatch: pytest.MonkeyPatch):
    def take_the_latest(self: BlockManager) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached_free.popitem(last=True)
            self.prefix_cache.retract(block)
        self.ref_counts[block] = 1
        return block

    monkeypatch.setattr(BlockManager, "_take", take_the_latest)
    assert_caught()


def test_catches_a_prefix_shared_between_salts(monkeypatch: pytest.MonkeyPatch):
    original = prefix_cache.extend_digests

    def extend_without_salt(digests: list[bytes], token_ids: "array[int]", block_size: int, salt: str):
        original(digests, token_ids, block_size, "")

    monkeypatch.setattr(settlement, "extend_digests", extend_without_salt)
    monkeypatch.setattr(prefix_cache, "extend_digests", extend_without_salt)
    assert_caught()
