"""What a prompt may hit, and what it must never hit. The block size is 4."""

import dataclasses
from array import array
from typing import Any

import pytest

from scheduler_service.core import prefix_cache
from scheduler_service.core.prefix_cache import PrefixCache, extend_digests
from scheduler_service.core.request import Request
from tests.unit.core_harness import LIMITS, Core, continuation

PROMPT = list(range(10, 24))  # three full blocks and two tokens


def cached(request: Request) -> int:
    return request.cached_tokens


def served(core: Core, prompt: list[int], max_tokens: int = 1, **options: Any) -> Request:
    """A request that has run to its end."""
    request = core.submit(prompt, max_tokens, **options)
    core.run()
    assert core.streamed(request) == continuation(prompt, max_tokens)
    return request


def digests_of(token_ids: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, array("i", token_ids), 4, salt)
    return digests


def test_a_repeated_prompt_hits_its_full_blocks():
    core = Core()
    assert cached(served(core, PROMPT)) == 0
    assert cached(served(core, PROMPT)) == 12
    assert core.plans[-1].chunks[0].start == 12


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_at_least_one_token_of_a_prompt_is_computed(length: int, hit: int):
    core = Core()
    served(core, PROMPT)
    assert cached(served(core, PROMPT[:length])) == hit


def test_only_the_common_prefix_is_hit():
    core = Core()
    served(core, PROMPT)
    assert cached(served(core, [*PROMPT[:7], 999, *PROMPT[8:]])) == 4
    assert cached(served(core, [999, *PROMPT[1:]])) == 0


def test_salts_isolate_requests_from_each_other():
    core = Core()
    served(core, PROMPT, salt="tenant-a")
    assert cached(served(core, PROMPT, salt="tenant-b")) == 0
    assert cached(served(core, PROMPT)) == 0
    assert cached(served(core, PROMPT, salt="tenant-a")) == 12


def test_twin_prompts_in_the_same_plan_wait_one_plan_and_then_hit():
    core = Core(dataclasses.replace(LIMITS, max_tokens_per_step=64), inflight=3)
    twins = [core.submit(PROMPT, 3) for _ in range(4)]
    stranger = core.submit(range(100, 114), 3)
    first, second = core.send(), core.send()
    assert first is not None
    assert second is not None
    assert [chunk.request for chunk in first.chunks] == [twins[0], stranger]
    assert [(chunk.request, chunk.start) for chunk in second.chunks] == [(twin, 12) for twin in twins[1:]]
    core.run()
    assert all(core.streamed(twin) == continuation(PROMPT, 3) for twin in twins)


def test_twins_shorter_than_a_block_do_not_wait_for_each_other():
    core = Core()
    twins = [core.submit(PROMPT[:4], 1) for _ in range(3)]
    plan = core.send()
    assert plan is not None
    assert [chunk.request for chunk in plan.chunks] == twins


def test_blocks_of_a_chunked_prompt_are_hit_as_soon_as_the_plan_that_completes_them_is_sent():
    core = Core(dataclasses.replace(LIMITS, max_tokens_per_step=8, num_slots=2), inflight=3)
    core.submit(range(40), 1)
    core.send()
    other = core.submit([*range(8), 999], 1)
    core.send()
    core.send()
    assert other.slot is None, "the chunks of the first prompt fill the budget"
    core.run()
    assert cached(other) == 8


def test_generated_blocks_are_hit_by_the_prompt_that_continues_the_conversation():
    core = Core()
    answer = continuation(PROMPT, 12)
    served(core, PROMPT, 12)
    # 26 tokens are known, of which the last has no KV entry: blocks 0 to 5 are written.
    assert cached(served(core, [*PROMPT, *answer, 7, 8, 9])) == 24


