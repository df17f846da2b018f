"""The programs under clients/, built and run as their READMEs say, in a copy of what they are built from."""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.e2e.system import PATIENCE_S, ROOT

_ENVIRONMENT = os.environ | {"LC_ALL": "C.UTF-8"}  # Java takes its command line in the locale's encoding
_LOCAL = shutil.ignore_patterns("build", "node_modules", "__pycache__")


class BuildFailed(Exception):
    """Holds what the build printed."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A program that ran to its end."""

    status: int
    stdout: str
    stderr: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A built client: `command` without its arguments, run in `root`."""

    command: tuple[str, ...]
    root: Path

    def run(self, *args: str) -> "Done":
        """Run it to its end."""
        done = subprocess.run(
            [*self.command, *args],
            cwd=self.root,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        # Bytes, since text mode would turn a carriage return of the model's into a line feed.
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    @contextlib.contextmanager
    def running(self, *args: str) -> "Iterator[subprocess.Popen[bytes]]":
        """A run with pipes for its output, killed at the end of the block where it still goes on."""
        command = [*self.command, *args]
        with subprocess.Popen(
            command, cwd=self.root, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def build(language: str, root: Path) -> Program:
    """Copy the client and the protocols to `root`, and build it there. Raises: BuildFailed."""
    for folder in (f"clients/{language}", "clients/protos", "protos"):
        shutil.copytree(ROOT / folder, root / folder, ignore=_LOCAL)
    build_command, run_command = (shlex.split(line) for line in shell_blocks(language)[-1].splitlines())
    try:
        done = subprocess.run(
            build_command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=PATIENCE_S * 4,
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildFailed(str(error)) from None
    if done.returncode != 0:
        raise BuildFailed(done.stdout)
    *command, prompt = run_command
    assert prompt == "The capital of France is"
    return Program(tuple(command), root)


def shell_blocks(language: str) -> Sequence[str]:
    """The README's blocks of shell commands: the packages to install, then how to build and to run."""
    readme = (ROOT / "clients" / language / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
