"""A picture of one run: throughput over time, and how first tokens and gaps are distributed."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.bench.limit import Limit
from duet.bench.metrics import Arrivals, first_token_times, message_gaps

_NUM_BINS = 100


def import_figure() -> Any:
    """Matplotlib's Figure class, which needs neither a display nor global state. Raises: ModuleNotFoundError."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'duet-inference[plot]'") from None


def draw(file: Path, title: str, arrivals: Sequence[Arrivals], limit: Limit | None) -> None:
    """Store the picture in `file`. Raises: ModuleNotFoundError, OSError."""
    figure = import_figure()(figsize=(15, 4.5), layout="constrained")
    over_time, first_tokens, gaps = figure.subplots(1, 3)
    figure.suptitle(title)
    seconds, rates = throughput(arrivals, _NUM_BINS)
    over_time.stairs(rates, seconds, fill=True, alpha=0.6, label="output")
    if limit:
        over_time.axhline(limit.tokens_per_s, color="black", linestyle="--", label=f"limit of {limit.device}")
    over_time.set(xlabel="s", ylabel="tokens/s", title="Throughput")
    over_time.legend()
    for axes, values, name in (
        (first_tokens, first_token_times(arrivals), "First token"),
        (gaps, message_gaps(arrivals), "Gap between messages"),
    ):
        axes.ecdf([1e3 * value for value in values] or [0.0])
        axes.set(xlabel="ms", ylabel="share of streams" if axes is first_tokens else "share of gaps", title=name)
        axes.grid(alpha=0.3)
    if message_gaps(arrivals):
        gaps.set_xscale("log")
    figure.savefig(file, format="png", dpi=120)


def throughput(arrivals: Sequence[Arrivals], num_bins: int) -> tuple[list[float], list[float]]:
    """The edges of equal spans from the first request to the last token, seconds, and each span's tokens a second."""
    begin = min(stream.sent for stream in arrivals)
    width = (max(stream.times[-1] for stream in arrivals) - begin) / num_bins
    counts = [0] * num_bins
    for stream in arrivals:
        for when, count in zip(stream.times, stream.num_tokens, strict=True):
            counts[min(int((when - begin) / width), num_bins - 1)] += count
    return [index * width for index in range(num_bins + 1)], [count / width for count in counts]
