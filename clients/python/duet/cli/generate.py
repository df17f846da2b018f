"""`duet generate`: continue prompts, from arguments, a pipe, or a file of JSON lines."""

import argparse
import sys
from pathlib import Path

from duet.cli.batch import Defaults
from duet.cli.batch_run import run_batch
from duet.cli.exit_status import DONE
from duet.cli.flags import (
    add_address,
    add_options,
    add_sampling,
    positive,
    request_options,
    sampling_params,
    seconds,
)
from duet.cli.json_fields import parse_prompt
from duet.client import Client
from duet.params import Options, SamplingParams
from duet.request import Prompt
from protos.duet.inference.v1 import inference_pb2 as pb

_EPILOG = """\
A line of --input is a JSON object: "prompt", which is a text, a list of token ids or a list of messages; "id", which
comes back; and any field of SamplingParams, model, priority, cache_salt, detach_seconds and echo, each in place of the
flag's value.
Output has an object for each, in the same order: "index", counted from 0; "id"; "text", "token_ids", "finish_reason"
and so on, or "error"; "input_digest", by which --resume knows the line. Blank lines do not count.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Continue prompts."
    parser.epilog = _EPILOG
    parser.add_argument("prompt", nargs="*", help="text to continue (standard input)")
    parser.add_argument("--chat", action="store_true", help="send each text as a user's chat message")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    parser.add_argument("--echo", action="store_true", help="give the prompt back before its continuation")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="seconds that a prompt may take")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--input", metavar="FILE", help="read prompts here, as JSON lines; - is standard input")
    batch.add_argument("--output", metavar="FILE", help="write JSON lines here; - is standard output, the default")
    existing = batch.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an earlier run left the output")
    existing.add_argument("--overwrite", action="store_true", help="begin the output anew")
    batch.add_argument("--stop-on-error", action="store_true", help="end at the first line that fails")
    batch.add_argument("--concurrency", type=positive, metavar="N", help="prompts at once (256)")
    batch.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="show a bar on standard error (on a terminal)"
    )
    add_address(parser)
    add_sampling(parser, max_tokens=64)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print texts as they come, or JSON objects."""
    if unfit := _unfit(args):
        args.usage_error(unfit)
    options = request_options(args)
    if args.echo:
        options["echo"] = True
    params = sampling_params(args)
    if _prints_text(args):
        prompts = [parse_prompt(text, chat=args.chat) for text in _texts(args)]
        with Client(args.address) as client:
            _print_texts(client, prompts, params, options, args.timeout)
        return DONE
    texts = None if args.input is not None else _texts(args)
    return run_batch(args, Defaults(params, options, args.chat), texts, _output_path(args))


def _unfit(args: argparse.Namespace) -> str | None:
    """What keeps the flags from being followed."""
    output, has_input = _output_path(args), args.input is not None
    if has_input and args.prompt:
        return "give prompts either as arguments or by --input"
    for flag, is_given, other, is_there in (
        ("--resume", args.resume, "--input", has_input),
        ("--resume", args.resume, "--output FILE", output),
        ("--overwrite", args.overwrite, "--output FILE", output),
        ("--stop-on-error", args.stop_on_error, "--input", has_input),
        ("--progress", args.progress, "--input", has_input),
        ("--concurrency", args.concurrency, "--json or --input", not _prints_text(args)),
        ("--logprobs", args.logprobs is not None, "--json or --input", not _prints_text(args)),
        ("--prompt-logprobs", args.prompt_logprobs is not None, "--json or --input", not _prints_text(args)),
    ):
        if is_given and not is_there:
            return f"{flag} needs {other}"
    if output and output.is_file():
        if has_input and args.input != "-" and output.samefile(args.input):
            return "--input and --output are the same file"
        if output.stat().st_size and not (args.resume or args.overwrite):
            return f"{output} exists: --resume goes on with it, --overwrite replaces it"
    return None


def _prints_text(args: argparse.Namespace) -> bool:
    return args.input is None and args.output is None and not args.json


def _output_path(args: argparse.Namespace) -> Path | None:
    return None if args.output in (None, "-") else Path(args.output)


def _texts(args: argparse.Namespace) -> list[str]:
    return args.prompt or [sys.stdin.read()]


def _print_texts(
    client: Client, prompts: list[Prompt], params: SamplingParams, options: Options, timeout_s: float | None
) -> None:
    """One prompt after the other; a single continuation as it comes, several when they are whole."""
    for number, prompt in enumerate(prompts, start=1):
        title = f"prompt {number}" if len(prompts) > 1 else ""
        if params.n == 1:
            _print_title(title)
            for event in client.stream(prompt, params, timeout_s=timeout_s, **options):
                if isinstance(event, pb.TokenDelta | pb.Prompt):
                    print(event.text, end="", flush=True)
            print()
            continue
        output = client.generate(prompt, params, timeout_s=timeout_s, **options)
        for choice in output.choices:
            _print_title(f"{title}{', ' * bool(title)}choice {choice.index + 1}")
            print(output.prompt + choice.text)


def _print_title(title: str) -> None:
    if title:
        print(f"==> {title} <==")
