"""`duet drain`: have a server finish what it has and take nothing new, before it is stopped."""

import argparse
from pathlib import Path

from duet.cli.exit_status import DONE, CommandFailed
from duet.cli.flags import add_address
from duet.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = (
        "Have the server refuse new requests, and wait until those that are there have ended. "
        "After Ctrl-C it goes on draining."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--limit", type=_limit, metavar="S", help="seconds after which requests that are left are cut")
    what.add_argument("--cancel", action="store_true", help="have it take new requests again")
    parser.add_argument("--secret-file", metavar="FILE", help="holds the server's admin secret")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Drain, or take it back. Raises: DuetError, OSError, and CommandFailed where somebody else takes it back."""
    secret = Path(args.secret_file).read_text(encoding="utf-8").strip() if args.secret_file is not None else None
    with Client(args.address, admin_secret=secret) as client:
        if args.cancel:
            client.cancel_drain()
            print("takes new requests")
            return DONE
        response = client.drain(args.limit)
        counts = f"{response.finished_requests} requests finished, {response.cut_requests} cut"
        if not client.server().draining:
            raise CommandFailed(f"draining was cancelled: {counts}")
    print(f"drained: {counts}")
    return DONE


def _limit(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
