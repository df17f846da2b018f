"""`duet completion`: a script that teaches a shell these commands and their flags."""

import argparse
from typing import Any

import shtab

from duet.cli.main import build_parser

_INSTALL = """\
To have it in every shell from now on:
  bash  duet completion bash > ~/.local/share/bash-completion/completions/duet
  zsh   duet completion zsh > DIR/_duet, where DIR is a directory of $fpath
  fish  duet completion fish > ~/.config/fish/completions/duet.fish
"""
_PATHS = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}  # what completes a value, by its metavar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Print a script that completes commands, flags, choices and file names."
    parser.epilog = _INSTALL
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    """Print the script, out of the parsers of all commands."""
    parser = build_parser()
    _mark_paths(parser)
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command)
        elif action.metavar in _PATHS:
            completed: Any = action  # where shtab looks for it
            completed.complete = _PATHS[action.metavar]
