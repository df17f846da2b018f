"""Masks against languages that are written out, word for word, and against jsonschema and re.

The tokens' bytes come from the tokenizer's own byte-level alphabet, not from llguidance.
"""

import itertools
import json
import random
import re
from collections.abc import Iterable
from typing import Any

import jsonschema
import msgspec
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.grammar_jobs import Compile
from scheduler_service.core.matcher import Compiler, ConstrainedText, GrammarError
from scheduler_service.grammar_source import to_grammar
from tests.small_model import EOS, byte_fallback_bpe, byte_level_bpe, metaspace_unigram

TOKENIZER = byte_level_bpe()
VOCAB_SIZE = TOKENIZER.get_vocab_size()
COMPILER = Compiler(TOKENIZER.to_str(), VOCAB_SIZE)
MAX_STEPS = 400


def byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


ALPHABET = byte_alphabet()
TOKENS = {
    token_id: bytes(ALPHABET[character] for character in token)
    for token, token_id in TOKENIZER.get_vocab().items()
    if not token.startswith("<|")
}


def begin(constraint: pb.Constraint, **changes: Any) -> ConstrainedText:
    job = msgspec.structs.replace(Compile(0, "", b"", [EOS, 0], [EOS, 0], [], 0), **changes)
    return ConstrainedText(COMPILER, COMPILER.compile(to_grammar(constraint)), job)


def tokens_of(mask: int) -> set[int]:
    return {token for token in range(mask.bit_length()) if mask >> token & 1}


def after(constraint: pb.Constraint, token_ids: Iterable[int], **changes: Any) -> ConstrainedText:
    text = begin(constraint, **changes)
    for token in token_ids:
        text.consume(token)
    return text


def choice(*texts: str) -> pb.Constraint:
    return pb.Constraint(choice=pb.Choice(texts=texts))


def regex_words(regex: str, letters: str, most: int) -> list[str]:
    words = ("".join(word) for n in range(most + 1) for word in itertools.product(letters, repeat=n))
    return [word for word in words if re.fullmatch(regex, word)]


COLOURS = ["red", "green", "greenish", "réd", "re", "日本", "日本語", "😀🎉", 'say "hi"\n', "a\\b", "<|im_end|>", "\t"]
COMPACT = {"whitespace_flexible": False, "whitespace_pattern": None}
LANGUAGES = [
    (choice(*COLOURS), COLOURS),
    (pb.Constraint(regex="(ab|ba){1,3}c?"), regex_words("(ab|ba){1,3}c?", "abc", 7)),
    (pb.Constraint(regex="a{2,4}|b?a"), regex_words("a{2,4}|b?a", "ab", 4)),
    (
        pb.Constraint(grammar="start: a b?\na: /[xy]/ | \"zz\"\nb: a a\n"),
        [x + y for x in ("x", "y", "zz") for y in ("", *(p + q for p in ("x", "y", "zz") for q in ("x", "y", "zz")))],
    ),
    (
        pb.Constraint(json_schema=json.dumps({"enum": [1, 12, "é", None, [True], {"k": -2}], "x-guidance": COMPACT})),
        ["1", "12", '"é"', "null", "[true]", '{"k":-2}'],
    ),
]  # fmt: skip


def walk(constraint: pb.Constraint, words: list[bytes]) -> set[bytes]:
    """Every text that masks let through, each mask compared with the words that begin as the text does."""
    texts: set[bytes] = set()
    stack: list[tuple[int, ...]] = [()]
    while stack:
        token_ids = stack.pop()
        prefix = b"".join(TOKENS[token] for token in token_ids)
        allowed = tokens_of(after(constraint, token_ids).next_mask())
        rests = [word[len(prefix) :] for word in words if word.startswith(prefix)]
        possible = {t for t, data in TOKENS.items() if any(rest.startswith(data) for rest in rests)}
        assert allowed & {EOS, 0} == ({EOS, 0} if b"" in rests else set()), f"the end after {prefix}"
        is_forced = len({rest[:1] for rest in rests}) == 1
        if is_forced:  # llguidance allows only the token with which the tokenizer itself would go on
            assert allowed - {EOS, 0} <= possible, f"after {prefix}"
            assert allowed
        else:
            assert allowed - {EOS, 0} == possible, f"after {prefix}"
        texts |= {prefix} if EOS in allowed else set()
        stack += [(*token_ids, token) for token in allowed - {EOS, 0}]
    return texts


@pytest.mark.parametrize(("constraint", "words"), LANGUAGES, ids=lambda v: str(v)[:40])
def test_masks_allow_the_words_of_a_language_and_nothing_else(constraint: pb.Constraint, words: list[str]):
    expected = {word.encode() for word in words}
    assert walk(constraint, sorted(expected)) == expected


# --- random texts under masks ----------------------------------------------------------------------------------------


