"""Stop strings against str.find over the whole text, wherever the borders between its tokens lie."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scheduler_service.frontend.detokenizer import Detokenizer, Pieces
from scheduler_service.frontend.stop_strings import StoppingDetokenizer
from tests.small_model import byte_fallback_bpe, byte_level_bpe

LETTERS = st.text("ab", max_size=4)  # few letters, so that matches and near matches are common
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


class Texts:
    """A detokenizer whose token i reads `texts[i]`; it may hold tokens back and release them with a later one."""

    def __init__(self, texts: Sequence[str], held: Sequence[bool]) -> None:
        self._texts = texts
        self._held = held
        self._waiting: list[int] = []

    def push(self, token_ids: Iterable[int]) -> tuple[list[int], str]:
        released: list[int] = []
        for token_id in token_ids:
            self._waiting.append(token_id)
            if not self._held[token_id]:
                released += self._waiting
                self._waiting = []
        return released, "".join(self._texts[token_id] for token_id in released)

    def flush(self) -> tuple[list[int], str]:
        released, self._waiting = self._waiting, []
        return released, "".join(self._texts[token_id] for token_id in released)


def stopping(
    texts: Sequence[str],
    stops: Sequence[str],
    held: Sequence[bool] | None = None,
    min_tokens: int = 0,
    include: bool = False,
) -> StoppingDetokenizer:
    detokenizer = cast(Detokenizer, Texts(texts, held or [False] * len(texts)))
    return StoppingDetokenizer(detokenizer, stops, min_tokens=min_tokens, include_match=include)


def run(detokenizer: StoppingDetokenizer, num_tokens: int, size: int = 1) -> list[tuple[list[int], str]]:
    """What is released for each push of `size` tokens, and at the end."""
    pushes = [range(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
    return [*(detokenizer.push(token_ids) for token_ids in pushes), detokenizer.flush()]


def first_match(text: str, stops: Sequence[str], after: int) -> tuple[int, str] | None:
    """The match that ends first of those that end beyond `after` characters, by looking at all of the text."""
    ends = []
    for place, stop in enumerate(stops):
        start = text.find(stop, max(0, after - len(stop) + 1))
        if start >= 0:
            ends.append((start + len(stop), place, stop))
    return (min(ends)[0], min(ends)[2]) if ends else None


@given(
    texts=st.lists(LETTERS, max_size=30),
    stops=STOPS,
    min_tokens=st.integers(0, 12),
    include=st.booleans(),
    size=st.integers(1, 5),
    data=st.data(),
)
@example(texts=["ab", "ba", "b"], stops=["abba", "bb"], min_tokens=0, include=False, size=1, data=None)
def test_the_text_ends_where_str_find_over_the_whole_text_says(
    texts: list[str], stops: list[str], min_tokens: int, include: bool, size: int, data: st.DataObject | None
) -> None:
    """Tokens that come together count together: as the first `min_tokens` only where all of them are among them."""
    flags = st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))
    held = data.draw(flags) if data is not None else [False] * len(texts)
    detokenizer = stopping(texts, stops, held, min_tokens, include)
    released = run(detokenizer, len(texts), size)
    token_ids = [token_id for ids, _ in released for token_id in ids]
    text = "".join(text for _, text in released)
    settled = [i + 1 for i in range(len(texts)) if not held[i] or i == len(texts) - 1]  # tokens known together
    num_first = max((count for count in settled if count <= min_tokens), default=0)
    found = first_match("".join(texts), stops, len("".join(texts[:num_first])))
    if found is None:
        assert (detokenizer.match, token_ids, text) == (None, list(range(len(texts))), "".join(texts))
        return
    end, stop = found
    completed = next(count for count in settled if len("".join(texts[:count])) >= end)
    assert (detokenizer.match, token_ids) == (stop, list(range(completed)))
    assert text == "".join(texts)[: end if include else end - len(stop)]


@given(texts=st.lists(LETTERS, max_size=30), stops=STOPS)
def test_a_released_text_is_the_text_of_its_tokens_and_never_the_start_of_a_match(
    texts: list[str], stops: list[str]
) -> None:
    detokenizer = stopping(texts, stops)
    num_released = 0
    for token_id in range(len(texts)):
        token_ids, text = detokenizer.push([token_id])
        if detokenizer.match is not None:
            return
        assert token_ids == list(range(num_released, num_released + len(token_ids)))
        assert text == "".join(texts[released] for released in token_ids)
        num_released += len(token_ids)
        before, known = "".join(texts[:num_released]), "".join(texts[: token_id + 1])
        for stop in stops:
            # No continuation may complete a match that begins in what has left: all that is known must rule it out.
            assert not any(stop.startswith(known[start:]) for start in range(len(before)))


@given(texts=st.lists(LETTERS, max_size=30), stops=STOPS)
def test_nothing_is_held_back_that_no_stop_string_can_begin_with(texts: list[str], stops: list[str]) -> None:
    detokenizer = stopping(texts, stops)
    num_released = 0
    for token_id in range(len(texts)):
        num_released += len(detokenizer.push([token_id])[0])
        if detokenizer.match is not None:
            return
        known = "".join(texts[: token_id + 1])
        safe = min(
            next((start for start in range(len(known)) if stop.startswith(known[start:])), len(known)) for stop in stops
        )
        whole = max(count for count in range(token_id + 2) if len("".join(texts[:count])) <= safe)
        assert num_released == whole


@given(data=st.data(), include=st.booleans())
@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
def test_a_stop_string_cut_out_of_real_text_ends_it_at_its_first_place(
    data: st.DataObject, include: bool, make: Callable[[], Tokenizer]
) -> None:
    tokenizer = make()
    sentence = st.text("the quick brown fox 你好é🎉\n", min_size=1, max_size=60)
    token_ids = tokenizer.encode(data.draw(sentence), add_special_tokens=False).ids
    text = tokenizer.decode(token_ids)
    if not text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 8))]
    detokenizer = StoppingDetokenizer(Detokenizer(Pieces(tokenizer, True)), [stop], min_tokens=0, include_match=include)
    deltas = [detokenizer.push([token_id]) for token_id in token_ids]
    deltas.append(detokenizer.flush())
    end = text.find(stop) + len(stop)
    assert detokenizer.match == stop
    assert "".join(text for _, text in deltas) == text[: end if include else end - len(stop)]
    num_tokens = sum(len(released) for released, _ in deltas)
    assert len(tokenizer.decode(token_ids[:num_tokens])) >= end
    shorter = tokenizer.decode(token_ids[: num_tokens - 1])
    assert len(shorter) < end or "\ufffd" in shorter


def test_of_matches_that_end_together_the_first_named_counts() -> None:
    for stops in (["bc", "abc"], ["abc", "bc"]):
        detokenizer = stopping(["xab", "c"], stops)
        run(detokenizer, 2)
        assert detokenizer.match == stops[0]


def test_the_match_that_ends_first_counts_even_where_another_began_before() -> None:
    detokenizer = stopping(["abcdef"], ["abcdef", "cd"])
    assert run(detokenizer, 1)[0] == ([0], "ab")
    assert detokenizer.match == "cd"


def test_tokens_after_the_match_are_dropped() -> None:
    detokenizer = stopping(["a", "stop", "b"], ["stop"])
    assert detokenizer.push([0, 1, 2]) == ([0, 1], "a")
    assert detokenizer.push([2]) == ([], "")
    assert detokenizer.flush() == ([], "")


def test_a_match_may_begin_within_the_first_tokens_and_end_beyond_them() -> None:
    assert "".join(text for _, text in run(stopping(["xa", "b"], ["ab"], min_tokens=1), 2)) == "x"
    assert "".join(text for _, text in run(stopping(["xab", "c"], ["ab"], min_tokens=1), 2)) == "xabc"


def test_work_does_not_grow_with_the_tokens_without_text_behind_what_is_held_back() -> None:
    """Were it quadratic, 100,000 of them would take longer than any test may."""
    texts = ["a", *[""] * 100_000]
    released = run(stopping(texts, ["ab"]), len(texts))
    assert released[-1] == (list(range(len(texts))), "a")
