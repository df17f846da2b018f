"""Running `python -m duet` as a user does."""

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.e2e.system import PATIENCE_S, ROOT

_DUET = (sys.executable, "-m", "duet")


def duet(*args: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command to its end with `text` on its standard input."""
    return subprocess.run(
        [*_DUET, *args], cwd=ROOT, input=text, capture_output=True, encoding="utf-8", timeout=PATIENCE_S, check=False
    )


@contextlib.contextmanager
def running(*args: str, terminal: int | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that goes on, killed at the end of the block where it still does.

    It has the `terminal`, or no input, a pipe for its output, and our own error output.
    """
    stdin, stdout = (subprocess.DEVNULL, subprocess.PIPE) if terminal is None else (terminal, terminal)
    with subprocess.Popen([*_DUET, *args], cwd=ROOT, stdin=stdin, stdout=stdout, stderr=terminal) as process:
        try:
            yield process
        finally:
            process.kill()


class Terminal:
    """A pseudo-terminal: `device` is for the command, the rest for the one who sits before it."""

    def __init__(self) -> None:
        self._keyboard, self.device = os.openpty()

    def close(self) -> None:
        os.close(self._keyboard)
        os.close(self.device)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def read_until(self, text: str) -> str:
        """What is shown from now on, up to `text`; the rest of the same piece is lost."""
        shown = b""
        while text not in (decoded := shown.decode(errors="ignore").replace("\r\n", "\n")):
            assert select.select([self._keyboard], [], [], PATIENCE_S)[0], f"no {text!r} after {decoded!r}"
            shown += os.read(self._keyboard, 4096)
        return decoded


def free_address() -> str:
    """An address of the loopback that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"127.0.0.1:{held.getsockname()[1]}"
