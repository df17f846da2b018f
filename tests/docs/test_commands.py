"""Every command line in the documents: programs, targets, modules and flags are there."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from duet.cli.main import COMMANDS, build_parser
from duet.launch import split_flags
from executor_service.config import ExecutorConfig
from scheduler_service.config import SchedulerConfig
from servicekit.settings import parse
from tests.docs.pages import Command, Page, all_pages
from tests.e2e.system import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # pyright: ignore
SERVICES = {
    "scheduler_service": SchedulerConfig,
    "executor_service": ExecutorConfig,
    "executor_service.rank": ExecutorConfig,
}


class Wrong(Exception):
    """The command would not run."""


def check_command(command: Command) -> None:
    """Raises: Wrong."""
    program, *args = command.words
    try:
        if program == "duet":
            check_duet(args, is_whole=command.is_whole)
        elif program == "make":
            check_make(args)
        elif "-m" in args:
            name, *rest = args[args.index("-m") + 1 :]
            check_module(name, rest, is_whole=command.is_whole)
    except SystemExit:
        raise Wrong("it does not parse") from None


def check_duet(args: Sequence[str], *, is_whole: bool) -> None:
    if args[0].startswith("-"):
        build_parser([]).parse_args(args)
        return
    if args[0] not in COMMANDS:
        raise Wrong(f"there is no duet {args[0]}")
    parser = build_parser(args[:1])
    if is_whole:
        _, rest = parser.parse_known_args(args)
    else:
        (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        known = subparsers.choices[args[0]]._option_string_actions
        rest = [word for word in args[1:] if word.startswith("--") and word.partition("=")[0] not in known]
    if rest and args[0] not in ("serve", "gateway"):
        raise Wrong(f"duet {args[0]} does not know {rest}")
    check_service_flags(rest)


def check_service_flags(flags: Sequence[str]) -> None:
    """Flags of either service."""
    for config, part in zip((SchedulerConfig, ExecutorConfig), split_flags(flags), strict=True):
        parse(config, ["--model", "DIR", *part], prog="a service", description="")


def check_make(args: Sequence[str]) -> None:
    if args[0] == "-C":
        if not (ROOT / args[1] / "Makefile").is_file():
            raise Wrong(f"{args[1]} has no Makefile")
        return
    targets = [word for word in args if "=" not in word]
    variables = dict(word.split("=", 1) for word in args if "=" in word)
    if unknown := set(targets) - TARGETS:
        raise Wrong(f"the Makefile has no target {unknown}")
    if unknown := [name for name in variables if f"$({name})" not in MAKEFILE]:
        raise Wrong(f"the Makefile has no variable {unknown}")
    flags = shlex.split(variables.get("ARGS", ""))
    if targets == ["run"] or targets == ["run-gateway"]:
        check_duet(["serve" if targets == ["run"] else "gateway", "DIR", *flags], is_whole=True)
    elif targets in (["run-scheduler"], ["run-executor"]):
        config = SchedulerConfig if targets == ["run-scheduler"] else ExecutorConfig
        parse(config, ["--model", "DIR", *flags], prog="a service", description="")
    elif flags:
        raise Wrong(f"nobody checks ARGS of {targets}")


def check_module(name: str, args: Sequence[str], *, is_whole: bool) -> None:
    if not (ROOT / name.partition(".")[0]).is_dir():
        if name == "pytest" and (missing := [word for word in args if "/" in word and not (ROOT / word).exists()]):
            raise Wrong(f"there is no {missing}")
        return  # another's
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None or spec.origin is None:
        raise Wrong(f"there is no program {name}")
    if name in SERVICES:
        flags = [*args, *(() if "--model" in args else ("--model", "DIR"))]
        if not is_whole and flags[0] == "--help":
            return
        parse(SERVICES[name], flags, prog=name, description="")
        return
    source = Path(spec.origin).read_text()
    for flag in (word.partition("=")[0] for word in args if word.startswith("--")):
        if f'"{flag}"' not in source:
            raise Wrong(f"{name} does not know {flag}")


@pytest.mark.parametrize("page", [page for page in all_pages() if page.commands()], ids=lambda page: page.name)
def test_every_command_line_names_what_is_there(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    for command in page.commands():
        try:
            check_command(command)
        except Wrong as error:
            pytest.fail(f"{page.name}: {' '.join(command.words)}: {error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "line",
    [
        "duet generte Hello",
        "duet generate Hello --max-token-ids 3",
        "duet generate Hello --max-tokens many",
        "duet serve DIR --num-block-sizes 3",
        "make rn",
        "make run MODELS=/path",
        'make run ARGS="--dtype float8"',
        'make run-executor ARGS="--max-waiting 3"',
        "python -m scheduler_service --model DIR --block-size 16",
        "python -m benchmarks.gpu.decode_steps MODEL",
        "python -m benchmarks.gpu.decode_step MODEL --graphs",
        "python -m pytest tests/unit/test_nothing.py",
    ],
)
def test_a_wrong_line_is_noticed(line: str) -> None:
    with pytest.raises(Wrong):
        check_command(Command(tuple(shlex.split(line)), True))
