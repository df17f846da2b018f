"""`duet bench`: one load, several times, against a running server."""

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.cli.flags import add_address
from duet.cli.status import to_dict
from duet.client import AsyncClient
from duet.errors import StreamCut
from duet.request import SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Streams that start at once, each with its own random prompt, greedy, past any end of sequence."""

    streams: int = 1
    input_len: int = 128  # tokens
    output_len: int = 128  # tokens
    seed: int = 0  # of the prompts


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of a scenario. Rates are tokens per second, of all streams together; times are seconds."""

    output_tokens: int
    elapsed_s: float  # from the first request to the last token
    tokens_per_s: float  # generated tokens over `elapsed_s`
    decode_tokens_per_s: float | None  # after the last stream's first message; None where nothing came after it
    ttft_p50_s: float  # from a request to its first message with tokens
    ttft_p99_s: float
    gap_p50_s: float | None  # between two messages of a stream; None where no stream had two
    gap_p99_s: float | None


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """The messages of one stream."""

    sent: float  # time.perf_counter() seconds
    times: list[float]
    num_tokens: list[int]


async def run_scenario(address: str, scenario: Scenario, repeats: int) -> list[Measurement]:
    """Run a scenario `repeats` times; no prompt occurs twice, so that none is found in the prefix cache."""
    rng = random.Random(scenario.seed)
    results: list[Measurement] = []
    async with AsyncClient(address) as client:
        model = await client.model()
        vocabulary = sorted(set(range(model.vocab_size)) - set(model.eos_token_ids))
        for _ in range(repeats):
            prompts = [rng.choices(vocabulary, k=scenario.input_len) for _ in range(scenario.streams)]
            arrivals = await asyncio.gather(*(_stream(client, prompt, scenario.output_len) for prompt in prompts))
            results.append(measure(arrivals))
    return results


async def _stream(client: AsyncClient, prompt: list[int], output_len: int) -> Arrivals:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    arrivals = Arrivals(time.perf_counter(), [], [])
    async for event in client.stream(prompt, params):
        if isinstance(event, pb.TokenDelta):
            arrivals.times.append(time.perf_counter())
            arrivals.num_tokens.append(len(event.token_ids))
    if not arrivals.times:
        raise StreamCut("a stream was cancelled before its first token")
    return arrivals


def measure(arrivals: Sequence[Arrivals]) -> Measurement:
    """The figures of one run."""
    end = max(stream.times[-1] for stream in arrivals)
    elapsed_s = end - min(stream.sent for stream in arrivals)
    output_tokens = sum(sum(stream.num_tokens) for stream in arrivals)
    all_started = max(stream.times[0] for stream in arrivals)
    decoded = sum(
        count
        for stream in arrivals
        for time_, count in zip(stream.times, stream.num_tokens, strict=True)
        if time_ > all_started
    )
    ttfts = [stream.times[0] - stream.sent for stream in arrivals]
    gaps = [later - sooner for stream in arrivals for sooner, later in itertools.pairwise(stream.times)]
    return Measurement(
        output_tokens=output_tokens,
        elapsed_s=elapsed_s,
        tokens_per_s=output_tokens / elapsed_s,
        decode_tokens_per_s=decoded / (end - all_started) if decoded else None,
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        gap_p50_s=percentile(gaps, 50) if gaps else None,
        gap_p99_s=percentile(gaps, 99) if gaps else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("bench", help="measure a running server", description="Measure a running server.")
    defaults = Scenario()
    for name, kind, meaning in (
        ("streams", _positive, "requests at once"),
        ("input-len", _positive, "tokens of each prompt"),
        ("output-len", _positive, "tokens generated for each"),
        ("seed", int, "of the random prompts"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{meaning} (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="runs (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store everything here as JSON")
    add_address(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line for each run and the medians."""
    scenario = Scenario(args.streams, args.input_len, args.output_len, args.seed)
    results = asyncio.run(run_scenario(args.address, scenario, args.repeats))
    print(f"{scenario.streams} streams, {scenario.input_len} tokens in, {scenario.output_len} out")
    print(f"{'':>8}{'tok/s':>10}{'decode':>10}{'TTFT p50':>12}{'p99':>12}{'gap p50':>12}{'p99':>12}")
    for number, result in enumerate(results, 1):
        print(_row(f"run {number}", dataclasses.asdict(result)))
    print(_row("median", median(results)))
    if args.json:
        server = asyncio.run(_describe(args.address))
        report = {"scenario": dataclasses.asdict(scenario), "runs": [dataclasses.asdict(one) for one in results]}
        args.json.write_text(json.dumps({**report, "median": median(results), **server}, indent=2) + "\n")
    return 0


def median(results: Sequence[Measurement]) -> dict[str, float | None]:
    """The median of each figure over several runs."""
    medians: dict[str, float | None] = {}
    for field in dataclasses.fields(Measurement):
        known = [value for result in results if (value := getattr(result, field.name)) is not None]
        medians[field.name] = statistics.median(known) if known else None
    return medians


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


async def _describe(address: str) -> dict[str, Any]:
    async with AsyncClient(address) as client:
        return {"model": to_dict(await client.model()), "server": to_dict(await client.server())}


def _row(name: str, figures: dict[str, float | None]) -> str:
    rates = (figures["tokens_per_s"], figures["decode_tokens_per_s"])
    times = (figures["ttft_p50_s"], figures["ttft_p99_s"], figures["gap_p50_s"], figures["gap_p99_s"])
    cells = [f"{'-' if rate is None else f'{rate:.1f}':>10}" for rate in rates]
    cells += [f"{'-' if seconds is None else f'{seconds * 1e3:.1f} ms':>12}" for seconds in times]
    return f"{name:>8}{''.join(cells)}"
