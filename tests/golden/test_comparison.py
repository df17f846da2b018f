"""The comparison with the oracle forgives near ties of the oracle's own logits, and nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.golden.oracle import NearTie, Oracle, Reference, assert_same_tokens

REFERENCE = Reference(prompt=[1], tokens=[10, 20, 30, 40], runners_up=[11, 21, 31, 41], gaps=[2.0, 5e-4, 2.0, 2.0])


class Rerun(Oracle):
    """After 10, 21 come 50 and 60; nothing else is asked."""

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Reference:
        """Only the continuation after the near tie is known."""
        assert (list(prompt), num_tokens) == ([1, 10, 21], 2)
        return Reference([1, 10, 21], [50, 60], [51, 61], [3.0, 3.0])


RERUN = Rerun(Path("model"), Path("answers"))


def test_the_references_own_tokens_are_the_same_and_ask_for_nothing() -> None:
    assert assert_same_tokens(REFERENCE.tokens, REFERENCE, RERUN) == []


def test_a_near_tie_is_forgiven_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert assert_same_tokens([10, 21, 50, 60], REFERENCE, RERUN) == [NearTie(1, 20, 21, 5e-4)]
    assert capsys.readouterr().out.count("forgiven") == 1


def test_a_near_tie_at_the_last_token_needs_no_second_run() -> None:
    reference = dataclasses.replace(REFERENCE, gaps=[2.0, 2.0, 2.0, 1e-3])
    assert len(assert_same_tokens([10, 20, 30, 41], reference, RERUN)) == 1


@pytest.mark.parametrize(
    "ours",
    [
        [10, 20, 31, 40],  # the runner-up, far behind
        [10, 22, 50, 60],  # at a near tie, but neither of the two
        [10, 21, 30, 40],  # after the near tie the reference's own words
        [10, 21, 50, 61],
        [10, 20, 30],
        [10, 20, 30, 40, 50],
    ],
)
def test_any_other_difference_fails(ours: list[int]) -> None:
    with pytest.raises(AssertionError, match=r"another token|tokens, not"):
        assert_same_tokens(ours, REFERENCE, RERUN)
