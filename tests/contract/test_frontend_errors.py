"""Every failure of the front end as a gRPC status with its details."""

import re
from typing import Any

import grpc
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import errors, ipc
from scheduler_service.frontend import service, validation
from scheduler_service.frontend.service import SERVICE_NAME
from tests.contract.frontend_harness import WORDS, World, details, failure, fields_at_fault

REFUSED = [
    (pb.GenerateRequest(), "prompt", "InvalidRequest"),
    (pb.GenerateRequest(text=""), "text", "InvalidRequest"),
    (pb.GenerateRequest(text="a", model="x" * 100_000), "model", "InvalidRequest"),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1)),
        "sampling.temperature",
        "InvalidRequest",
    ),
    (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(top_p=2)), "sampling.top_p", "InvalidRequest"),
    (pb.GenerateRequest(text="a", stop=pb.StopConditions(max_tokens=0)), "stop.max_tokens", "InvalidRequest"),
    (
        pb.GenerateRequest(text="a", stop=pb.StopConditions(max_tokens=30_000)),
        "stop.max_tokens",
        "ContextLengthExceeded",
    ),
    (pb.GenerateRequest(text="a", resume_offset=1), "resume_offset", "InvalidRequest"),
    (pb.GenerateRequest(text="x" * 10_000_000), "text", "ContextLengthExceeded"),
    (pb.GenerateRequest(text="ab " * 40_000), "text", "ContextLengthExceeded"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[400])), "token_ids.ids[0]", "InvalidRequest"),
    (pb.GenerateRequest(text="a", constraint=pb.Constraint()), "constraint", "InvalidRequest"),
    (
        pb.GenerateRequest(text="a", constraint=pb.Constraint(json_schema="{")),
        "constraint.json_schema",
        "InvalidRequest",
    ),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(logit_bias={400: 1.0})),
        "sampling.logit_bias[400]",
        "InvalidRequest",
    ),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])),
        "chat.messages[0].content",
        "InvalidRequest",
    ),
]


@pytest.mark.parametrize(("request_", "field", "reason"), REFUSED, ids=[f"{f}-{r}" for _, f, r in REFUSED])
async def test_bad_requests_name_their_field(
    world: World, request_: pb.GenerateRequest, field: str, reason: str
) -> None:
    error = await failure(world.stub.Generate(request_))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert fields_at_fault(error) == [field]
    assert (details(error)["ErrorInfo"].reason, details(error)["ErrorInfo"].domain) == (reason, "duet")
    assert world.core.heard.empty()


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"\xff\xff\xff", "no duet.inference.v1.GenerateRequest message"),
        (b"\x1a\x02\xff\xfe", "UTF-8"),
        (b"\x1a\x84\x80\x80\x08" + b"x" * (16 << 20), "16777216"),
    ],
    ids=["garbage", "invalid UTF-8", "oversize"],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(world: World, payload: bytes, complaint: str) -> None:
    call = world.channel.unary_stream(f"/{SERVICE_NAME}/Generate")(payload)
    error = await failure(call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in (error.details() or "")
    unary = await failure(world.channel.unary_unary(f"/{SERVICE_NAME}/Cancel")(b"\xff"))
    assert unary.code() == grpc.StatusCode.INVALID_ARGUMENT


def all_errors(kind: type[errors.DuetError] = errors.DuetError) -> list[type[errors.DuetError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors()[1:], ids=lambda kind: kind.__name__)
async def test_every_error_of_the_core_keeps_its_status_and_details(world: World, kind: type[errors.DuetError]) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    failed = ipc.Failed(submit.streams[0], kind.code.name, kind.__name__, "as it is", "request_id", retry_after_s=1.25)
    world.core.outputs(submit.streams[0], WORDS, failed=[failed])
    first = await call.read()
    assert list(first.delta.token_ids) == WORDS
    error = await failure(call)
    assert (error.code(), error.details()) == (kind.code, "as it is")
    found = details(error)
    assert found["ErrorInfo"].reason == kind.__name__
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    assert fields_at_fault(error) == ["request_id"]


@pytest.mark.parametrize("language", [{"regex": "(a"}, {"grammar": "start: x"}, {"json_schema": '{"type": "x"}'}])
async def test_a_grammar_that_the_core_cannot_compile_is_told_by_the_field_it_came_in(
    world: World, language: dict[str, Any]
) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", constraint=pb.Constraint(**language)))
    (stream,) = (await world.core.hear(ipc.Submit)).streams
    failed = ipc.Failed(stream, "INVALID_ARGUMENT", "InvalidRequest", "it does not compile", "constraint")
    world.core.outputs(stream, failed=[failed])
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "it does not compile")
    assert fields_at_fault(error) == [f"constraint.{next(iter(language))}"]


async def test_a_bug_is_internal_with_an_id_that_is_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(validation, "check_fields", broken)
    error = await failure(world.stub.Generate(pb.GenerateRequest(text="the fox")))
    assert error.code() == grpc.StatusCode.INTERNAL
    found = re.search(r"internal error (\w{12})", error.details() or "")
    assert found is not None
    assert "a secret" not in (error.details() or "")
    record = next(record for record in caplog.records if found[1] in record.getMessage())
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


async def test_an_unknown_error_of_the_core_is_internal_with_an_id_that_is_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.streams[0], failed=[ipc.Failed(submit.streams[0], "INTERNAL", "Exception", "a secret")])
    error = await failure(call)
    assert error.code() == grpc.StatusCode.INTERNAL
    found = re.search(r"internal error (\w{12})", error.details() or "")
    assert found is not None
    assert "a secret" in next(text for text in caplog.messages if found[1] in text)


async def test_a_write_that_finds_the_client_gone_is_not_our_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def write(request: pb.CancelRequest, context: Any) -> None:
        raise grpc.aio.InternalError("the batch failed")

    context: Any = None  # nothing is told to a client that has left
    with pytest.raises(grpc.aio.InternalError):
        await service.guarded(pb.CancelRequest, write)(b"", context)
    assert caplog.records == []
