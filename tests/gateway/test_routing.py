"""Requests go to the server that holds their prefix."""

import pytest

from tests.gateway.fleet import Fleet, ask

NUM_REQUESTS = 6
WORDS = "the quick brown fox jumps over the lazy dog and a cat sleeps on the warm red mat by an old oak door"


@pytest.mark.parametrize("index", [0, 1])
def test_a_repeated_prefix_goes_to_the_server_that_holds_it(fleet: Fleet, index: int):
    prefix = f"kept by {index}: {WORDS} {WORDS}"
    ask(fleet.replicas[index], prefix)  # not through the gateway, which hears of it by cache events alone
    before = fleet.num_requests()
    usages = [fleet.complete(f"{prefix} {number}", 2).usage for number in range(NUM_REQUESTS)]
    served = [after - then for after, then in zip(fleet.num_requests(), before, strict=True)]
    assert served == [NUM_REQUESTS if number == index else 0 for number in range(2)]
    assert min(usage.prompt_tokens_details.cached_tokens / usage.prompt_tokens for usage in usages) > 0.8
