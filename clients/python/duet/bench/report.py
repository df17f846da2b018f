"""What `duet bench` says: a table to read and an object to store."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from duet.bench.limit import Limit
from duet.bench.metrics import Measurement, median
from duet.bench.scenarios import Scenario

# Name, field, what to multiply it with, digits.
_ROWS = (
    ("output tok/s", "tokens_per_s", 1, 1),
    ("output and prompt tok/s", "total_tokens_per_s", 1, 1),
    ("requests/s", "requests_per_s", 1, 2),
    ("decode tok/s", "decode_tokens_per_s", 1, 1),
    ("step of all streams, ms", "step_s", 1e3, 3),
    ("first token p50, ms", "ttft_p50_s", 1e3, 1),
    ("first token p90, ms", "ttft_p90_s", 1e3, 1),
    ("first token p99, ms", "ttft_p99_s", 1e3, 1),
    ("gap p50, ms", "gap_p50_s", 1e3, 2),
    ("gap p99, ms", "gap_p99_s", 1e3, 2),
    ("gap max, ms", "gap_max_s", 1e3, 2),
    ("a token p50, ms", "tpot_p50_s", 1e3, 3),
    ("a token p99, ms", "tpot_p99_s", 1e3, 3),
    ("cached prompt tokens", "cached_tokens", 1, 0),
)


def table(runs: Sequence[Measurement], limit: Limit | None) -> list[str]:
    """A row for each figure, a column for each run, the median, and the limit with the fraction of it reached."""
    middle = median(runs)
    columns = [*(dataclasses.asdict(run) for run in runs), middle]
    names = [*(f"run {number}" for number in range(1, len(runs) + 1)), "median"]
    lines = [f"{'':<24}{''.join(f'{name:>11}' for name in names)}"]
    for title, field, scale, digits in _ROWS:
        cells = (_cell(column[field], scale, digits) for column in columns)
        lines.append(f"{title:<24}{''.join(f'{cell:>11}' for cell in cells)}")
    if limit:
        lines[0] += f"{'limit':>11}{'reached':>10}"
        for field, fraction in fractions(middle, limit).items():
            row = next(index for index, known in enumerate(_ROWS, 1) if known[1] == field)
            least = _cell(getattr(limit, field), *_ROWS[row - 1][2:])
            lines[row] += f"{least:>11}{'-' if fraction is None else f'{fraction:.1%}':>10}"
    return lines


def fractions(figures: dict[str, float | None], limit: Limit) -> dict[str, float | None]:
    """How much of the device's limit was reached."""
    rate, step_s = figures["tokens_per_s"], figures["step_s"]
    return {
        "tokens_per_s": rate and rate / limit.tokens_per_s,
        "step_s": step_s and limit.step_s and limit.step_s / step_s,
    }


def as_json(
    scenario: Scenario, settings: dict[str, Any], runs: Sequence[Measurement], limit: Limit | None
) -> dict[str, Any]:
    """Everything measured."""
    middle = median(runs)
    return {
        "scenario": {**settings, **dataclasses.asdict(scenario)},
        "runs": [dataclasses.asdict(run) for run in runs],
        "median": middle,
        "limit": dataclasses.asdict(limit) if limit else None,
        "reached": fractions(middle, limit) if limit else None,
    }


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
