"""Strings that end a text, wherever the borders between its tokens lie.

Of all matches the one that ends first counts, which does not depend on how the text was cut into tokens; of several
that end at the same character, the one named first.
"""

from collections.abc import Iterable, Sequence

from scheduler_service.frontend.detokenizer import Detokenizer


class StoppingDetokenizer:
    """A detokenizer that holds back what may be the start of a stop string, and ends the text with the first match.

    Tokens and their texts are released together, as by Detokenizer; the texts released, joined, are the text up to the
    match. Costs O(1) a token for each stop string unless the text keeps coming close to one.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop_strings: Sequence[str], *, min_tokens: int, include_match: bool
    ) -> None:
        """No match counts that ends in the text of the first `min_tokens` tokens."""
        self.match: str | None = None  # the stop string that ended the text
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._min_tokens = min_tokens
        self._include_match = include_match
        self._num_tokens = 0  # that have a text: released, or held back here
        self._held: list[tuple[list[int], str]] = []  # tokens and their text, in order
        self._held_text = ""  # the texts of `_held`, joined

    def push(self, token_ids: Iterable[int]) -> tuple[list[int], str]:
        """Take new tokens; returns the tokens that are released, in order, and their text.

        With a match, the last of them is the one that completed it; tokens after that one are dropped.
        """
        released: list[int] = []
        texts: list[str] = []
        for token_id in token_ids:
            if self.match is not None:
                break
            self._take(*self._detokenizer.push((token_id,)), released, texts)
        return released, "".join(texts)

    def flush(self) -> tuple[list[int], str]:
        """The end: the tokens still held back and their text, up to a match that they complete."""
        released: list[int] = []
        texts: list[str] = []
        if self.match is None:
            self._take(*self._detokenizer.flush(), released, texts)
        self._release(len(self._held), released, texts)
        return released, "".join(texts)

    def _take(self, token_ids: list[int], text: str, released: list[int], texts: list[str]) -> None:
        """Add tokens that the detokenizer released together, and release what may be."""
        if not token_ids:
            return
        self._num_tokens += len(token_ids)
        if not text and self._held:  # goes with what is held back before it
            self._held[-1][0].extend(token_ids)
            return
        num_known = len(self._held_text)
        self._held.append((token_ids, text))
        self._held_text += text
        if self._num_tokens > self._min_tokens and (found := self._find(num_known)) is not None:
            self.match, end = found
            self._end_text(end, released, texts)
        else:
            self._release(self._num_settled(), released, texts)

    def _find(self, num_known: int) -> tuple[str, int] | None:
        """The match in the held text that ends first, of those that end after `num_known`; and its end."""
        best: tuple[str, int] | None = None
        for stop_string in self._stop_strings:
            start = self._held_text.find(stop_string, max(0, num_known - len(stop_string) + 1))
            if start >= 0 and (best is None or start + len(stop_string) < best[1]):
                best = stop_string, start + len(stop_string)
        return best

    def _end_text(self, end: int, released: list[int], texts: list[str]) -> None:
        assert self.match is not None
        texts.append(self._held_text[: end if self._include_match else end - len(self.match)])
        for token_ids, _ in self._held:
            released += token_ids
        self._held, self._held_text = [], ""

    def _num_settled(self) -> int:
        """How many entries of `_held` end before what may be the start of a match."""
        num_chars = min(self._start_of(stop_string) for stop_string in self._stop_strings)
        if num_chars == len(self._held_text):
            return len(self._held)
        num_entries = 0
        for _, text in self._held:
            num_chars -= len(text)
            if num_chars < 0:
                break
            num_entries += 1
        return num_entries

    def _start_of(self, stop_string: str) -> int:
        """Where the longest end of the held text begins that is a beginning of `stop_string`."""
        text = self._held_text
        start = text.find(stop_string[0], max(0, len(text) - len(stop_string) + 1))
        while start >= 0 and not stop_string.startswith(text[start:]):
            start = text.find(stop_string[0], start + 1)
        return start if start >= 0 else len(text)

    def _release(self, num_entries: int, released: list[int], texts: list[str]) -> None:
        for token_ids, text in self._held[:num_entries]:
            released += token_ids
            texts.append(text)
        del self._held[:num_entries]
        self._held_text = self._held_text[len(self._held_text) - sum(len(text) for _, text in self._held) :]
