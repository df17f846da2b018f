"""Flags that several subcommands share."""

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from duet.client import DEFAULT_ADDRESS
from duet.params import Options, SamplingParams, StructuredOutputsParams

_DEFAULTS = SamplingParams(temperature=0.2)  # for people at a terminal: at 1, small models wander


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add --address."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="server (%(default)s)")


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None, without: Collection[str] = ()) -> None:
    """Add a flag for every field of SamplingParams but those of `without`."""
    group = parser.add_argument_group("sampling", "What each flag means exactly, and its range, says inference.proto.")
    defaults = dataclasses.asdict(_DEFAULTS) | {"max_tokens": max_tokens}
    for name, settings in _sampling_flags().items():
        if name not in without:
            default = defaults[name] or None if settings.get("action") == "extend" else defaults[name]
            shown = "" if settings.get("action") or default is None else " (%(default)s)"
            flag = f"--{name.replace('_', '-')}"
            group.add_argument(flag, **{"default": default, **settings, "help": settings["help"] + shown})
    if "skip_special_tokens" not in without:
        group.add_argument(
            "--no-skip-special-tokens",
            dest="skip_special_tokens",
            action="store_false",
            help="keep special tokens in the text",
        )
    _add_structured_outputs(parser)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of parsed flags."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    given["stop_token_ids"] = tuple(args.stop_token_ids or ())
    given["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    languages = {"json": args.json_schema, "json_object": args.json_object or None}
    languages |= {name: getattr(args, name) for name in ("regex", "choice", "grammar")}
    if any(value is not None for value in languages.values()):
        given["structured_outputs"] = StructuredOutputsParams(**languages)
    return SamplingParams(**given)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what else a request says."""
    group = parser.add_argument_group("request")
    group.add_argument("--model", metavar="NAME", help="refuse to talk with another model than this one")
    group.add_argument("--priority", type=int, metavar="N", help="lower ones are served first, where the server ranks")
    group.add_argument("--cache-salt", metavar="TEXT", help="share cached prefixes only with requests of the same salt")
    group.add_argument(
        "--detach-seconds", type=seconds, metavar="S", help="outlive lost connections for so long, and go on after them"
    )


def request_options(args: argparse.Namespace) -> Options:
    """The options of parsed flags."""
    options = Options()
    if args.model is not None:
        options["model"] = args.model
    if args.priority is not None:
        options["priority"] = args.priority
    if args.cache_salt is not None:
        options["cache_salt"] = args.cache_salt
    if args.detach_seconds is not None:
        options["detach_seconds"] = args.detach_seconds
    return options


def positive(text: str) -> int:
    """Parse a count that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def seconds(text: str) -> float:
    """Parse a time above 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def limit(text: str) -> int | None:
    """Parse a count or `none`."""
    return None if text == "none" else int(text)


def token_ids(text: str) -> list[int]:
    """Parse `ID,ID`."""
    return [int(word) for word in text.split(",")]


def biases(text: str) -> list[tuple[int, float]]:
    """Parse `ID=X,ID=X`."""
    pairs = [word.split("=") for word in text.split(",")]
    return [(int(token_id), float(bias)) for token_id, bias in pairs]


def text(word: str) -> str:
    """The word itself, or the text of the file behind an @."""
    if not word.startswith("@"):
        return word
    try:
        return Path(word[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _sampling_flags() -> dict[str, dict[str, Any]]:
    """What argparse is told of each field, but of those for which a flag of the same name would not do."""
    ids = {"action": "extend", "type": token_ids, "metavar": "ID,..."}
    number, count = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    return {
        "temperature": number | {"help": "0 takes the likeliest token"},
        "top_k": count | {"help": "keep the k likeliest tokens; 0 keeps all"},
        "top_p": number | {"help": "keep the likeliest tokens up to this mass"},
        "min_p": number | {"help": "drop tokens less likely than this share of the likeliest"},
        "seed": count | {"help": "of the noise (drawn by the server)"},
        "n": count | {"help": "continuations of each prompt"},
        "max_tokens": {"type": limit, "metavar": "N", "help": "most tokens to generate, or `none`: as many as fit"},
        "min_tokens": count | {"help": "fewest tokens to generate"},
        "ignore_eos": {"action": "store_true", "help": "generate past the model's end of sequence"},
        "stop": {"action": "append", "metavar": "TEXT", "help": "end with this string; repeatable"},
        "include_stop_str_in_output": {"action": "store_true", "help": "leave the stop string in the text"},
        "stop_token_ids": ids | {"help": "further tokens that end generation"},
        "repetition_penalty": number | {"help": "above 1: tokens of prompt and output become less likely"},
        "frequency_penalty": number | {"help": "taken from a token's logit for each time it was generated"},
        "presence_penalty": number | {"help": "taken from the logit of every generated token"},
        "logit_bias": {
            "action": "extend",
            "type": biases,
            "metavar": "ID=X,...",
            "help": "added to the logits of these tokens",
        },
        "allowed_token_ids": ids | {"help": "the only tokens that may be generated"},
        "banned_token_ids": ids | {"help": "tokens that are never generated"},
        "logprobs": count | {"help": "report each token's log-probability, and those of the N likeliest"},
        "prompt_logprobs": count | {"help": "the same for the tokens of the prompt"},
        "truncate_prompt_tokens": count | {"help": "keep only the last N tokens of the prompt"},
    }


def _add_structured_outputs(parser: argparse.ArgumentParser) -> None:
    about = "What the text must be; one of these."
    group = parser.add_argument_group("structured output", about).add_mutually_exclusive_group()
    group.add_argument("--json-schema", type=text, metavar="TEXT", help="JSON of this schema; @FILE reads it there")
    group.add_argument("--json-object", action="store_true", help="any JSON object")
    group.add_argument("--regex", metavar="TEXT", help="what this regular expression matches")
    group.add_argument("--choice", action="append", metavar="TEXT", help="this text; repeatable, one of them")
    group.add_argument("--grammar", type=text, metavar="TEXT", help="text of this Lark grammar; @FILE reads it there")
