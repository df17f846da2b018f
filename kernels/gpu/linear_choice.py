"""Which kernels run a linear layer of few rows: read from a table that benchmarks/gpu/linears.py writes.

The table is committed, so that restarts and ranks never choose differently.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from kernels.gpu.skinny_linear import MAX_ROWS, Config, pick_config

TABLE = Path(__file__).parent / "linear_table.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a layer runs."""

    fuses_norm: bool  # the norm before it is part of the kernel
    config: Config | None  # of our own kernel; None: cuBLAS


CUBLAS = Choice(fuses_norm=False, config=None)


@functools.cache
def choose(capability: tuple[int, int], kind: str, out_features: int, in_features: int, num_rows: int) -> Choice:
    """The fastest as measured; for shapes without an entry our own kernel up to 4 rows, the norm in it.

    capability: of the device; kind: linear, norm_linear or norm_gate_up; out_features: of the weight, gate and up both.
    """
    if num_rows > MAX_ROWS:
        return CUBLAS
    rows = next(size for size in (1, 2, 4, 8, 16) if num_rows <= size)
    entry = _table().get(key(capability, kind, out_features, in_features), {}).get(str(rows))
    if entry is not None:
        return Choice(entry["fuses_norm"], entry["config"] and Config(*entry["config"]))
    if rows > 4:
        return CUBLAS
    is_gate_up = kind == "norm_gate_up"
    config = pick_config(out_features // (1 + is_gate_up), in_features, is_gate_up)
    return Choice(fuses_norm=kind != "linear", config=config)


def key(capability: tuple[int, int], kind: str, out_features: int, in_features: int) -> str:
    """Of the table."""
    return f"sm_{capability[0]}{capability[1]} {kind} {out_features}x{in_features}"


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text())
