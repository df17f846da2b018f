"""`duet chat`: a conversation in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from duet.cli.flags import add_address, add_sampling, sampling_params
from duet.client import Client
from duet.errors import InvalidRequest
from duet.request import SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "chat", help="talk with the model", description="Talk. Ctrl-C stops an answer, Ctrl-D leaves."
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_address(parser)
    add_sampling(parser, max_tokens=None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read messages until the end of the input and stream the answers."""
    _enable_line_editing()
    messages: list[Mapping[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    with Client(args.address) as client:
        name = client.model().name
        if sys.stdin.isatty():
            print(f"{name} at {args.address}. Ctrl-C stops an answer, Ctrl-D leaves.")
        while (text := _read_message()) is not None:
            if not text.strip():
                continue
            question = {"role": "user", "content": text}
            try:
                answer = _answer(client, [*messages, question], sampling_params(args))
            except InvalidRequest as error:  # such as a conversation that outgrew the model; the message is dropped
                print(f"duet: {error.message}", file=sys.stderr)
                continue
            messages += [question, {"role": "assistant", "content": answer}]
    return 0


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (input() uses it once it is imported)


def _read_message() -> str | None:
    """The next line, or None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:  # clears the line
            print()


def _answer(client: Client, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> str:
    """Stream an answer to the terminal; returns what of it came before Ctrl-C."""
    texts: list[str] = []
    try:
        for event in client.stream(messages, params):
            if isinstance(event, pb.TokenDelta):
                texts.append(event.text)
                print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(texts)
