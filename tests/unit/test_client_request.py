"""Prompts and parameters as the message that the server gets."""

import dataclasses
import json
from typing import Any

import grpc
import pytest

import duet
from duet import Client, SamplingParams, StructuredOutputsParams
from duet.request import build_request
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import FakeInference

EVERY = SamplingParams(
    0.5,
    7,
    0.25,
    0.125,
    seed=2**64 - 1,
    max_tokens=9,
    ignore_eos=True,
    stop_token_ids=[3, 4],
    n=2,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.75,
    logit_bias={5: -1.5},
    allowed_token_ids=[1, 2],
    banned_token_ids=(2,),
    min_tokens=4,
    stop=["a", "b"],
    include_stop_str_in_output=True,
    logprobs=0,
    prompt_logprobs=3,
    skip_special_tokens=False,
    truncate_prompt_tokens=6,
    structured_outputs=StructuredOutputsParams(regex="a+"),
)


def test_every_parameter_reaches_the_server(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.INVALID_ARGUMENT, "enough")
    with pytest.raises(duet.InvalidRequest, match="enough"):
        client.generate("x", EVERY, priority=-2, cache_salt="s", model="fake", request_id="id", echo=True)
    assert service.requests == [
        pb.GenerateRequest(
            text="x",
            sampling=pb.SamplingParams(
                temperature=0.5,
                top_k=7,
                top_p=0.25,
                min_p=0.125,
                seed=2**64 - 1,
                n=2,
                repetition_penalty=1.5,
                frequency_penalty=-0.5,
                presence_penalty=0.75,
                logit_bias={5: -1.5},
                allowed_token_ids=[1, 2],
                banned_token_ids=[2],
            ),
            stop=pb.StopConditions(
                max_tokens=9,
                min_tokens=4,
                stop_token_ids=[3, 4],
                stop_strings=["a", "b"],
                ignore_eos=True,
                include_stop_string=True,
            ),
            output=pb.OutputOptions(logprobs=0, prompt_logprobs=3, skip_special_tokens=False, echo=True),
            priority=-2,
            cache_salt="s",
            model="fake",
            request_id="id",
            truncate_prompt_tokens=6,
            constraint=pb.Constraint(regex="a+"),
        )
    ]


def test_no_field_of_the_parameters_or_of_the_message_is_left_out_above() -> None:
    defaults = SamplingParams()
    same = [
        field.name for field in dataclasses.fields(EVERY) if getattr(EVERY, field.name) == getattr(defaults, field.name)
    ]
    assert same == []
    message = build_request("x", EVERY, {"echo": True})
    for group in (message.sampling, message.stop, message.output):
        assert {field.name for field, _ in group.ListFields()} == {field.name for field in group.DESCRIPTOR.fields}


def test_what_is_not_given_stays_unset() -> None:
    assert build_request("x", SamplingParams(top_k=-1, max_tokens=None), {}) == pb.GenerateRequest(text="x")
    assert build_request("x", None, {}) == pb.GenerateRequest(text="x", stop=pb.StopConditions(max_tokens=64))


