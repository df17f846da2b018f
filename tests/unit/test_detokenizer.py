"""Texts of deltas, joined, are what the tokenizer makes of all tokens at once."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from scheduler_service.frontend.detokenizer import REPLACEMENT, Detokenizer, Pieces, find_anchor
from tests.small_model import byte_fallback_bpe, byte_level_bpe, metaspace_unigram

ids = st.lists(st.integers(0, 420), max_size=40)  # some are beyond the vocabulary, as padded vocabularies have them
cuts = st.lists(st.integers(0, 6), min_size=1, max_size=10)


def feed(detokenizer: Detokenizer, token_ids: Sequence[int], sizes: Sequence[int]) -> list[tuple[list[int], str]]:
    """Deltas of `token_ids` pushed in runs of `sizes`, over and over."""
    deltas, position, turn = [], 0, 0
    while position < len(token_ids):
        size = sizes[turn % len(sizes)] or 1
        deltas.append(detokenizer.push(token_ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [*deltas, detokenizer.flush()]


def joined(deltas: Iterable[tuple[list[int], str]]) -> tuple[list[int], str]:
    deltas = list(deltas)
    return [token_id for released, _ in deltas for token_id in released], "".join(text for _, text in deltas)


def check(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int], skip: bool) -> None:
    deltas = feed(Detokenizer(Pieces(tokenizer, skip)), token_ids, sizes)
    assert joined(deltas) == (token_ids, tokenizer.decode(token_ids, skip_special_tokens=skip))


@settings(deadline=None, max_examples=300)
@given(token_ids=ids, sizes=cuts, skip=st.booleans())
def test_joined_deltas_of_a_byte_level_tokenizer_equal_decoding_everything(
    token_ids: list[int], sizes: list[int], skip: bool
) -> None:
    check(byte_level_bpe(), token_ids, sizes, skip)


@settings(deadline=None, max_examples=300)
@given(token_ids=ids, sizes=cuts, skip=st.booleans())
def test_joined_deltas_of_a_metaspace_tokenizer_equal_decoding_everything(
    token_ids: list[int], sizes: list[int], skip: bool
) -> None:
    check(metaspace_unigram(), token_ids, sizes, skip)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), sizes=cuts, skip=st.booleans())
def test_joined_deltas_of_a_byte_fallback_tokenizer_equal_decoding_everything(
    data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    """Pieces are whole tokens or whole characters in bytes: the exception that Detokenizer names is left out."""
    tokenizer = byte_fallback_bpe()
    characters = st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT)
    in_bytes = characters.map(lambda character: [4 + byte for byte in character.encode()])
    token = st.sampled_from([0, 1, 2, *range(260, tokenizer.get_vocab_size())]).map(lambda token_id: [token_id])
    pieces = data.draw(st.lists(in_bytes | token, max_size=30))
    check(tokenizer, list(itertools.chain.from_iterable(pieces)), sizes, skip)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40), skip=st.booleans())
def test_no_delta_of_valid_text_holds_half_a_character(text: str, skip: bool) -> None:
    text = text.replace(REPLACEMENT, "")
    for tokenizer in (byte_level_bpe(), byte_fallback_bpe()):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        deltas = feed(Detokenizer(Pieces(tokenizer, skip)), token_ids, [1])
        assert not any(REPLACEMENT in delta_text for _, delta_text in deltas)


def test_tokens_of_half_a_character_are_released_with_its_other_half() -> None:
    tokenizer = byte_level_bpe()
    first, *middle, last = tokenizer.encode("🜁").ids  # not in the training text: four tokens of one byte
    detokenizer = Detokenizer(Pieces(tokenizer, True))
    assert [detokenizer.push([token_id]) for token_id in (first, *middle)] == [([], "")] * (1 + len(middle))
    assert detokenizer.push([last]) == ([first, *middle, last], "🜁")


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    tokenizer = byte_level_bpe()
    first = tokenizer.encode("🜁").ids[0]
    detokenizer = Detokenizer(Pieces(tokenizer, True))
    assert detokenizer.push([first]) == ([], "")
    assert detokenizer.flush() == ([first], REPLACEMENT)
    assert detokenizer.flush() == ([], "")


def test_tokens_without_text_are_not_held_back() -> None:
    detokenizer = Detokenizer(Pieces(byte_level_bpe(), True))
    assert detokenizer.push([0, 1]) == ([0, 1], "")


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
@pytest.mark.parametrize("pattern", [[0x80], [0xE4], [0xE4, 0xBD], [0xF0, 0x9F, 0x98], [0xEF, 0xBF, 0xBD]])
def test_endless_garbage_is_released_as_it_comes(make: Callable[[], Tokenizer], pattern: list[int]) -> None:
    tokenizer = make()
    is_byte_level = make is byte_level_bpe
    names = byte_alphabet() if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    token_ids = [id_of(tokenizer, names[byte]) for byte in pattern * 100]
    detokenizer = Detokenizer(Pieces(tokenizer, True))
    num_held = 0
    for token_id in token_ids:
        num_held += 1 - len(detokenizer.push([token_id])[0])
        assert num_held <= 4
    if is_byte_level:
        check(tokenizer, token_ids, [1], True)


def test_decoding_work_stays_linear_where_characters_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token ends one character and begins the next, so that no boundary between tokens is safe."""
    tokenizer = byte_level_bpe()
    alphabet = byte_alphabet()
    tail_and_head = alphabet[0xA0] + alphabet[0xE4] + alphabet[0xBD]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens([tail_and_head])
    straddling = id_of(tokenizer, tail_and_head)
    num_decoded = 0
    decode = Pieces.decode

    def counting(self: Pieces, token_ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(self, token_ids)

    monkeypatch.setattr(Pieces, "decode", counting)
    start = [id_of(tokenizer, alphabet[0xE4]), id_of(tokenizer, alphabet[0xBD])]
    end = [id_of(tokenizer, alphabet[0xA0])]
    token_ids = start + [straddling] * 2000 + end
    deltas = feed(Detokenizer(Pieces(tokenizer, True)), token_ids, [1])
    assert joined(deltas)[1] == "你" * 2001
    assert num_decoded < 30 * len(token_ids)


def test_each_token_is_decoded_once_for_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Pieces(byte_level_bpe(), True)
    token_ids = byte_level_bpe().encode("the quick brown fox").ids
    feed(Detokenizer(pieces), token_ids, [1])
    num_calls = 0
    decode = Pieces.decode

    def counting(self: Pieces, token_ids: Sequence[int]) -> str:
        nonlocal num_calls
        num_calls += 1
        return decode(self, token_ids)

    monkeypatch.setattr(Pieces, "decode", counting)
    feed(Detokenizer(pieces), token_ids * 50, [1])
    assert num_calls <= 2


def test_a_vocabulary_without_letters_has_no_anchor() -> None:
    with pytest.raises(ValueError, match="single ASCII letter"):
        find_anchor(Tokenizer(models.BPE(vocab={"é": 0}, merges=[])))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
