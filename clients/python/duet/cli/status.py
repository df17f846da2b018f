"""`duet status`: what the server is doing, again and again."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from duet.cli.exit_status import DONE
from duet.cli.flags import add_address, seconds
from duet.cli.messages import to_dict
from duet.cli.status_history import History, Rates, Snapshot
from duet.cli.status_view import self_checks, view
from duet.client import Client
from duet.errors import DuetError

Show = Callable[[Snapshot, Rates, DuetError | None], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Watch the server's load until Ctrl-C, through restarts of the server."
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="S", help="seconds between two updates")
    parser.add_argument("--json", action="store_true", help="print one snapshot as a JSON object and exit")
    parser.add_argument("--watch", action="store_true", help="with --json, print a snapshot at every update")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Show the load until Ctrl-C, in place on a terminal; or one snapshot as JSON."""
    with Client(args.address) as client:
        snapshot = Snapshot.take(client)
        if args.json and not args.watch:
            _print_json(snapshot)
            return DONE
        history = History()
        with _display(args, history) as show:
            _watch(client, snapshot, history, show, args.interval)
    return DONE


def load_lines(snapshot: Snapshot, rates: Rates) -> list[str]:
    """A snapshot in lines of text."""
    load = snapshot.server.load
    hit_rate = load.cached_tokens_total / max(load.prompt_tokens_total, 1)
    free_blocks = load.total_blocks - load.used_blocks - load.cached_blocks
    return [
        f"requests  {load.running_requests} running of {load.max_running_requests}, {load.waiting_requests} waiting, "
        f"{load.finished_requests_total} finished, {load.preemptions_total} preemptions",
        f"          {load.detached_requests} detached, {load.quarantined_requests} quarantined",
        f"KV blocks {load.used_blocks} used, {load.cached_blocks} cached, {free_blocks} free, "
        f"of {load.total_blocks} x {load.block_size} tokens",
        f"prefix    {hit_rate:.1%} of prompt tokens found in the cache",
        f"tokens/s  {rates.prefill_tokens:.0f} prefill, {rates.decode_tokens:.0f} decode",
        f"health    {load.executor_losses_total} executors lost, self-checks: {self_checks(load)}",
    ]


def _watch(client: Client, snapshot: Snapshot, history: History, show: Show, interval_s: float) -> None:
    """Show a snapshot at every interval; the last one again, and why, where the server does not answer."""
    rates = history.add(snapshot.server.load)
    lost: DuetError | None = None
    while True:
        show(snapshot, rates, lost)
        time.sleep(interval_s)
        try:
            snapshot, lost = Snapshot.take(client), None
            rates = history.add(snapshot.server.load)
        except DuetError as error:
            lost = error


@contextlib.contextmanager
def _display(args: argparse.Namespace, history: History) -> Iterator[Show]:
    console = Console()
    if args.json or not sys.stdout.isatty() or console.is_dumb_terminal:  # which cannot be drawn on in place
        yield _Lines(args)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda snapshot, rates, lost: live.update(
            view(args.address, snapshot, rates, history, lost), refresh=True
        )


class _Lines:
    """Prints snapshots one below the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._head: str | None = None  # that was printed last
        self._is_lost = False

    def __call__(self, snapshot: Snapshot, rates: Rates, lost: DuetError | None) -> None:
        """Print the snapshot, unless it is `lost`: that is told once."""
        was_lost, self._is_lost = self._is_lost, lost is not None
        if lost is not None:
            if not was_lost:
                print(f"duet: {lost.message}: trying again", file=sys.stderr)
        elif self._args.json:
            _print_json(snapshot)
        else:
            self._print_head(snapshot)
            print("\n".join(load_lines(snapshot, rates)), flush=True)

    def _print_head(self, snapshot: Snapshot) -> None:
        """Print which server and executor it is, where that has changed."""
        server = snapshot.server
        device = f"{server.device}, epoch {server.epoch}" if server.device else "no executor yet"
        head = f"Duet {server.version} at {self._args.address}, {device}, {server.queue_order}"
        head += ", draining" * server.draining
        if head != self._head:
            print(head)
            self._head = head


def _print_json(snapshot: Snapshot) -> None:
    model = to_dict(snapshot.model) if snapshot.model else None
    print(json.dumps({"server": to_dict(snapshot.server), "model": model}), flush=True)