def test_zero_is_not_left_out_where_it_is_no_default() -> None:
    sampling = build_request("x", SamplingParams(temperature=0, seed=0, repetition_penalty=0), {}).sampling
    assert sampling == pb.SamplingParams(temperature=0, seed=0, repetition_penalty=0)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert build_request("x", SamplingParams(stop="end"), {}).stop.stop_strings == ["end"]
    assert build_request("x", SamplingParams(stop=("a", "b")), {}).stop.stop_strings == ["a", "b"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("wanted", "constraint"),
    [
        (StructuredOutputsParams(json="{}"), pb.Constraint(json_schema="{}")),
        (StructuredOutputsParams(json=SCHEMA), pb.Constraint(json_schema=json.dumps(SCHEMA))),
        (StructuredOutputsParams(json_object=True), pb.Constraint(json_object=pb.JsonObject())),
        (StructuredOutputsParams(regex="a+"), pb.Constraint(regex="a+")),
        (StructuredOutputsParams(choice=["a", "b"]), pb.Constraint(choice=pb.Choice(texts=["a", "b"]))),
        (StructuredOutputsParams(choice=[]), pb.Constraint(choice=pb.Choice())),
        (StructuredOutputsParams(grammar='start: "a"'), pb.Constraint(grammar='start: "a"')),
    ],
)
def test_each_structured_output_is_a_constraint(wanted: StructuredOutputsParams, constraint: pb.Constraint) -> None:
    request = build_request("x", SamplingParams(structured_outputs=wanted), {})
    assert (request.HasField("constraint"), request.constraint) == (True, constraint)


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputsParams(),
        StructuredOutputsParams(regex="a", choice=["a"]),
        StructuredOutputsParams(json_object=False),
    ],
)
def test_a_structured_output_in_no_language_or_several_is_refused(wanted: StructuredOutputsParams) -> None:
    with pytest.raises(duet.InvalidRequest) as caught:
        build_request("x", SamplingParams(structured_outputs=wanted), {})
    assert caught.value.field == "constraint"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", pb.GenerateRequest(text="")),
        ("héllo", pb.GenerateRequest(text="héllo")),
        ([], pb.GenerateRequest(token_ids=pb.TokenIds())),
        ((1, 2), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))),
        (
            [{"role": "user", "content": "hi"}],
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            pb.GenerateRequest(
                chat=pb.Chat(
                    messages=[
                        pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a"), pb.ContentPart(text="b")]),
                    ]
                )
            ),
        ),
    ],
)
def test_each_kind_of_prompt_is_sent_as_it_is(
    client: Client, service: FakeInference, prompt: Any, expected: pb.GenerateRequest
) -> None:
    client.generate(prompt, SamplingParams(max_tokens=1))
    (request,) = service.requests
    assert request.WhichOneof("prompt") == expected.WhichOneof("prompt")
    request.ClearField("sampling")
    request.ClearField("stop")
    assert request == expected


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("x", SamplingParams(max_tokens=-1), "stop.max_tokens"),
        ("x", SamplingParams(top_k=-2), "sampling.top_k"),
        ("x", SamplingParams(seed=2**64), "sampling.seed"),
        ("x", SamplingParams(temperature="hot"), "sampling.temperature"),  # type: ignore[arg-type]
        ("x", SamplingParams(stop_token_ids=[-1]), "stop.stop_token_ids"),
        ("x", SamplingParams(frequency_penalty="much"), "sampling.frequency_penalty"),  # type: ignore[arg-type]
        ("x", SamplingParams(logit_bias={-1: 1.0}), "sampling.logit_bias[-1]"),
        ("x", SamplingParams(logit_bias={1: "much"}), "sampling.logit_bias[1]"),  # type: ignore[dict-item]
        ("x", SamplingParams(allowed_token_ids="12"), "sampling.allowed_token_ids"),  # type: ignore[arg-type]
        ("x", SamplingParams(truncate_prompt_tokens=-1), "truncate_prompt_tokens"),
        ("x", SamplingParams(stop=[1]), "stop.stop_strings"),  # type: ignore[list-item]
        ("x", SamplingParams(structured_outputs=StructuredOutputsParams(choice="ab")), "constraint.choice.texts"),
        ([-1], SamplingParams(), "token_ids.ids"),
        (["a", "b"], SamplingParams(), "token_ids.ids"),
        ("\ud800", SamplingParams(), "text"),
        ({"role": "user", "content": "hi"}, SamplingParams(), "prompt"),
        ([{"role": 5, "content": "hi"}], SamplingParams(), "chat.messages[0].role"),
    ],
)
def test_a_value_that_no_message_can_hold_is_refused_by_its_field(
    client: Client, service: FakeInference, prompt: Any, params: SamplingParams, field: str
) -> None:
    with pytest.raises(duet.InvalidRequest) as caught:
        client.generate(prompt, params)
    assert caught.value.field == field
    assert service.requests == []


@pytest.mark.parametrize("name", ["skip_special_tokens", "nonsense", "chat"])
def test_an_option_that_does_not_exist_is_refused(name: str) -> None:
    options: Any = {name: True}
    with pytest.raises(duet.InvalidRequest, match=name):
        build_request("x", None, options)
