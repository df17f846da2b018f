"""`duet generate --input`: JSON lines in, JSON lines out, whatever the lines and the files hold."""

import asyncio
import contextlib
import itertools
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details

from duet.cli.batch import map_in_order
from duet.cli.main import main
from duet.retry import Retry
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import ENV, at_once, duet, duet_command
from tests.unit.fake_inference import FakeInference, ServerThread

Run = Callable[..., int]
FAST_RETRY = Retry(max_attempts=4, first_delay_s=0.01, waits_for_queue=True)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def run(server: ServerThread, files: tuple[Path, Path]) -> Run:
    """Runs a batch over `lines`, objects or bytes, with one token each; returns the exit status."""
    source, target = files
    server.service.script = at_once

    def run(lines: Sequence[Any], *flags: str) -> int:
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        source.write_bytes(b"".join(line + b"\n" for line in encoded))
        argv = ["generate", "--input", str(source), "--output", str(target), "--max-tokens", "1"]
        return main([*argv, "--address", server.address, *flags])

    return run


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- lines --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_text_or_tokens_or_messages_and_ids_come_back(
    run: Run, files: tuple[Path, Path], service: FakeInference
) -> None:
    parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    lines = [{"prompt": "ä", "id": "first"}, b"", {"prompt": [5, 6], "id": 7}, b"  ", {"prompt": parts}]
    assert run(lines) == 0
    assert [(one["index"], one.get("id"), one["prompt_tokens"]) for one in records(files[1])] == [
        (0, "first", 2),
        (1, 7, 2),
        (2, None, len("Be brief.")),
    ]
    seen = {request.WhichOneof("prompt"): request for request in service.requests}
    assert (seen["text"].text, list(seen["token_ids"].token_ids.ids)) == ("ä", [5, 6])
    assert seen["chat"].chat.messages[1].parts[0].text == "x"


def test_a_line_overrides_the_flags_and_null_is_the_servers_default(run: Run, service: FakeInference) -> None:
    lines = [
        {"prompt": "a", "temperature": 0.75, "priority": 3},
        {"prompt": "b", "temperature": None, "priority": None},
        {"prompt": "c"},
    ]
    assert run(lines, "--temperature", "0.5", "--priority", "9") == 0
    seen = {request.text: request for request in service.requests}
    assert (seen["a"].sampling.temperature, seen["a"].priority) == (0.75, 3)
    assert not seen["b"].sampling.HasField("temperature")
    assert not seen["b"].HasField("priority")
    assert (seen["c"].sampling.temperature, seen["c"].priority) == (0.5, 9)


def test_with_chat_a_text_is_a_users_message(run: Run, service: FakeInference) -> None:
    assert run([{"prompt": "hi"}, {"prompt": [{"role": "system", "content": "s"}]}], "--chat") == 0
    chats = [[(one.role, one.content) for one in request.chat.messages] for request in service.requests]
    assert sorted(chats) == [[("system", "s")], [("user", "hi")]]


BAD_LINES: list[tuple[Any, str, str | None]] = [
    (b"{", "it is no JSON", None),
    (b"[" * 100_000, "it is no JSON", None),
    (b'"text"', "it is no JSON object", None),
    ({}, "a prompt is", "prompt"),
    ({"prompt": 5}, "a prompt is", "prompt"),
    ({"prompt": []}, "a prompt is", "prompt"),
    ({"prompt": [5, "a"]}, "a prompt is", "prompt"),
    ({"prompt": [{"role": "user", "content": 5}]}, "a prompt is", "prompt"),
    ({"prompt": [{"role": 5, "content": "a"}]}, "role", "chat.messages[0].role"),
    ({"prompt": [-1]}, "token_ids.ids", "token_ids.ids"),
    ({"prompt": "a", "temprature": 1}, "there is no field 'temprature'", "temprature"),
    ({"prompt": "a", "request_id": "mine"}, "there is no field 'request_id'", "request_id"),
    ({"prompt": "a", "top_k": "x"}, "sampling.top_k", "sampling.top_k"),
    ({"prompt": "a", "stop": 5}, "stop.stop_strings", "stop.stop_strings"),
    ({"prompt": "a", "stop_token_ids": 5}, "stop.stop_token_ids", "stop.stop_token_ids"),
    ({"prompt": "a", "logit_bias": [5]}, "logit_bias", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"x": 5}}, "logit_bias", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": "x"}}, "logit_bias", "sampling.logit_bias[5]"),
    ({"prompt": "a", "structured_outputs": {"xml": "x"}}, "structured_outputs", "structured_outputs"),
    ({"prompt": "a", "structured_outputs": "x"}, "structured_outputs", "structured_outputs"),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs", "constraint"),
    ({"prompt": "a", "priority": "x"}, "priority", "priority"),
]


