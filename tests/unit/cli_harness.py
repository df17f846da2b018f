"""Running `duet` in a process of its own, on pipes or on a terminal, against a fake server."""

import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "clients/python")])
ENV = os.environ | {"PYTHONPATH": PATHS}


def duet_command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "duet", *argv]


def duet(*argv: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, with `text` on its standard input."""
    return subprocess.run(duet_command(*argv), env=ENV, input=text, capture_output=True, encoding="utf-8", check=False)


class Terminal:
    """A command on a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are what they are to a person."""

    def __init__(self, *argv: str) -> None:
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", spawn, *argv],
            env=ENV | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.seen = ""

    def type(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text.encode())

    def interrupt(self) -> None:
        """Type Ctrl-C once the command waits; while readline still takes a key, it would notice only at the next."""
        (command,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        while Path("/proc", command, "stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        self.type("\x03")

    def expect(self, pattern: str) -> str:
        """Read until `pattern` is there, and drop all up to its end; returns what it matched."""
        assert self._process.stdout
        while not (match := re.search(pattern, self.seen)):
            heard = self._process.stdout.read(4096)
            assert heard, f"the command ended without {pattern!r} after {self.seen!r}"
            self.seen += heard.decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match[0]

    def wait(self) -> int:
        with self._process:
            return self._process.wait()

    def kill(self) -> None:
        """End the command where it has not ended; it dies of the terminal's end."""
        with self._process:
            self._process.kill()


async def at_once(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    """What `count_up` says, in one message for each choice, the last choice first."""
    yield fake.started(request)
    tokens = fake.expected_tokens(fake.prompt_tokens(request), request.stop.max_tokens)
    if request.output.echo:
        yield pb.GenerateResponse(prompt=pb.Prompt(text=request.text, token_ids=fake.prompt_tokens(request)))
    for index in reversed(range(request.sampling.n or 1)):
        yield fake.delta(0, [token + 1000 * index for token in tokens], index)
        yield fake.finished(request, len(tokens), index)
