"""What every client program does, beside the Python client."""

import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from duet import SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.clients.programs import Program
from tests.e2e.commands import free_address
from tests.e2e.system import ENDLESS, PATIENCE_S, System
from tests.unit.fake_inference import Context, FakeInference, Script, abort, count_up, delta, fail, started

pytestmark = pytest.mark.timeout(360)  # the first test of each client builds it

USAGE = "usage: generate [--address HOST:PORT] [--max-tokens N] [--chat] PROMPT\n"


def retry_in(milliseconds: int) -> RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(milliseconds)
    return RetryInfo(retry_delay=delay)


def interrupted(process: "subprocess.Popen[bytes]") -> int:
    """The exit status after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    return process.wait(PATIENCE_S)


@pytest.mark.parametrize("prompt", ["Hello", "--", "Привет 😀\n你好 naïve"])
@pytest.mark.parametrize("chat", [False, True])
def test_text_is_that_of_the_python_client(server: System, program: Program, prompt: str, chat: bool) -> None:
    expected = server.client.generate(
        [{"role": "user", "content": prompt}] if chat else prompt, SamplingParams(temperature=0, max_tokens=40)
    )
    done = program.run("--address", server.address, "--max-tokens=40", *(["--chat"] if chat else []), "--", prompt)
    assert done.stdout == expected.text + "\n"
    assert not expected.text.isascii(), "characters beyond ASCII come over whole"
    assert done.status == 0
    assert re.fullmatch(
        rf"request \w+\nfinished: FINISH_REASON_LENGTH, {expected.prompt_tokens} prompt tokens \(\d+ cached\), "
        r"40 output tokens\n",
        done.stderr,
    )


def test_text_comes_as_it_is_generated_and_ctrl_c_cancels_the_request(server: System, program: Program) -> None:
    before = server.load()
    with program.running("--address", server.address, "--max-tokens", str(ENDLESS), "Hello") as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        assert server.load().running_requests == 1
        assert interrupted(process) == 130
    server.wait_idle()
    after = server.load()
    assert after.output_tokens_total - before.output_tokens_total < ENDLESS / 2, "it went on to its end"


def test_program_whose_reader_leaves_ends_with_its_request(server: System, program: Program) -> None:
    with program.running("--address", server.address, "--max-tokens", str(ENDLESS), "Hello") as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        assert server.load().running_requests == 1
        process.stdout.close()
        assert process.wait(PATIENCE_S) != 0
    server.wait_idle()


def test_refused_field_is_named(server: System, program: Program) -> None:
    done = program.run("--address", server.address, "--max-tokens", "0", "Hello")
    assert (done.status, done.stdout) == (1, "")
    assert re.fullmatch(r"error: INVALID_ARGUMENT: [^\n]+ \[field stop\.max_tokens\]\n", done.stderr)


def test_absence_of_a_server_is_an_error_at_once(program: Program) -> None:
    done = program.run("--address", free_address(), "Hello")
    assert (done.status, done.stdout) == (1, "")
    assert re.match(r"error: UNAVAILABLE: [^\n]+\n", done.stderr)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["one", "two"],
        ["--frobnicate", "Hello"],
        ["--address"],
        ["--max-tokens", "many", "Hello"],
        ["--max-tokens=-1", "Hello"],
        ["--max-tokens", str(2**32), "Hello"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told(program: Program, args: list[str]) -> None:
    done = program.run(*args)
    assert (done.status, done.stdout, done.stderr) == (2, "", USAGE)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_refused_request_is_sent_again_when_the_server_says(
    fake: FakeInference, fake_address: str, program: Program, code: grpc.StatusCode
) -> None:
    fake.script = refuse_twice(fake, fail(code, "come back", retry_in(50)))
    done = program.run("--address", fake_address, "--max-tokens", "3", "ab")
    assert (done.status, done.stdout) == (0, "<195><196><197>\n")
    assert done.stderr.startswith(f"{code.name}: come back; trying again in 50 ms\n" * 2 + "request drawn\n")
    assert len(fake.requests) == 3


def refuse_twice(fake: FakeInference, refusal: Script) -> Script:
    async def script(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async for response in (refusal if len(fake.requests) <= 2 else count_up)(request, context):
            yield response

    return script


def test_request_is_sent_five_times_at_most(fake: FakeInference, fake_address: str, program: Program) -> None:
    fake.script = fail(grpc.StatusCode.UNAVAILABLE, "come back", retry_in(1))
    done = program.run("--address", fake_address, "Hello")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.endswith("error: UNAVAILABLE: come back\n")
    assert len(fake.requests) == 5


@pytest.mark.parametrize(
    ("code", "details"),
    [(grpc.StatusCode.RESOURCE_EXHAUSTED, []), (grpc.StatusCode.INTERNAL, [retry_in(1)])],
    ids=["without a delay", "for another reason"],
)
def test_request_is_not_sent_again_without_need(
    fake: FakeInference, fake_address: str, program: Program, code: grpc.StatusCode, details: list[RetryInfo]
) -> None:
    fake.script = fail(code, "no", *details)
    done = program.run("--address", fake_address, "Hello")
    assert (done.status, done.stdout, done.stderr) == (1, "", f"error: {code.name}: no\n")
    assert len(fake.requests) == 1


def test_request_is_not_sent_again_once_text_was_printed(
    fake: FakeInference, fake_address: str, program: Program
) -> None:
    fake.script = fail_after_a_token
    done = program.run("--address", fake_address, "Hello")
    assert (done.status, done.stdout) == (1, "<7>\n")
    assert done.stderr.endswith("error: UNAVAILABLE: gone\n")
    assert len(fake.requests) == 1


async def fail_after_a_token(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
    yield started(request)
    yield delta(0, [7])
    await abort(context, grpc.StatusCode.UNAVAILABLE, "gone", retry_in(1))


def test_cut_stream_is_an_error(fake: FakeInference, fake_address: str, program: Program) -> None:
    fake.script = end_after_a_token
    done = program.run("--address", fake_address, "Hello")
    assert (done.status, done.stdout) == (1, "<7>\n")
    assert done.stderr.endswith("error: DATA_LOSS: the stream was cut\n")


async def end_after_a_token(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
    yield started(request)
    yield delta(0, [7])


def test_ctrl_c_ends_the_wait_for_another_attempt(fake: FakeInference, fake_address: str, program: Program) -> None:
    fake.script = fail(grpc.StatusCode.UNAVAILABLE, "come back", retry_in(3_600_000))
    with program.running("--address", fake_address, "Hello") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"UNAVAILABLE: come back; trying again in 3600000 ms\n"
        assert interrupted(process) == 130