def test_bad_lines_are_told_by_number_and_the_others_answered(
    run: Run, files: tuple[Path, Path], service: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(itertools.chain.from_iterable(({"prompt": [number]}, bad[0]) for number, bad in enumerate(BAD_LINES)))
    assert run(lines) == 1
    written = records(files[1])
    assert [record["index"] for record in written] == list(range(len(lines)))
    assert [record["token_ids"] for record in written[::2]] == [[number] for number in range(len(BAD_LINES))]
    *told, summary = capsys.readouterr().err.splitlines()
    for number, (record, line, (_, message, field)) in enumerate(zip(written[1::2], told, BAD_LINES, strict=True)):
        assert (record["line"], record["error"]["kind"], record["error"].get("field")) == (
            2 * number + 2,
            "InvalidRequest",
            field,
        )
        assert message in record["error"]["message"]
        assert line == f"duet: line {record['line']}: {record['error']['message']}"
    assert summary == f"duet: {len(BAD_LINES)} lines failed, the first is line 2"
    assert len(service.requests) == len(BAD_LINES)


def test_a_line_that_the_server_refuses_is_an_error_with_its_id(
    run: Run, files: tuple[Path, Path], service: FakeInference
) -> None:
    violation = details.BadRequest.FieldViolation(field="sampling.top_p", description="above 0, up to 1")
    refuse = fake.fail(
        grpc.StatusCode.INVALID_ARGUMENT,
        "top_p must be above 0",
        details.ErrorInfo(reason="INVALID"),
        details.BadRequest(field_violations=[violation]),
    )

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for response in (refuse if request.text == "bad" else at_once)(request, context):
            yield response

    service.script = script
    assert run([{"prompt": "a"}, {"prompt": "bad", "id": "\ud800"}, {"prompt": "b"}]) == 1
    first, second, third = records(files[1])
    assert (first["text"], third["text"]) == ("<97>", "<98>")
    error = {
        "kind": "InvalidRequest",
        "message": "top_p must be above 0",
        "field": "sampling.top_p",
        "reason": "INVALID",
    }
    assert (second["id"], second["line"], second["error"]) == ("\ud800", 2, error)


def test_stop_on_error_ends_before_the_bad_line_which_resume_takes_when_it_is_mended(
    run: Run, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": 5}, {"prompt": "c"}]
    assert run(lines, "--stop-on-error") == 1
    assert [record["text"] for record in records(files[1])] == ["<97>", "<98>"]
    assert re.fullmatch(r"duet: line 3: a prompt is .*\n", capsys.readouterr().err)
    lines[2] = {"prompt": "d"}
    assert run(lines, "--stop-on-error", "--resume") == 0
    assert [record["text"] for record in records(files[1])] == ["<97>", "<98>", "<100>", "<99>"]


# --- order and bounds -----------------------------------------------------------------------------------------------


async def test_results_keep_the_order_of_items_and_no_more_than_a_window_is_held() -> None:
    concurrency, count = 4, 200
    read = taken = running = most_running = most_held = 0
    order: list[int] = []

    async def items() -> AsyncIterator[int]:
        nonlocal read, most_held
        for item in range(count):
            read += 1
            most_held = max(most_held, read - taken)
            yield item

    async def work(item: int) -> int:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        await asyncio.sleep(0.02 if item % 50 == 0 else 0.0001 * (item % 7))
        running -= 1
        return item

    def take(result: int) -> None:
        nonlocal taken
        taken += 1
        order.append(result)

    await map_in_order(items(), work, take, concurrency=concurrency)
    assert order == list(range(count))
    assert most_running == concurrency
    assert 2 * concurrency < most_held <= 4 * concurrency + 3  # a slow one in front does not stop the others at once


@pytest.mark.parametrize("culprit", ["items", "work", "take"])
async def test_the_first_error_ends_the_work_that_is_under_way(culprit: str) -> None:
    cancelled: list[int] = []

    async def items() -> AsyncIterator[int]:
        yield 0
        yield 1
        if culprit == "items":
            await asyncio.sleep(0.01)
            raise ZeroDivisionError
        await asyncio.sleep(60)

    async def work(item: int) -> int:
        if item == 0:
            await asyncio.sleep(0.01)
            if culprit == "work":
                raise ZeroDivisionError
            return item
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    def take(item: int) -> None:
        if culprit == "take":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await map_in_order(items(), work, take, concurrency=2)
    assert cancelled == [1]


def test_no_more_streams_run_than_allowed(run: Run, service: FakeInference) -> None:
    service.script = fake.count_up
    assert run([{"prompt": [number]} for number in range(40)], "--concurrency", "3", "--max-tokens", "8") == 0
    assert service.most_running == 3


def test_a_pipe_is_read_no_faster_than_it_is_answered(server: ServerThread) -> None:
    server.service.script = fake.never_end
    argv = duet_command("generate", "--input", "-", "--concurrency", "2", "--address", server.address)
    line = json.dumps({"prompt": "a" * 100_000}).encode() + b"\n"
    num_written = 0

    def write() -> None:
        nonlocal num_written
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            while True:
                process.stdin.write(line)
                num_written += 1

    with subprocess.Popen(argv, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0) as process:
        writer = threading.Thread(target=write)
        writer.start()
        before = -1
        while server.service.most_running < 2 or num_written > before:  # nothing was taken for a while
            before = num_written
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        writer.join()
    assert server.service.most_running == 2
    assert num_written * len(line) < 40 * 2**20  # two buffers of 16 MiB, and a window of twelve lines


def test_outputs_come_before_the_pipe_of_inputs_ends(server: ServerThread) -> None:
    server.service.script = at_once
    argv = duet_command("generate", "--input", "-", "--max-tokens", "1", "--address", server.address)
    with subprocess.Popen(argv, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        for number in range(3):
            process.stdin.write(b'{"prompt": [%d]}\n' % number)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["token_ids"] == [number]
        process.stdin.write(b'{"prompt": [3]}')  # a last line without an end counts
        process.stdin.close()
        assert json.loads(process.stdout.readline())["token_ids"] == [3]
        assert process.wait() == 0


def test_a_line_longer_than_any_request_ends_the_batch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([{"prompt": "a"}, b"x" * (2**24 + 1)]) == 1
    assert capsys.readouterr().err == "duet: line 2 is longer than 16777216 bytes\n"


# --- resuming -------------------------------------------------------------------------------------------------------

LINES = [{"prompt": [number], "id": number} for number in range(8)]


@pytest.mark.parametrize("num_bytes_left", ["none", "half a line", "three lines", "three and a half", "all"])
def test_resuming_an_output_that_ends_anywhere_gives_the_same_bytes(
    run: Run, files: tuple[Path, Path], service: FakeInference, num_bytes_left: str
) -> None:
    assert run(LINES) == 0
    whole = files[1].read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    left = {
        "none": 0,
        "half a line": 9,
        "three lines": ends[2],
        "three and a half": ends[3] - 1,
        "all": ends[-1],
    }[num_bytes_left]
    files[1].write_bytes(whole[:left])
    service.requests.clear()
    assert run(LINES, "--resume") == 0
    assert files[1].read_bytes() == whole
    assert len(service.requests) == len(LINES) - sum(end <= left for end in ends)


def test_resume_without_an_output_begins_one_and_overwrite_begins_anew(run: Run, files: tuple[Path, Path]) -> None:
    assert run(LINES, "--resume") == 0
    assert run(LINES[:2], "--overwrite") == 0
    assert [record["id"] for record in records(files[1])] == [0, 1]


def test_lines_that_failed_before_count_as_failed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "a"}, {"prompt": 5}]
    assert run(lines) == 1
    capsys.readouterr()
    assert run([*lines, {"prompt": "b"}], "--resume") == 1
    assert capsys.readouterr().err == "duet: 1 lines failed, the first is line 2\n"


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ([*LINES[:2], {"prompt": [9], "id": 2}, *LINES[3:]], [], "line 3: it was not made from line 3"),
        ([LINES[0], b"", *LINES[2:]], [], "line 2: it was not made from line 3"),
        (LINES, ["--temperature", "0.9"], "line 1: it was not made from line 1"),
        (LINES, ["--chat"], "line 1: it was not made from line 1"),
        (LINES[:5], [], "line 6: the input has no line for it"),
    ],
)
def test_an_output_of_another_input_is_left_alone(
    run: Run,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    lines: list[Any],
    flags: list[str],
    message: str,
) -> None:
    assert run(LINES) == 0
    whole = files[1].read_bytes()
    assert run(lines, "--resume", *flags) == 1
    assert capsys.readouterr().err.startswith(f"duet: {files[1]}, {message}")
    assert files[1].read_bytes() == whole


