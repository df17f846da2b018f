"""Every row of the table of vLLM's parameters in docs/parameters.md is true."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from duet.params import SamplingParams, StructuredOutputsParams
from duet.request import build_request
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.frontend.validation import check_fields

WHOLE_PAGE = (Path(__file__).parents[2] / "docs" / "parameters.md").read_text()
PAGE = WHOLE_PAGE.split("\n## OpenAI's requests\n")[0]  # the rest is checked in tests/gateway
ROWS = re.findall(r"^\| (\w+) \| (supported|refused|not applicable) \| `?([\w.]*)`? ?\|(.*)\|$", PAGE, re.MULTILINE)
VALUES: dict[str, Any] = {  # one that is not the default, for each supported parameter
    "n": 3, "presence_penalty": -0.5, "frequency_penalty": 1.5, "repetition_penalty": 1.25, "temperature": 0.5,
    "top_p": 0.75, "top_k": 40, "min_p": 0.25, "seed": 2**64 - 1, "stop": ["END"], "stop_token_ids": [7],
    "ignore_eos": True, "max_tokens": 17, "min_tokens": 2, "logprobs": 20, "prompt_logprobs": 1,
    "skip_special_tokens": False, "include_stop_str_in_output": True, "logit_bias": {5: -2.5},
    "allowed_token_ids": [1, 2], "structured_outputs": StructuredOutputsParams(choice=["yes", "no"]),
}  # fmt: skip
SUPPORTED = {name: path for name, status, path, _ in ROWS if status == "supported"}


def made_of(kind: Any, fields: dict[str, Any]) -> Any:
    return kind(**fields)


def value_at(request: pb.GenerateRequest, path: str) -> Any:
    value: Any = request
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_the_table_has_every_field_of_vllms_class_once() -> None:
    names = [name for name, *_ in ROWS]
    assert len(names) == len(set(names)) == 34
    assert set(VALUES) == set(SUPPORTED)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_parameter_reaches_its_field_and_is_accepted(name: str) -> None:
    request = build_request("a prompt", SamplingParams(**{"max_tokens": 20, name: VALUES[name]}), {})
    plain = build_request("a prompt", SamplingParams(max_tokens=20), {})
    path = SUPPORTED[name]
    assert request != plain
    if isinstance(VALUES[name], int | float | bool):
        assert value_at(request, path) == VALUES[name]
    elif name == "logit_bias":
        assert dict(value_at(request, path)) == VALUES[name]
    elif name == "structured_outputs":
        assert list(request.constraint.choice.texts) == ["yes", "no"]
    else:
        assert list(value_at(request, path)) == VALUES[name]
    check_fields(request, "any")


@pytest.mark.parametrize("name", [name for name, status, *_ in ROWS if status != "supported"])
def test_any_other_parameter_is_refused_by_the_client(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        made_of(SamplingParams, {name: None})


def test_what_the_page_names_beyond_vllm_is_there() -> None:
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert ours - set(SUPPORTED) == {"banned_token_ids", "truncate_prompt_tokens"}
    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag"):
        assert f"`{name}`" in PAGE
        with pytest.raises(TypeError, match=name):
            made_of(StructuredOutputsParams, {name: None})
