"""`duet`: the subcommands, and what they have in common.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from duet.cli import bench, chat, generate, serve, status
from duet.errors import DuetError

_COMMANDS = (generate, chat, status, bench, serve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with `argv` (None: sys.argv) and return the exit status."""
    args = _parse(argv)
    try:
        return args.run(args)
    except DuetError as error:
        print(f"duet: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"duet: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="duet", description="Talk to a Duet inference server, or start one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not serve.run:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return args