def test_a_file_that_is_no_output_is_not_gone_on_with(
    run: Run, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files[1].write_text("something else\n")
    assert run(LINES, "--resume") == 1
    assert capsys.readouterr().err == f"duet: {files[1]}, line 1 is no record of a batch\n"
    assert files[1].read_text() == "something else\n"


# --- trouble --------------------------------------------------------------------------------------------------------


def test_requests_cut_by_a_restart_are_sent_again_as_a_whole(
    run: Run, files: tuple[Path, Path], service: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: dict[str, int] = {}
    monkeypatch.setattr("duet.cli.batch._RETRY", FAST_RETRY)

    async def cut_twice(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        attempts[request.text] = attempts.get(request.text, 0) + 1
        if attempts[request.text] <= 2:
            yield fake.started(request)
            yield fake.delta(0, [1, 2, 3])
            await fake.abort(context, grpc.StatusCode.UNAVAILABLE, "going down")
        async for response in at_once(request, context):
            yield response

    service.script = cut_twice
    assert run([{"prompt": "a"}, {"prompt": "b"}]) == 0
    assert [record["token_ids"] for record in records(files[1])] == [[97], [98]]
    assert attempts == {"a": 3, "b": 3}


def test_a_server_that_stays_away_ends_the_batch_with_status_3(
    run: Run, files: tuple[Path, Path], service: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duet.cli.batch._RETRY", FAST_RETRY)
    go_down = fake.fail(grpc.StatusCode.UNAVAILABLE, "gone", details.ErrorInfo(reason="NO_EXECUTOR"))

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for response in (at_once if request.text < "c" else go_down)(request, context):
            yield response

    service.script = script
    lines = [{"prompt": letter} for letter in "abcd"]
    assert run(lines, "--concurrency", "1") == 3
    assert [record["text"] for record in records(files[1])] == ["<97>", "<98>"]
    service.script = at_once
    assert run(lines, "--resume") == 0
    assert [record["text"] for record in records(files[1])] == ["<97>", "<98>", "<99>", "<100>"]


def test_a_prompt_that_takes_too_long_is_an_error_of_its_line(
    run: Run, files: tuple[Path, Path], service: FakeInference
) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for response in (fake.never_end if request.text == "b" else at_once)(request, context):
            yield response

    service.script = script
    assert run([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], "--timeout", "0.5") == 1
    assert [record.get("error", {}).get("kind") for record in records(files[1])] == [None, "DeadlineExceeded", None]


def test_the_bar_counts_prompts_on_standard_error_where_it_is_wanted(
    server: ServerThread, files: tuple[Path, Path], run: Run
) -> None:
    assert run(LINES[:5]) == 0
    files[0].write_text("".join(json.dumps(line) + "\n" for line in LINES))
    argv = ["generate", "--input", str(files[0]), "--output", str(files[1]), "--resume", "--max-tokens", "1"]
    done = duet(*argv, "--progress", "--address", server.address)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.search(r"Generating: 100%.* 8/8 .*decode \d+ tok/s", done.stderr)
    done = duet(*argv, "--address", server.address)  # standard error is no terminal
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
