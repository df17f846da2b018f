"""`duet model`: what is served."""

import argparse
import json

from duet.cli.flags import add_address
from duet.cli.messages import to_dict
from duet.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Describe the served model."
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each field of GetModelResponse."""
    with Client(args.address) as client:
        fields = to_dict(client.model())
    if args.json:
        print(json.dumps(fields, ensure_ascii=False))
    else:
        width = max(map(len, fields))
        for name, value in fields.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name:{width}}  {shown}")
    return 0
