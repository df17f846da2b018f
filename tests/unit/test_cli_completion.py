"""`duet completion`: scripts that shells accept and that really complete."""

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from duet.cli.main import COMMANDS, build_parser, main

CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


@pytest.fixture(params=CHECKS)
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Path]:
    assert main(["completion", request.param]) == 0
    path = tmp_path / f"duet.{request.param}"
    path.write_text(capsys.readouterr().out)
    return request.param, path


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)
        yield from (flag for flag in action.option_strings if flag.startswith("--"))


def test_a_script_names_every_command_and_flag(script: tuple[str, Path]) -> None:
    shell, path = script
    text = path.read_text()
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
    flags = set(flags_of(build_parser()))
    assert {"--temperature", "--resume", "--smg-flags", "--scenario"} <= flags
    for flag in flags:
        name = flag if shell != "fish" else f"-l {flag[2:]}"
        assert re.search(rf"{name}\b", text), flag


def test_flags_of_one_command_are_not_offered_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    complete = (
        "source ./script; COMP_WORDS=(duet status --); COMP_CWORD=2; _shtab_duet duet -- status; echo ${COMPREPLY[*]}"
    )
    done = subprocess.run(["bash", "-c", complete], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--help", "--interval", "--json", "--watch", "--address"]


def test_the_shell_accepts_its_script(script: tuple[str, Path]) -> None:
    shell, path = script
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    subprocess.run([*CHECKS[shell], str(path)], check=True)


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator["Bash"]:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for name in ("prompts.jsonl", "model"):
        (tmp_path / name).mkdir() if name == "model" else (tmp_path / name).touch()
    shell = Bash(tmp_path)
    try:
        yield shell
    finally:
        shell.close()


class Bash:
    """An interactive bash on a terminal, with the script read."""

    def __init__(self, directory: Path) -> None:
        self._keyboard, device = pty.openpty()
        settings = "PS1='ready$ '; bind 'set enable-bracketed-paste off'; bind 'set bell-style none'; source ./script\n"
        (directory / "bashrc").write_text(settings)
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--rcfile", "bashrc", "-i"],
            stdin=device,
            stdout=device,
            stderr=device,
            env={"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(directory)},
            cwd=directory,
            start_new_session=True,
        )
        os.close(device)
        self.read_until("ready$ ")

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)

    def read_until(self, text: str) -> str:
        """What is shown up to the end of `text`."""
        seen = ""
        while text not in seen:
            assert select.select([self._keyboard], [], [], 20)[0], f"no {text!r} after {seen!r}"
            seen += os.read(self._keyboard, 4096).decode()
        return seen[: seen.index(text) + len(text)]


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("duet ge", "duet generate "),
        ("duet completion z", "duet completion zsh "),
        ("duet generate --resu", "duet generate --resume "),
        ("duet chat --pres", "duet chat --presence-penalty "),
        ("duet generate --input pro", "duet generate --input prompts.jsonl "),
        ("duet bench --scenario poi", "duet bench --scenario poisson "),
        ("duet serve mo", "duet serve model/"),
    ],
)
def test_bash_completes_at_the_tab_key(bash: Bash, line: str, completed: str) -> None:
    bash.type(f"{line}\t")
    assert bash.read_until(completed) == completed
