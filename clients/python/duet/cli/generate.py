"""`duet generate`: continue one prompt."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from duet.cli.flags import add_address, add_sampling, sampling_params
from duet.client import Client
from duet.request import Event, Output, Prompt
from protos.duet.inference.v1 import inference_pb2 as pb


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue one prompt.")
    parser.add_argument("prompt", nargs="?", help="text to continue (standard input)")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's chat message")
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")
    add_address(parser)
    add_sampling(parser, max_tokens=64)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the continuation as it comes, or a JSON object in the end."""
    text = sys.stdin.read() if args.prompt is None else args.prompt
    prompt: Prompt = [{"role": "user", "content": text}] if args.chat else text
    events: list[Event] = []
    with Client(args.address) as client:
        for event in client.stream(prompt, sampling_params(args)):
            events.append(event)
            if isinstance(event, pb.TokenDelta) and not args.json:
                print(event.text, end="", flush=True)
    print(json.dumps(dataclasses.asdict(Output.of(events)), ensure_ascii=False) if args.json else "")
    return 0