def test_a_generated_block_is_published_only_when_its_last_position_is_written():
    core = Core()
    answer = continuation(PROMPT, 2)
    served(core, PROMPT, 2)
    assert len([*PROMPT, *answer]) == 16
    assert cached(served(core, [*PROMPT, *answer, 7])) == 12, "position 15 has no KV entry"


def test_a_preempted_request_hits_the_blocks_it_left():
    core = Core(dataclasses.replace(LIMITS, num_blocks=10))
    first, second = core.submit(range(8), 20), core.submit(range(100, 108), 20)
    while not second.preemptions:
        core.step()
    core.pool.cancel(first, core.now)
    core.send()
    assert second.slot is not None
    assert second.num_cached_blocks >= 2
    core.run()
    assert core.streamed(second) == continuation(range(100, 108), 20)


def test_a_block_that_another_request_took_is_not_published_for_the_one_that_lost_it():
    core = Core(dataclasses.replace(LIMITS, num_blocks=8), inflight=3)
    first = core.submit(range(8), 24)
    second = core.submit(range(100, 107), 24)
    while not second.preemptions:
        if core.send() is None:
            core.settle()
    published = len(core.epoch.blocks.prefix_cache)
    held_before = set(second.block_digests)
    core.settle()
    core.settle()
    for digest in set(second.block_digests) - held_before:
        assert core.epoch.blocks.prefix_cache.holder(digest) is None
    assert len(core.epoch.blocks.prefix_cache) <= published + 1, "only the first request may have filled a block"
    core.run()
    assert core.streamed(first) == continuation(range(8), 24)
    assert core.streamed(second) == continuation(range(100, 107), 24)


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head():
    core = Core(dataclasses.replace(LIMITS, num_blocks=10))
    served(core, PROMPT)  # leaves 3 cached blocks
    served(core, list(range(100, 114)))
    served(core, PROMPT)  # touches the first again
    served(core, list(range(200, 224)))  # 6 blocks: 4 that hold nothing, and 2 of the second prompt's
    assert len(core.epoch.blocks.find_prefix(digests_of(PROMPT), array("i", PROMPT))) == 3
    second = list(range(100, 114))
    assert len(core.epoch.blocks.find_prefix(digests_of(second), array("i", second))) == 1


def test_a_prefix_that_a_running_request_holds_is_not_evicted():
    core = Core(dataclasses.replace(LIMITS, num_blocks=12))
    holder = core.submit(PROMPT, 30)
    core.step()
    for start in range(100, 400, 50):
        core.submit(range(start, start + 14), 1)
        core.step()
        core.step()
    twin = core.submit(PROMPT, 1)
    core.run()
    assert cached(twin) == 12
    assert core.streamed(holder) == continuation(PROMPT, 30)


def test_the_loss_of_the_executor_clears_the_cache():
    core = Core()
    served(core, PROMPT)
    core.pool.end_epoch()
    core.begin_epoch()
    assert cached(served(core, PROMPT)) == 0


# --- collisions of the digest ----------------------------------------------------------------------------------------


def test_a_prompt_with_the_same_digest_and_other_tokens_is_no_hit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix_cache.xxhash, "xxh3_128_digest", lambda data: bytes(16))
    core = Core()
    served(core, PROMPT)
    assert cached(served(core, list(range(100, 114)))) == 0
    assert core.epoch.blocks.find_prefix(digests_of(PROMPT), array("i", PROMPT)) != []


def test_an_equal_block_behind_another_prefix_is_no_hit():
    cache, token_ids = PrefixCache(4), array("i", PROMPT)
    cache.publish(0, [b"a", b"b"], token_ids, 0)
    cache.publish(1, [b"a", b"b"], token_ids, 1)
    assert cache.match([b"a", b"b"], token_ids, 2) == [0, 1]
    other = array("i", [1, 2, 3, 4, *PROMPT[4:]])
    cache.publish(2, [b"c"], other, 0)
    assert cache.match([b"c", b"b"], other, 2) == [2], "the digest and the tokens are equal, the parent is not"
