"""`duet bench`: a load, several times, on a running server."""

import argparse
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from duet.bench.duet_target import DuetTarget
from duet.bench.limit import Ceilings, Limit, ModelCost, limit_of
from duet.bench.load import Target, default_processes, run_scenario
from duet.bench.metrics import Arrivals, Measurement, measure
from duet.bench.openai_target import OpenAITarget
from duet.bench.plot import draw, import_figure
from duet.bench.report import as_json, table
from duet.bench.scenarios import SCENARIOS, Scenario, Span
from duet.cli.flags import add_address

N = TypeVar("N", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Measure a running server."
    load = parser.add_argument_group("load", "A scenario sets the flags of this group; each may be changed.")
    load.add_argument("--scenario", choices=SCENARIOS, default="fixed", help="(%(default)s)")
    load.add_argument("--streams", "--requests", type=_at_least(1), metavar="N", help="requests in all")
    load.add_argument("--input-len", type=_span, metavar="N[-N]", help="tokens of each prompt")
    load.add_argument("--output-len", type=_span, metavar="N[-N]", help="tokens generated for each")
    load.add_argument("--rate", type=_at_least(1e-6), metavar="R", help="Poisson arrivals a second, not all at once")
    load.add_argument("--prefix-len", type=_at_least(0), metavar="N", help="tokens before it, shared by a group")
    load.add_argument("--groups", type=_at_least(1), metavar="N", help="groups that share a prefix")
    load.add_argument("--temperature", type=_at_least(0.0), metavar="T", help="of sampling")
    parser.add_argument("--seed", type=int, metavar="N", help="of the prompts (drawn, so that none was seen before)")
    parser.add_argument("--repeats", type=_at_least(1), default=3, metavar="N", help="runs (%(default)s)")
    parser.add_argument("--warm-up", type=_at_least(0), default=1, metavar="N", help="runs before them (%(default)s)")
    parser.add_argument("--processes", type=_at_least(1), metavar="N", help="of the client (by streams and cores)")
    add_address(parser)
    parser.add_argument("--openai", metavar="URL", help="http://host:port of an OpenAI server to measure instead")
    parser.add_argument("--model", help="its model (the first that it lists)")
    parser.add_argument("--limit", type=Path, metavar="FILE", help="ceilings of the device, as JSON; with --model-dir")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="of the model's config.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store everything here as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the median run here as PNG (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Print a column for each run, the medians, and how much of the limit they reach."""
    if unfit := _unfit(args):
        print(f"duet: {unfit}", file=sys.stderr)
        return 2
    names = [field.name for field in dataclasses.fields(Scenario)]
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    scenario = dataclasses.replace(SCENARIOS[args.scenario], **changes)
    target: Target = OpenAITarget.at(args.openai, args.model) if args.openai else DuetTarget(args.address)
    model = target.describe()["model"]
    limit = _limit(args, scenario, model.get("dtype"))
    settings = {
        "name": args.scenario,
        "seed": random.SystemRandom().randrange(2**32) if args.seed is None else args.seed,
        "repeats": args.repeats,
        "warm_up": args.warm_up,
        "processes": args.processes or default_processes(scenario.streams),
    }
    loads = {name: settings[name] for name in ("seed", "repeats", "warm_up", "processes")}
    arrivals = run_scenario(target, scenario, vocab_size=model.get("vocab_size"), **loads)
    runs = [measure(one) for one in arrivals]
    print(f"{args.scenario}: {scenario}, from {settings['processes']} client processes")
    print("\n".join(table(runs, limit)))
    _warn(scenario, runs)
    if args.json:
        counted = {"tokens_counted_by": sorted({stream.counted_by for one in arrivals for stream in one})}
        report = {**as_json(scenario, settings, runs, limit), **counted, **target.describe()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        draw(args.plot, f"{args.scenario}: {scenario}", _median_run(runs, arrivals), limit)
    return 0


def _unfit(args: argparse.Namespace) -> str | None:
    """What keeps the flags from being followed."""
    if bool(args.limit) != bool(args.model_dir):
        return "--limit and --model-dir go together"
    if args.plot:
        try:
            import_figure()
        except ModuleNotFoundError as error:
            return str(error)
    return None


def _limit(args: argparse.Namespace, scenario: Scenario, dtype: str | None) -> Limit | None:
    if not args.limit:
        return None
    return limit_of(scenario.requests(""), ModelCost.load(args.model_dir, dtype), Ceilings.load(args.limit))


def _warn(scenario: Scenario, runs: Sequence[Measurement]) -> None:
    """Say what makes the figures other than they seem."""
    asked = sum(request.output_len for request in scenario.requests(""))
    fewest = min(run.output_tokens for run in runs)
    if fewest != asked:
        print(f"duet: a run gave {fewest} tokens, not {asked}: the server stops early", file=sys.stderr)
    cached = max(run.cached_tokens or 0 for run in runs)
    if cached and not scenario.prefix_len:
        print(f"duet: {cached} prompt tokens were found in the prefix cache", file=sys.stderr)
    lag_s = max(run.lag_max_s for run in runs)
    if lag_s > 0.02:
        print(f"duet: requests were sent up to {1e3 * lag_s:.0f} ms late: the client lacks CPU", file=sys.stderr)


def _median_run(runs: Sequence[Measurement], arrivals: Sequence[list[Arrivals]]) -> list[Arrivals]:
    middle = statistics.median_low(run.tokens_per_s for run in runs)
    return next(one for one, run in zip(arrivals, runs, strict=True) if run.tokens_per_s == middle)


def _at_least(least: N) -> Callable[[str], N]:
    def parse(text: str) -> N:
        number = type(least)(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
        return number

    parse.__name__ = type(least).__name__  # what argparse calls a value of the wrong kind
    return parse


def _span(text: str) -> Span:
    """Parse `N` or `N-N`."""
    least, _, most = text.partition("-")
    span = int(least), int(most or least)
    if not 1 <= span[0] <= span[1]:
        raise argparse.ArgumentTypeError(f"{text} is not a length, nor a range of them")
    return span
