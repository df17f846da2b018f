"""`duet status`: what the server is doing."""

import argparse
import json
import sys
from typing import Any

from google.protobuf.message import Message

from duet.cli.flags import add_address
from duet.client import Client
from duet.errors import Unavailable
from protos.duet.inference.v1 import inference_pb2 as pb

_UP_AND_CLEAR = "\x1b[{lines}F\x1b[J"


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("status", help="watch the server's load", description="Watch the server's load.")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two updates")
    parser.add_argument("--json", action="store_true", help="print one snapshot as a JSON object and exit")
    add_address(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the load until Ctrl-C, in place on a terminal; or one snapshot as JSON."""
    with Client(args.address) as client:
        server = client.server()
        if args.json:
            print(json.dumps({"server": to_dict(server), "model": _model(client)}))
            return 0
        print(f"Duet {server.version} at {args.address}, {server.device or 'no executor yet'}, {server.queue_order}")
        before: pb.Load | None = None
        height = 0
        for load in client.watch_load(args.interval):
            lines = load_lines(load, before)
            if height and sys.stdout.isatty():
                print(_UP_AND_CLEAR.format(lines=height), end="")
            print("\n".join(lines), flush=True)
            before, height = load, len(lines)
    return 0


def to_dict(message: Message) -> dict[str, Any]:
    """A message of flat and nested fields as a dict, unset ones too, every number a number."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: to_dict(value) if isinstance(value, Message) else _plain(value) for name, value in values.items()}


def load_lines(load: pb.Load, before: pb.Load | None) -> list[str]:
    """A snapshot for reading; rates are those since the snapshot `before`, or since the start of the server."""
    before = before if before and before.uptime_seconds < load.uptime_seconds else pb.Load()  # the server restarted
    elapsed_s = max(load.uptime_seconds - before.uptime_seconds, 1e-9)
    prefill = (load.prefill_tokens_total - before.prefill_tokens_total) / elapsed_s
    decode = (load.output_tokens_total - before.output_tokens_total) / elapsed_s
    hit_rate = load.cached_tokens_total / max(load.prompt_tokens_total, 1)
    free_blocks = load.total_blocks - load.used_blocks - load.cached_blocks
    return [
        f"requests  {load.running_requests} running of {load.max_running_requests}, {load.waiting_requests} waiting, "
        f"{load.finished_requests_total} finished, {load.preemptions_total} preemptions",
        f"KV blocks {load.used_blocks} used, {load.cached_blocks} cached, {free_blocks} free, "
        f"of {load.total_blocks} x {load.block_size} tokens",
        f"prefix    {hit_rate:.1%} of prompt tokens found in the cache",
        f"tokens/s  {prefill:.0f} prefill, {decode:.0f} decode",
    ]


def _model(client: Client) -> dict[str, Any] | None:
    try:
        return to_dict(client.model())
    except Unavailable:  # no executor has connected yet
        return None


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else list(value)
