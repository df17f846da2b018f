"""An offline batch of 10,000 prompts: killed in the middle, resumed, in order, in little memory."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import ENV, duet, duet_command
from tests.unit.fake_inference import ServerThread

COUNT = 10_000
PADDING = "x" * 4_000  # so that whoever held all prompts or all outputs would need 40 MB for each


def token_of(number: int) -> int:
    return number * 7_919 % 100_003


def number_of(request: pb.GenerateRequest) -> int:
    return int(request.text.partition(" ")[0])


async def answer_by_number(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    """A token that no other prompt has, and a long text; of those asked together, some are late."""
    number = number_of(request)
    yield fake.started(request)
    if number % 100 == 0:
        await fake.asyncio.sleep(random.Random(number).random() / 50)
    text = f"<{number}>{PADDING}"
    yield pb.GenerateResponse(delta=pb.TokenDelta(token_ids=[token_of(number)], text=text))
    yield fake.finished(request, 1)


def peak_bytes(process: "subprocess.Popen[Any]") -> int:
    """The most memory that a running process ever held."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def write_prompts(file: Path) -> None:
    with file.open("w") as lines:
        for number in range(COUNT):
            lines.write(json.dumps({"id": f"prompt-{number}", "prompt": f"{number} {PADDING}"}) + "\n")


def run_and_measure(argv: list[str]) -> int:
    """Run a command that must succeed; returns the most memory that it held, in bytes."""
    most_bytes = 0
    with subprocess.Popen(argv, env=ENV) as process:
        while process.poll() is None:
            with contextlib.suppress(ValueError, ProcessLookupError):  # it has ended just now
                most_bytes = peak_bytes(process)
            time.sleep(0.02)
    assert process.returncode == 0
    return most_bytes


def measure_one(argv: list[str]) -> int:
    """The most memory that the command holds for a batch of one small prompt, in bytes."""
    with subprocess.Popen(argv, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b'{"prompt": "1 a"}\n')
        process.stdin.flush()
        assert process.stdout.readline()
        return peak_bytes(process)


@pytest.mark.timeout(240)
def test_a_batch_that_was_killed_and_resumed_is_that_of_an_undisturbed_run(
    server: ServerThread, tmp_path: Path
) -> None:
    server.service.script = answer_by_number
    source, target, beginning = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "beginning.jsonl"
    write_prompts(source)
    flags = ["--temperature", "0", "--concurrency", "64", "--address", server.address]
    command = duet_command("generate", "--input", str(source), "--output", str(target), "--resume", *flags)

    with subprocess.Popen(command, env=ENV) as process:
        while not target.exists() or target.stat().st_size < COUNT // 5 * len(PADDING):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    num_before = target.read_bytes().count(b"\n")
    assert COUNT // 6 < num_before < COUNT // 2
    num_asked = len(server.service.requests)
    most_bytes = run_and_measure(command)

    records = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert [record["index"] for record in records] == list(range(COUNT))
    assert [record["id"] for record in records] == [f"prompt-{number}" for number in range(COUNT)]
    assert [record["token_ids"] for record in records] == [[token_of(number)] for number in range(COUNT)]
    assert all(record["text"].startswith(f"<{number}>") for number, record in enumerate(records))
    asked = {number_of(request) for request in server.service.requests[num_asked:]}
    assert asked == set(range(num_before, COUNT))  # and nothing that was there

    few = b"".join(source.read_bytes().splitlines(keepends=True)[: num_before + 9]).decode()
    done = duet("generate", "--input", "-", "--output", str(beginning), *flags, text=few)
    assert done.returncode == 0
    assert target.read_bytes().startswith(beginning.read_bytes())  # to the byte
    assert most_bytes - measure_one(duet_command("generate", "--input", "-", *flags)) < 15 * 2**20