def sample(constraint: pb.Constraint, rng: random.Random) -> str | None:
    """A text drawn token by token, or None where it does not end soon."""
    text, data = begin(constraint), b""
    for _ in range(MAX_STEPS):
        allowed = sorted(tokens_of(text.next_mask()))
        token = rng.choice(allowed)
        if token in (EOS, 0):
            return data.decode()
        data += TOKENS[token]
        text.consume(token)
    return None


def samples(constraint: pb.Constraint, least: int) -> list[str]:
    drawn = [sample(constraint, random.Random(seed)) for seed in range(70)]
    texts = [text for text in drawn if text is not None]
    assert len(texts) >= least, "hardly any text ended"
    return texts


SCHEMAS = [
    {"type": "object"},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 300}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
            "more": {"$ref": "#/$defs/more"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
        "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "number", "multipleOf": 0.5}]}},
    },
    {"type": "string", "format": "date-time"},
    {"type": "string", "pattern": "^[A-F]{2}-\\d{1,3}$"},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_texts_under_a_schema_parse_and_validate_by_another_library(schema: dict[str, object]):
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for text in samples(pb.Constraint(json_schema=json.dumps(schema)), least=15):
        validator.validate(json.loads(text))


def test_a_json_object_is_one():
    assert all(isinstance(json.loads(text), dict) for text in samples(pb.Constraint(json_object=pb.JsonObject()), 15))


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{1,8}@[a-z]{1,8}\.(com|org)",
        r"([0-9]{1,3}\.){3}[0-9]{1,3}",
        r"[^\x00-\x7f]{1,3}",
        r"(?i)yes|no",
        r" ?[0-9a-f]{2,5}[^a-z]",
        r"/[^/]{1,5}/|\"[^\"\n]{0,4}\"",
        r"^anchored$",
        r"line\n{1,2}break",
    ],
)
def test_texts_under_an_expression_match_it_as_a_whole_by_another_library(regex: str):
    assert all(re.fullmatch(regex, text) for text in samples(pb.Constraint(regex=regex), least=35))


def test_texts_of_a_grammar_are_derived_from_it():
    arithmetic = 'start: sum\nsum: term (("+" | "-") term)*\nterm: atom ("*" atom)*\natom: /[1-9]/ | "(" sum ")"'
    texts = samples(pb.Constraint(grammar=arithmetic), least=35)
    assert max(map(len, texts)) > 5
    for text in texts:
        assert re.fullmatch(r"[-+*()1-9]+", text)
        assert isinstance(eval(text), int)


# --- ends, bans and minima -------------------------------------------------------------------------------------------


def ids(*texts: str) -> set[int]:
    return {token for token, data in TOKENS.items() if data.decode(errors="replace") in texts}


def test_the_end_comes_by_those_tokens_of_the_model_that_end_the_request():
    a = ids("a")
    assert tokens_of(after(choice("a"), a).next_mask()) == {0, EOS}
    assert tokens_of(after(choice("a"), a, stop_token_ids=[EOS]).next_mask()) == {EOS}
    assert tokens_of(after(choice("a"), a, stop_token_ids=[EOS, 0, 77]).next_mask()) == {0, EOS}
    assert after(choice("a"), a, stop_token_ids=[]).next_mask() == 0, "the core ends it"
    assert after(choice("a"), a, stop_token_ids=[77]).next_mask() == 0
    assert after(choice("a"), a, end_token_ids=[]).next_mask() == 0
    assert after(choice("a"), a, banned_token_ids=[0, EOS]).next_mask() == 0
    assert tokens_of(after(choice("a"), a, banned_token_ids=[0]).next_mask()) == {EOS}


def test_banned_tokens_are_left_out_while_anything_else_is_left():
    x, y = ids("x"), ids("y")
    constraint = pb.Constraint(regex="[xy]*")
    both = tokens_of(begin(constraint).next_mask())
    assert tokens_of(begin(constraint, banned_token_ids=list(x)).next_mask()) == both - x
    assert tokens_of(begin(constraint, banned_token_ids=list(both - {EOS})).next_mask()) == {EOS}
    assert begin(constraint, banned_token_ids=list(both)).next_mask() == 0, "the empty text is one of the language"
    assert tokens_of(begin(choice("x"), banned_token_ids=list(x)).next_mask()) == x, "the constraint wins"
    assert tokens_of(begin(choice("x", "y"), banned_token_ids=list(x)).next_mask()) == y


def test_nothing_ends_before_min_tokens_unless_the_text_is_complete():
    x, comma = ids("x"), ids(",")
    constraint = pb.Constraint(regex="[x,]*")
    stops = [EOS, *comma]
    for num_tokens, may_end in ((0, False), (1, False), (2, True)):
        text = after(constraint, [*x] * num_tokens, stop_token_ids=stops, min_tokens=2)
        assert ({EOS, *comma} <= tokens_of(text.next_mask())) == may_end
        assert may_end or not tokens_of(text.next_mask()) & {0, EOS, *comma}
    assert tokens_of(after(choice("x"), x, min_tokens=9).next_mask()) == {0, EOS}, "the constraint wins"
    assert after(choice("x"), x, min_tokens=9, stop_token_ids=[]).next_mask() == 0
    assert tokens_of(begin(choice(","), stop_token_ids=stops, min_tokens=9).next_mask()) == comma


