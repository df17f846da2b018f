"""Every field of a request, in range and out of it."""

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import InvalidRequest
from scheduler_service.frontend import validation
from scheduler_service.frontend.submit import build_submit


def request(**fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "the fox"
    return pb.GenerateRequest(**fields)


NOT_FLOATS = (math.nan, math.inf, -math.inf)
RESUMABLE = {"request_id": "r", "detach_seconds": 1.0}
REFUSED = [
    (pb.GenerateRequest(), "prompt"),
    (request(text=""), "text"),
    (request(token_ids=pb.TokenIds()), "token_ids.ids"),
    (request(chat=pb.Chat()), "chat.messages"),
    (request(request_id=""), "request_id"),
    (request(request_id="x" * 129), "request_id"),
    (request(cache_salt="x" * 129), "cache_salt"),
    (request(model="gpt-5"), "model"),
    (request(model=""), "model"),
    (request(resume_offset=0), "resume_offset"),
    (request(resume_offset=0, request_id="r"), "resume_offset"),
    (request(resume_offset=0, detach_seconds=1), "resume_offset"),
    (request(resume_offset=0, sampling=pb.SamplingParams(n=2), **RESUMABLE), "resume_offset"),
    (request(resume_offset=0, resume_offsets=[0], **RESUMABLE), "resume_offset"),
    (request(resume_offsets=[0, 0], sampling=pb.SamplingParams(n=2)), "resume_offsets"),
    (request(resume_offsets=[0, 0], sampling=pb.SamplingParams(n=3), **RESUMABLE), "resume_offsets"),
    (request(resume_offsets=[0, 0], **RESUMABLE), "resume_offsets"),
    *((request(detach_seconds=seconds), "detach_seconds") for seconds in (0.0, -1.0, 3600.1, *NOT_FLOATS)),
    (request(truncate_prompt_tokens=0), "truncate_prompt_tokens"),
    (request(stop=pb.StopConditions(max_tokens=0)), "stop.max_tokens"),
    (request(stop=pb.StopConditions(max_tokens=4, min_tokens=5)), "stop.min_tokens"),
    (request(stop=pb.StopConditions(stop_strings=["."] * 17)), "stop.stop_strings"),
    (request(stop=pb.StopConditions(stop_strings=[".", ""])), "stop.stop_strings[1]"),
    (request(stop=pb.StopConditions(stop_strings=["é" * 257])), "stop.stop_strings[0]"),
    (request(stop=pb.StopConditions(stop_token_ids=range(65))), "stop.stop_token_ids"),
    (request(output=pb.OutputOptions(logprobs=21)), "output.logprobs"),
    (request(output=pb.OutputOptions(prompt_logprobs=21)), "output.prompt_logprobs"),
    (
        request(constraint=pb.Constraint(regex="a"), sampling=pb.SamplingParams(allowed_token_ids=[1])),
        "constraint",
    ),
    (
        request(sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
        "sampling.logit_bias",
    ),
    *(
        (request(sampling=pb.SamplingParams(logit_bias={3: 1.0, 7: bias})), "sampling.logit_bias[7]")
        for bias in (-100.1, 100.1, *NOT_FLOATS)
    ),
    *(
        (request(sampling=pb.SamplingParams(**{name: value})), f"sampling.{name}")
        for name, values in {
            "temperature": (-0.1, 100.1, *NOT_FLOATS),
            "top_p": (0.0, 2.0, -1.0, *NOT_FLOATS),
            "min_p": (-0.1, 1.1, *NOT_FLOATS),
            "n": (0, 129),
            "repetition_penalty": (0.0, 0.0099, 100.1, -1.0, *NOT_FLOATS),
            "frequency_penalty": (-2.1, 2.1, *NOT_FLOATS),
            "presence_penalty": (-2.1, 2.1, *NOT_FLOATS),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("refused", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_field_out_of_range_is_named(refused: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validation.check_fields(refused, "tiny")
    assert caught.value.field == field


@pytest.mark.parametrize(
    "accepted",
    [
        request(),
        request(request_id="x" * 128, model="tiny", priority=-5, cache_salt="salt", truncate_prompt_tokens=1),
        request(sampling=pb.SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, n=1, seed=0)),
        request(
            sampling=pb.SamplingParams(temperature=100, top_k=2**32 - 1, top_p=1e-6, min_p=1, n=128, seed=2**64 - 1)
        ),
        request(
            sampling=pb.SamplingParams(repetition_penalty=0.01, frequency_penalty=-2, presence_penalty=-2),
        ),
        request(
            sampling=pb.SamplingParams(repetition_penalty=100, frequency_penalty=2, presence_penalty=2),
        ),
        request(sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1024), 100.0))),
        request(sampling=pb.SamplingParams(logit_bias={0: -100.0}, allowed_token_ids=[1, 1], banned_token_ids=[2])),
        request(stop=pb.StopConditions(max_tokens=1, min_tokens=0, stop_token_ids=range(64), ignore_eos=True)),
        request(stop=pb.StopConditions(max_tokens=4, min_tokens=4, stop_strings=["é" * 256] * 16)),
        request(stop=pb.StopConditions(min_tokens=2**32 - 1, include_stop_string=True)),
        request(output=pb.OutputOptions(logprobs=0, prompt_logprobs=0, echo=True, skip_special_tokens=False)),
        request(output=pb.OutputOptions(logprobs=20, prompt_logprobs=20)),
        request(constraint=pb.Constraint(regex="a"), sampling=pb.SamplingParams(banned_token_ids=[1])),
        request(detach_seconds=1e-9),
        request(detach_seconds=3600),
        request(resume_offset=0, **RESUMABLE),
        request(resume_offset=2**64 - 1, **RESUMABLE),
        request(resume_offsets=[0, 2**64 - 1], sampling=pb.SamplingParams(n=2), **RESUMABLE),
    ],
)
def test_the_ends_of_every_range_are_accepted(accepted: pb.GenerateRequest) -> None:
    validation.check_fields(accepted, "tiny")
    submit = build_submit(
        accepted,
        [1, 2],
        streams=[7],
        eos_token_ids=[2],
        vocab_size=2000,
        arrival=1.5,
        deadline=None,
        constraint=None,
        tenant="",
    )
    assert ipc.encode_frame(submit)


def test_every_field_of_a_request_is_in_the_tables_above() -> None:
    """A field that is added to the protocol fails here until its range is tested."""
    tested = {field.split("[")[0].split(".ids")[0].split(".messages")[0] for _, field in REFUSED}
    assert {"prompt"} | field_paths(pb.GenerateRequest()) - {
        "priority",  # any value is in range for these
        "sampling.top_k",
        "sampling.seed",
        "sampling.allowed_token_ids",  # see test_prompt: they are checked against the vocabulary
        "sampling.banned_token_ids",
        "stop.ignore_eos",
        "stop.include_stop_string",
        "output.skip_special_tokens",
        "output.echo",
    } == tested


def field_paths(message: Any, path: str = "") -> set[str]:
    """The paths of all fields; those of prompts and constraints as a whole."""
    paths = set()
    for field in message.DESCRIPTOR.fields:
        is_group = field.name in {"sampling", "stop", "output"}
        paths |= field_paths(getattr(message, field.name), f"{field.name}.") if is_group else {path + field.name}
    return paths


def test_an_unknown_model_is_told_the_served_one() -> None:
    with pytest.raises(InvalidRequest, match="'tiny'"):
        validation.check_fields(request(model="gpt-5"), "tiny")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_invalid_request(payload: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        validation.parse(pb.GenerateRequest, payload)


def test_a_string_that_is_not_utf8_is_no_message() -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        validation.parse(pb.GenerateRequest, b"\x1a\x02\xff\xfe")


def test_a_message_over_the_size_limit_is_refused() -> None:
    payload = request(text="x" * validation.MAX_REQUEST_BYTES).SerializeToString()
    with pytest.raises(InvalidRequest, match="16777216"):
        validation.parse(pb.GenerateRequest, payload)
