"""What of a constraint is refused before it is compiled, and how the rest is written down for llguidance."""

import json

import llguidance
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidRequest
from scheduler_service.grammar_source import MAX_CHOICES, MAX_SOURCE_BYTES, to_grammar

LONG = "x" * (MAX_SOURCE_BYTES + 1)


def choice(*texts: str) -> pb.Constraint:
    return pb.Constraint(choice=pb.Choice(texts=texts))


def refusal(constraint: pb.Constraint) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        to_grammar(constraint)
    return caught.value


@pytest.mark.parametrize(
    "constraint",
    [
        pb.Constraint(json_schema='{"type": "integer"}'),
        pb.Constraint(json_object=pb.JsonObject()),
        pb.Constraint(regex="[a-z]+"),
        pb.Constraint(regex=""),
        choice("red", "green"),
        pb.Constraint(grammar='start: "a" | b\nb: "b" b?'),
        pb.Constraint(json_schema=json.dumps({"const": "x" * (MAX_SOURCE_BYTES - 14)})),
        choice(*(str(index) for index in range(MAX_CHOICES))),
    ],
)
def test_every_language_becomes_a_grammar_that_llguidance_takes(constraint: pb.Constraint):
    assert llguidance.LLMatcher.validate_grammar(to_grammar(constraint)) == ""


@pytest.mark.parametrize(
    ("constraint", "field", "message"),
    [
        (pb.Constraint(), "constraint", "needs one of its languages"),
        (pb.Constraint(json_schema="{"), "constraint.json_schema", "not JSON: Expecting property name"),
        (pb.Constraint(json_schema="[" * 60_000), "constraint.json_schema", "not JSON"),
        (pb.Constraint(json_schema="9" * 60_000), "constraint.json_schema", "not JSON"),
        (pb.Constraint(json_schema="true"), "constraint.json_schema", "not an object"),
        (pb.Constraint(json_schema='{"x-guidance": 1}'), "constraint.json_schema", "x-guidance"),
        (pb.Constraint(json_schema=LONG), "constraint.json_schema", "65537 bytes are more than 65536"),
        (pb.Constraint(regex=LONG), "constraint.regex", "65537 bytes are more than 65536"),
        (pb.Constraint(regex="é" * 40_000), "constraint.regex", "80000 bytes"),
        (pb.Constraint(regex="a\\"), "constraint.regex", "half an escape sequence"),
        (pb.Constraint(regex="(?x) a # one\n b"), "constraint.regex", "flag x"),
        (pb.Constraint(grammar=LONG), "constraint.grammar", "65537 bytes are more than 65536"),
        (choice(), "constraint.choice.texts", "at least one text"),
        (choice("a", ""), "constraint.choice.texts", "none of them empty"),
        (choice(LONG[:40_000], LONG[:40_000]), "constraint.choice.texts", "80000 bytes"),
        (choice(*["a"] * (MAX_CHOICES + 1)), "constraint.choice.texts", "1025 texts are more than 1024"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_names_its_field(constraint: pb.Constraint, field: str, message: str):
    error = refusal(constraint)
    assert error.field == field
    assert message in error.message


def test_a_schema_stays_one_schema_whatever_it_contains():
    grammar = json.loads(to_grammar(pb.Constraint(json_schema='{"const": "}}]}, {\\"lark_grammar\\": 1}"}')))
    assert [list(part) for part in grammar["grammars"]] == [["json_schema"]]
    refusal(pb.Constraint(json_schema='{} }, {"lark_grammar": "start: X"'))


def test_the_order_of_properties_is_kept():
    schema = '{"properties": {"b": {"type": "null"}, "a": {"type": "null"}}, "required": ["a", "b"]}'
    assert list(
        json.loads(to_grammar(pb.Constraint(json_schema=schema)))["grammars"][0]["json_schema"]["properties"]
    ) == [
        "b",
        "a",
    ]


def test_white_space_has_an_end_unless_the_schema_says_otherwise():
    def pattern(schema: str) -> str:
        grammar = json.loads(to_grammar(pb.Constraint(json_schema=schema)))
        return grammar["grammars"][0]["json_schema"]["x-guidance"]["whitespace_pattern"]

    assert pattern("{}").endswith("{1,64}")
    assert pattern('{"x-guidance": {"whitespace_pattern": " "}}') == " "


def test_a_grammar_that_looks_like_json_is_still_read_as_a_grammar():
    grammar = to_grammar(pb.Constraint(grammar='{"grammars": [{"json_schema": {}}]}'))
    assert "expecting rule" in llguidance.LLMatcher.validate_grammar(grammar)
