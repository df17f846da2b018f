"""`duet`: the subcommands, and what they have in common.

Only the module of the subcommand that was asked for is imported, so that `duet --help` need not wait for gRPC.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence

from duet.cli.exit_status import EXIT_STATUSES, FAILED, INTERRUPTED, UNAVAILABLE, CommandFailed

# Each is a module beside this one: `add_arguments(parser)`, and `run(args)`, which returns the exit status.
COMMANDS = {
    "generate": "continue prompts",
    "chat": "talk with the model",
    "status": "watch the server's load",
    "model": "describe the served model",
    "bench": "measure a running server",
    "serve": "start a server on this machine",
    "drain": "have the server finish what it has and take nothing new",
    "gateway": "serve OpenAI's HTTP API",
    "record": "record what a scheduler and its executor say",
    "replay": "run a recording again, and compare",
    "completion": "print what completes these commands in a shell",
}
_FORWARDING = {"serve", "gateway"}  # pass on to the services what they do not know


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with `argv` (None: sys.argv) and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv)
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in _FORWARDING:
        args.usage_error(f"unrecognized arguments: {' '.join(args.rest)}")
    return _run(args)


def build_parser(commands: Collection[str] = COMMANDS.keys()) -> argparse.ArgumentParser:
    """The parser of `duet`; only the commands named in `commands` have their flags."""
    parser = argparse.ArgumentParser(
        prog="duet",
        description="Talk to a Duet inference server, or start one.",
        epilog="\n".join(["exit status:", *(f"  {status:<4} {text}" for status, text in EXIT_STATUSES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        # An abbreviation could be a service's flag.
        command = subparsers.add_parser(name, help=summary, allow_abbrev=name not in _FORWARDING)
        if name in commands:
            module = importlib.import_module(f"duet.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def _run(args: argparse.Namespace) -> int:
    from duet.errors import DuetError, QueueFull, Unavailable

    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except DuetError as error:
        print(f"duet: {error.message}", file=sys.stderr)
        return UNAVAILABLE if isinstance(error, Unavailable | QueueFull) else FAILED
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (CommandFailed, OSError) as error:
        print(f"duet: {error}", file=sys.stderr)
        return UNAVAILABLE if isinstance(error, ConnectionError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