@pytest.mark.parametrize(("name", "special"), [("<|im_end|>", EOS), ("<|endoftext|>", 0), ("<|im_start|>", 1)])
def test_a_grammar_may_name_special_tokens_even_those_that_end_requests(name: str, special: int):
    constraint = pb.Constraint(grammar=f'start: "a" {name} "b"')
    a, b = ids("a"), ids("b")
    assert tokens_of(after(constraint, a).next_mask()) == {special}
    assert tokens_of(after(constraint, [*a, special]).next_mask()) == b
    assert tokens_of(after(constraint, [*a, special, *b]).next_mask()) == {0, EOS}


def test_masks_do_not_reach_beyond_the_vocabulary_of_the_model():
    small = Compiler(TOKENIZER.to_str(), 300)  # the tokenizer has more
    text = ConstrainedText(
        small, small.compile(to_grammar(pb.Constraint(regex=".*"))), Compile(0, "", b"", [], [], [], 0)
    )
    assert 250 < text.next_mask().bit_length() <= 300
    large = Compiler(TOKENIZER.to_str(), VOCAB_SIZE + 40)
    text = ConstrainedText(
        large, large.compile(to_grammar(pb.Constraint(regex=".*"))), Compile(0, "", b"", [], [], [], 0)
    )
    assert text.next_mask().bit_length() <= VOCAB_SIZE


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (pb.Constraint(regex="(?=a)b"), "look-around"),
        (pb.Constraint(regex="(a"), "unclosed group"),
        (pb.Constraint(regex="(" * 5_000 + ")" * 5_000), "invalid regex"),
        (pb.Constraint(grammar="start: x"), 'unknown name: "x"'),
        (pb.Constraint(grammar='x: "a"'), "no start rule"),
        (pb.Constraint(grammar="start: <|nobody|>"), "unknown special token"),
        (pb.Constraint(grammar="start: " + "(" * 5_000 + '"a"' + ")" * 5_000), "too deeply nested"),
        (pb.Constraint(json_schema='{"type": "colour"}'), "colour"),
        (pb.Constraint(json_schema='{"not": {}}'), "not"),
        (pb.Constraint(json_schema='{"allOf": [{"type": "string"}, {"type": "null"}]}'), "Unsatisfiable"),
        (pb.Constraint(json_schema='{"anyOf": [' * 200 + "{}" + "]}" * 200), "recursion limit"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_grammar_that_does_not_compile_says_why(constraint: pb.Constraint, message: str):
    with pytest.raises(GrammarError, match=re.escape(message)) as caught:
        begin(constraint)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(
    "constraint",
    [
        pb.Constraint(json_schema='{"$ref": "#"}'),
        pb.Constraint(regex=r"[^\s\S]"),
        pb.Constraint(grammar="start: start"),
    ],
)
def test_a_language_without_a_text_is_refused(constraint: pb.Constraint):
    text = begin(constraint)
    with pytest.raises(GrammarError, match="no text satisfies the constraint"):
        text.next_mask()


def test_a_grammar_that_reaches_its_limits_on_the_way_is_refused_there():
    text, (a,) = begin(pb.Constraint(regex="(((a?){100}){100}){100}")), ids("a")
    for _ in range(10):
        assert tokens_of(text.next_mask()) >= {a, EOS}
        text.consume(a)
    with pytest.raises(GrammarError, match="too many expressions"):
        consume_and_mask(text, [a] * 100)


def consume_and_mask(text: ConstrainedText, token_ids: list[int]) -> None:
    for token in token_ids:
        text.consume(token)
        text.next_mask()


def test_a_token_that_no_mask_allowed_is_an_error():
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar"):
        after(choice("red"), ids("x")).next_mask()


def test_tokenizers_with_byte_fallback_are_read_and_others_refused():
    tokenizer = byte_fallback_bpe()
    compiler = Compiler(tokenizer.to_str(), tokenizer.get_vocab_size())
    text = ConstrainedText(
        compiler, compiler.compile(to_grammar(choice("he", "é"))), Compile(0, "", b"", [], [], [], 0)
    )
    h, he, first_byte = (tokenizer.token_to_id(token) for token in ("h", "he", "<0xC3>"))
    assert {h, he, first_byte} <= tokens_of(text.next_mask())
    with pytest.raises(ValueError, match="decoder"):
        Compiler(metaspace_unigram().to_str(), metaspace_unigram().get_vocab_size())
    plain = json.loads(TOKENIZER.to_str()) | {"added_tokens": []}
    with pytest.raises(ValueError, match="no special token"):
        Compiler(json.dumps(plain), VOCAB_SIZE)
