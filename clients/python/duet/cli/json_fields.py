"""Prompts and parameters of a request out of JSON, whose values may be of any type."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from duet.errors import InvalidRequest
from duet.params import Options, SamplingParams, StructuredOutputsParams
from duet.request import Prompt

SAMPLING_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))
OPTION_NAMES = frozenset(Options.__annotations__) - {"request_id"}


def parse_prompt(value: Any, *, chat: bool) -> Prompt:
    """A text, token ids or messages; with `chat` a text is a user's message. Raises: InvalidRequest."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if chat else value
    if isinstance(value, list) and value:
        if all(isinstance(one, int) for one in value):
            return value
        if all(isinstance(one, dict) and _is_content(one.get("content")) for one in value):
            return value
    raise InvalidRequest("a prompt is a text, a list of token ids, or a list of messages", field="prompt")


def change_params(params: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    """The same with other values of some fields. Raises: InvalidRequest, not for all that a server would refuse."""
    if unknown := changes.keys() - SAMPLING_NAMES:
        raise InvalidRequest(f"there is no field {min(unknown)!r}", field=min(unknown))
    values = dict(changes)
    if values.get("logit_bias") is not None:
        values["logit_bias"] = _parse_logit_bias(values["logit_bias"])
    if values.get("structured_outputs") is not None:
        values["structured_outputs"] = _parse_structured_outputs(values["structured_outputs"])
    return dataclasses.replace(params, **values)


def pick_options(options: Options, changes: Mapping[str, Any]) -> Options:
    """The same options with those among `changes`; null leaves one out."""
    changed = options | {name: value for name, value in changes.items() if name in OPTION_NAMES}
    return cast(Options, {name: value for name, value in changed.items() if value is not None})


def _is_content(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) for part in value))


def _parse_logit_bias(value: Any) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in value.items()}
    except (AttributeError, ValueError):
        raise InvalidRequest("logit_bias: token ids and their biases were due", field="logit_bias") from None


def _parse_structured_outputs(value: Any) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**value)
    except TypeError:
        names = ", ".join(field.name for field in dataclasses.fields(StructuredOutputsParams))
        raise InvalidRequest(f"structured_outputs: one of {names} was due", field="structured_outputs") from None
