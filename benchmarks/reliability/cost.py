"""What two working trees take for the load of `make bench`, one after the other, again and again.

`python -m benchmarks.reliability.cost BEFORE AFTER --pairs 10`: the directories of two checkouts, of which each runs
its own benchmarks with this Python. Within a pair the first is drawn, so that what else the machine does meets both
alike. Of each pair counts the ratio of throughputs, after / before; its median and a 95% confidence interval
(bootstrap over pairs) are stored.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers_common import default_model_path
from benchmarks.reliability.services import RESULTS, store

RESAMPLES = 10_000


def environment(tree: Path) -> dict[str, str]:
    """In which this Python runs a checkout's own code."""
    paths = os.pathsep.join(str(path) for path in (tree, tree / "clients" / "python"))
    return {**os.environ, "PYTHONPATH": paths}


def throughputs(tree: Path, model: Path) -> dict[str, float]:
    """Output tokens per second of a tree's services, by number of streams."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks", "--model", str(model), "--peers", "", "--repeats", "1"]
        command += ["--json", file.name]
        subprocess.run(command, cwd=tree, env=environment(tree), check=True, stdout=subprocess.DEVNULL)
        streams = json.loads(Path(file.name).read_text())["engines"][0]["streams"]
    return {f"{count} streams": figures["output_tokens_per_s"] for count, figures in streams.items()}


def compare(pairs: list[tuple[float, float]], rng: random.Random) -> dict[str, Any]:
    """Medians of both, and of after / before with its confidence interval."""
    ratios = [after / before for before, after in pairs]
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return {
        "before": statistics.median(before for before, _ in pairs),
        "after": statistics.median(after for _, after in pairs),
        "ratio": statistics.median(ratios),
        "ratio_95": [medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]],
        "pairs": pairs,
    }


def run_pairs(name: str, about: str | None, measure: Callable[[Path], dict[str, float]]) -> None:
    """What a program of this kind does: measure two trees in turns, print, and store as `name`.

    measure: figures of a tree by name.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.reliability.{name}", description=about)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    trees: tuple[Path, Path] = (args.before.resolve(), args.after.resolve())
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number in range(1, args.pairs + 1):
        measured = {tree: measure(tree) for tree in rng.sample(trees, 2)}
        for what, before in measured[trees[0]].items():
            pairs.setdefault(what, []).append((before, measured[trees[1]][what]))
            print(f"pair {number}, {what}: {before:.1f}, {pairs[what][-1][1]:.1f}", flush=True)
    figures = {what: compare(values, rng) for what, values in pairs.items()}
    commits = {
        name: subprocess.run(
            ["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name, tree in zip(("before", "after"), trees, strict=True)
    }
    store(RESULTS / f"{name}.json", {"commits": commits, "figures": figures})
    for what, figure in figures.items():
        low, high = figure["ratio_95"]
        print(f"{what}: after / before {figure['ratio']:.4f} ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    model = default_model_path()
    run_pairs("cost", __doc__, lambda tree: throughputs(tree, model))
