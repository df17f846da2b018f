"""Flags that several subcommands share."""

import argparse

from duet.client import DEFAULT_ADDRESS
from duet.request import SamplingParams

_DEFAULTS = SamplingParams(temperature=0.2)  # for people at a terminal: at 1, small models wander


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add --address."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="server (%(default)s)")


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Add a flag for every field of SamplingParams."""
    group = parser.add_argument_group("sampling")
    for name, kind, help_text in (
        ("temperature", float, "0 takes the likeliest token"),
        ("top-k", int, "keep the k likeliest tokens; 0 keeps all"),
        ("top-p", float, "keep the likeliest tokens up to this mass"),
        ("min-p", float, "drop tokens less likely than this share of the likeliest"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{help_text} (%(default)s)")
    group.add_argument("--seed", type=int, help="of the noise (drawn by the server)")
    limit = "as many as fit" if max_tokens is None else "%(default)s"
    group.add_argument("--max-tokens", type=int, default=max_tokens, help=f"most tokens to generate ({limit})")
    group.add_argument("--ignore-eos", action="store_true", help="generate past the model's end of sequence")
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=(), metavar="ID", help="further tokens that end generation"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of parsed flags."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        stop_token_ids=tuple(args.stop_token_ids),
    )
