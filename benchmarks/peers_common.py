"""What the benchmarks of other engines share: the load, the figures and the command line."""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
STREAMS = (1, 16)

_REPOSITORY = Path(__file__).resolve().parents[1]


def random_prompts(num_streams: int, seed: int) -> list[list[int]]:
    """`num_streams` prompts of `PROMPT_TOKENS` ordinary token ids each, no two with a common beginning."""
    generator = random.Random(seed)
    return [[generator.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(num_streams)]


def figures(arrivals: Sequence[Sequence[float]]) -> dict[str, float]:
    """The figures of one run out of each stream's token arrivals, in seconds since all requests were sent.

    output_tokens_per_s counts all tokens from the start to the last of them; decode_tokens_per_s is the sum over the
    streams of what each got after its first token; a gap is the time between two tokens of a stream.
    """
    first_ms = sorted(1000 * times[0] for times in arrivals)
    gaps_ms = sorted(1000 * (b - a) for times in arrivals for a, b in itertools.pairwise(times))
    return {
        "output_tokens_per_s": sum(map(len, arrivals)) / max(times[-1] for times in arrivals),
        "decode_tokens_per_s": sum((len(times) - 1) / (times[-1] - times[0]) for times in arrivals),
        "ttft_ms_p50": statistics.median(first_ms),
        "ttft_ms_max": first_ms[-1],
        "gap_ms_p50": statistics.median(gaps_ms),
        "gap_ms_p99": gaps_ms[int(0.99 * (len(gaps_ms) - 1))],
    }


def default_model_path(*flags: str) -> Path:
    """Where the default model is, made first if need be; `--gguf` for its GGUF file."""
    command = [sys.executable, "-m", "executor_service.weights.default_model", *flags]
    return Path(subprocess.run(command, cwd=_REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def main(description: str, measure: Callable[[Path | None], dict[str, Any]]) -> None:
    """Run `measure` with the model that the command line names, print its result and store it where asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, help="the model to measure (default: the default model)")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    result = measure(arguments.model)
    for streams, measured in result["streams"].items():
        told = ", ".join(f"{name} {value:.1f}" for name, value in measured.items())
        print(f"{result['name']} {result['version']}, {streams} streams: {told}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
