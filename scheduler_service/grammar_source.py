"""What a client's Constraint says, as a grammar that LLMatcher of llguidance reads.

Here is checked what can be seen without compiling it; the core's grammar worker compiles it, within limits.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidRequest

MAX_SOURCE_BYTES = 65_536  # of a schema, an expression, a grammar, or all choices together
MAX_CHOICES = 1_024
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}  # without an end it may become all there is


def to_grammar(constraint: pb.Constraint) -> str:
    """The grammar of everything that `constraint` allows.

    Raises: InvalidRequest, which names the field. A grammar that does not compile is refused later, by the core.
    """
    match constraint.WhichOneof("language"):
        case "json_schema":
            return _json_grammar(_schema(constraint.json_schema))
        case "json_object":
            return _json_grammar({"type": "object"})
        case "regex":
            return _regex_grammar(constraint.regex)
        case "choice":
            return _choice_grammar(constraint.choice.texts)
        case "grammar":
            _check_size(len(constraint.grammar.encode()), "constraint.grammar")
            return _lark_grammar(constraint.grammar)
        case _:
            raise InvalidRequest("a constraint needs one of its languages", field="constraint")


def _schema(source: str) -> dict[str, Any]:
    field = "constraint.json_schema"
    _check_size(len(source.encode()), field)
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON schema is not JSON: {error}", field=field) from None
    if not isinstance(schema, dict):
        raise InvalidRequest("the JSON schema is not an object", field=field)
    if not isinstance(schema.get("x-guidance", {}), dict):
        raise InvalidRequest("x-guidance, llguidance's own options, is not an object", field=field)
    return schema


def _json_grammar(schema: dict[str, Any]) -> str:
    options = JSON_OPTIONS | schema.get("x-guidance", {})
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": options}}]})


def _regex_grammar(regex: str) -> str:
    field = "constraint.regex"
    _check_size(len(regex.encode()), field)
    if (len(regex) - len(regex.rstrip("\\"))) % 2:  # llguidance would leave it out
        raise InvalidRequest("the regular expression ends with half an escape sequence", field=field)
    if "\n" in regex and re.search(r"\(\?[a-zA-Z]*x", regex):  # llguidance would let a comment go on
        raise InvalidRequest("the flag x is not supported in an expression of several lines", field=field)
    return llguidance.LLMatcher.grammar_from_regex(regex)


def _choice_grammar(texts: Sequence[str]) -> str:
    field = "constraint.choice.texts"
    if not texts or not all(texts):
        raise InvalidRequest("a choice needs at least one text, and none of them empty", field=field)
    if len(texts) > MAX_CHOICES:
        raise InvalidRequest(f"{len(texts)} texts are more than {MAX_CHOICES}", field=field)
    _check_size(sum(len(text.encode()) for text in texts), field)
    return _lark_grammar("start: " + " | ".join(json.dumps(text) for text in texts))


def _lark_grammar(source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def _check_size(num_bytes: int, field: str) -> None:
    if num_bytes > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"{num_bytes} bytes are more than {MAX_SOURCE_BYTES}", field=field)
