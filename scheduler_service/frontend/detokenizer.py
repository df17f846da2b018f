"""Text out of tokens, piece by piece, never half a character.

The usual way (Hugging Face's TextStreamer and TGI) decodes a window of recent tokens twice, with and without the new
ones, and sends the difference. Here the window's head is one fixed ordinary token, the anchor, whose text is known:
what follows it in `decode([anchor, *tokens])` is the tokens' text in the middle of a sentence. That text does not
depend on what came before, except at the very start (SentencePiece-like decoders drop the first space) and inside a
character that is split over tokens, so most tokens' texts are looked up, not decoded.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_ANCHOR_CANDIDATES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_MAX_EAGER_FRAGMENTS = 16  # split characters that never end are decoded only at powers of two beyond this


class Pieces:
    """Texts of single tokens in the middle of a sentence, decoded once each and shared by all streams."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._anchor = find_anchor(tokenizer)
        self._anchor_text = self.decode([self._anchor])
        self._texts: dict[int, str] = {}  # at most one entry a vocabulary entry

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` as a whole continuation."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def decode_inside(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` with other tokens before them."""
        return self.decode([self._anchor, *token_ids])[len(self._anchor_text) :]

    def text(self, token_id: int) -> str:
        """The text of one token with others before it; it holds REPLACEMENT where it is part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode_inside([token_id])
        return text


def find_anchor(tokenizer: Tokenizer) -> int:
    """A token that is one ASCII letter or digit.

    Raises: ValueError where the vocabulary has none.
    """
    for character in _ANCHOR_CANDIDATES:
        token_id = tokenizer.token_to_id(character)
        if token_id is not None and tokenizer.decode([token_id]) == character:
            return token_id
    raise ValueError("no token of the vocabulary is a single ASCII letter or digit")


class Detokenizer:
    """The text of one continuation.

    The texts returned, joined, are `decode` of all tokens. One case differs: a run of byte-fallback tokens (`<0xE4>`)
    that holds invalid bytes, or U+FFFD itself, which a decoder that knows the whole run may replace altogether and
    this one replaces in part. Costs amortised O(1) a token.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._held: list[int] = []  # tokens whose text ends inside a character
        self._at_start = True  # no token with a text has been released yet

    def push(self, token_ids: Iterable[int]) -> tuple[list[int], str]:
        """Take new tokens; returns the tokens that are released, in order, and exactly their text."""
        released: list[int] = []
        texts: list[str] = []
        for token_id in token_ids:
            text = self._pieces.text(token_id)
            if not self._held and REPLACEMENT not in text and not (self._at_start and text):
                released.append(token_id)
                texts.append(text)
                continue
            self._held.append(token_id)
            if self._worth_decoding(text):
                self._release(released, texts)
        return released, "".join(texts)

    def flush(self) -> tuple[list[int], str]:
        """The end: the tokens still held back and their text."""
        released, self._held = self._held, []
        return released, self._decode(released) if released else ""

    def _worth_decoding(self, newest_text: str) -> bool:
        num_held = len(self._held)
        is_whole = newest_text and REPLACEMENT not in newest_text
        return bool(is_whole) or num_held <= _MAX_EAGER_FRAGMENTS or num_held & (num_held - 1) == 0

    def _release(self, released: list[int], texts: list[str]) -> None:
        text = self._decode(self._held)
        cut = len(self._held)
        if text.endswith(REPLACEMENT):
            cut, text = self._settled_head(text)
        if cut:
            released += self._held[:cut]
            texts.append(text)
            del self._held[:cut]
            self._at_start = False

    def _settled_head(self, text: str) -> tuple[int, str]:
        """How many of the held tokens no later one can change, and their text.

        A character has at most 4 bytes, so of four tokens with a text not all can belong to an unfinished one; tokens
        without (special ones that are skipped) may stand inside it. A boundary at which both sides decode to the whole
        is not inside a character.
        """
        places = [index for index, token_id in enumerate(self._held) if self._pieces.text(token_id)]
        if len(places) < 4:
            return 0, ""
        for cut in reversed(places[-3:]):
            head = self._decode(self._held[:cut])
            if head + self._pieces.decode_inside(self._held[cut:]) == text:
                return cut, head
        return 0, ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._pieces.decode(token_ids) if self._at_start else self._pieces.decode_inside(token_ids)
