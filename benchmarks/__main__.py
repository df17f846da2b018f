"""`make bench`: our services and their peers on the same machine in the same run, stored as JSON.

Ours is measured over its gRPC streams, end to end. Each repeat has prompts of its own, so that no prefix is cached by
accident; the median is quoted and every run stored.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.peers_common import OUTPUT_TOKENS, PROMPT_TOKENS, STREAMS
from duet import LLM
from duet.bench.duet_target import DuetTarget
from duet.bench.load import run_scenario
from duet.bench.metrics import measure, median
from duet.bench.scenarios import Scenario


def main() -> int:
    """Run ours and the peers asked for; print a table; store everything."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", default="auto", help="comma-separated, of auto and int8: ours with each of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peers",
        default="transformers,llamacpp",
        help="comma-separated; empty for none; llama.cpp always runs the default model",
    )
    parser.add_argument("--json", type=Path, default=None, help="where to store (benchmarks/results/DATE.json)")
    args = parser.parse_args()
    engines = [measure_duet(args, weights) for weights in args.weights.split(",")]
    for peer in filter(None, args.peers.split(",")):
        engines.append(measure_peer(peer, args.model))
    settings = {"dtype": args.dtype, "weights": args.weights, "repeats": args.repeats, "peers": args.peers}
    report = {"machine": describe_machine(), "settings": settings, "engines": engines}
    path = args.json or Path(__file__).parent / "results" / time.strftime("%Y-%m-%dT%H%M%S.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print_table(engines)
    print(f"stored in {path}")
    return 0


def measure_duet(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Start both services, and measure each number of streams after a warm-up."""
    streams: dict[str, Any] = {}
    with LLM(args.model, dtype=args.dtype, weights=weights) as llm:
        for count in STREAMS:
            lengths = (PROMPT_TOKENS, PROMPT_TOKENS), (OUTPUT_TOKENS, OUTPUT_TOKENS)
            scenario = Scenario(count, *lengths, temperature=0.0)
            loads = run_scenario(DuetTarget(llm.address), scenario, seed=count, repeats=args.repeats, processes=1)
            runs = [measure(arrivals) for arrivals in loads]
            figures = median(runs)
            streams[str(count)] = {
                "output_tokens_per_s": figures["tokens_per_s"],
                "decode_tokens_per_s": figures["decode_tokens_per_s"],
                "ttft_ms_p50": milliseconds(figures["ttft_p50_s"]),
                "ttft_ms_p99": milliseconds(figures["ttft_p99_s"]),
                "gap_ms_p50": milliseconds(figures["gap_p50_s"]),
                "gap_ms_p99": milliseconds(figures["gap_p99_s"]),
                "runs": [dataclasses.asdict(run) for run in runs],
            }
    name = f"duet {args.dtype if weights == 'auto' else weights}"
    return {"name": name, "version": importlib.metadata.version("duet-inference"), "streams": streams}


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds, None as None."""
    return None if seconds is None else seconds * 1e3


def measure_peer(name: str, model: str) -> dict[str, Any]:
    """Run a peer's script in a process of its own; llama.cpp takes its own format of the default model."""
    script = Path(__file__).parent / f"peers_{name}.py"
    model_flag = [] if name == "llamacpp" else ["--model", model]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([sys.executable, str(script), *model_flag, "--json", file.name], check=True)
        return json.loads(Path(file.name).read_text())


def print_table(engines: list[dict[str, Any]]) -> None:
    """One line for each engine and number of streams, with our ratio to it."""
    ours = engines[0]["streams"]
    columns = ("output_tokens_per_s", "decode_tokens_per_s", "ttft_ms_p50", "gap_ms_p50", "gap_ms_p99")
    print(
        f"{'engine':<28}{'streams':>8}{'tok/s':>10}{'decode':>10}{'TTFT ms':>10}{'gap p50':>10}{'p99':>10}{'ours /':>8}"
    )
    for engine in engines:
        for count, figures in engine["streams"].items():
            cells = "".join(f"{'-' if (v := figures.get(c)) is None else f'{v:.1f}':>10}" for c in columns)
            ratio = ours[count]["output_tokens_per_s"] / figures["output_tokens_per_s"]
            print(f"{engine['name']:<28}{count:>8}{cells}{ratio:>10.2f}")


if __name__ == "__main__":
    sys.exit(main())
