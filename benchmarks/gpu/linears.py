"""Try every way to run a linear layer of few rows and keep the fastest in kernels/gpu/linear_table.json.

usage: python -m benchmarks.gpu.linears [--output FILE]

Each is timed as it stands in a decode step: behind an add and a norm, in front of an activation, over weights that no
cache holds. The table's other entries stay.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import time_graph
from kernels.gpu import skinny_linear
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.linear_choice import TABLE, key
from kernels.gpu.norm import add_rms_norm
from kernels.gpu.skinny_linear import Config

# Of Qwen3-0.6B: kind, [out_features, in_features] of the weight, candidates (block_n, block_k, num_warps, num_stages).
LAYERS: list[tuple[str, int, int, list[Config]]] = [
    ("norm_linear", 4096, 1024, [Config(16, 512, 8, 3), Config(16, 256, 4, 4), Config(32, 512, 8, 3),
                                 Config(32, 256, 8, 4), Config(8, 512, 4, 3)]),
    ("norm_gate_up", 6144, 1024, [Config(8, 512, 8, 3), Config(16, 512, 8, 3), Config(16, 256, 8, 4),
                                  Config(8, 256, 4, 4)]),
    ("linear", 1024, 2048, [Config(8, 1024, 8, 3), Config(8, 512, 8, 4), Config(8, 256, 4, 6)]),
    ("linear", 1024, 3072, [Config(8, 1024, 8, 4), Config(8, 512, 8, 5), Config(8, 256, 4, 6)]),
    ("norm_linear", 151936, 1024, [Config(64, 256, 4, 4), Config(128, 128, 8, 4), Config(32, 512, 8, 3)]),
]  # fmt: skip
ROWS = (1, 2, 4, 8, 16)
L2_BYTES = 64 << 20
EPS = 1e-6

Run = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # x, residual, norm weight, weight


def ways(kind: str, config: Config | None) -> dict[bool, Run]:
    """What can be timed, by whether the norm is fused."""
    if kind == "linear":
        if config is None:
            return {False: lambda x, residual, norm, weight: F.linear(x, weight)}
        return {False: lambda x, residual, norm, weight: skinny_linear.linear(x, weight, None, config)}
    if kind == "norm_linear":
        if config is None:
            return {False: lambda x, residual, norm, weight: F.linear(add_rms_norm(x, residual, norm, EPS), weight)}
        return {
            False: lambda x, residual, norm, weight: skinny_linear.linear(
                add_rms_norm(x, residual, norm, EPS), weight, None, config
            ),
            True: lambda x, residual, norm, weight: skinny_linear.add_norm_linear(
                x, residual, norm, EPS, weight, None, config
            ),
        }
    if config is None:
        return {
            False: lambda x, residual, norm, weight: silu_and_mul(
                F.linear(add_rms_norm(x, residual, norm, EPS), weight)
            )
        }
    return {
        False: lambda x, residual, norm, weight: skinny_linear.gate_up(
            add_rms_norm(x, residual, norm, EPS), weight, None, config
        ),
        True: lambda x, residual, norm, weight: skinny_linear.add_norm_gate_up(
            x, residual, norm, EPS, weight, None, config
        ),
    }


def main() -> None:
    """Print the fastest of each, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE)
    args = parser.parse_args()
    table = json.loads(TABLE.read_text())
    for kind, out_features, in_features, candidates in LAYERS:
        entries = table[key(torch.cuda.get_device_capability(), kind, out_features, in_features)] = {}
        count = max(2, 3 * L2_BYTES // (2 * out_features * in_features))
        weights = [torch.randn(out_features, in_features, device="cuda").bfloat16() / 32 for _ in range(count)]
        norm = torch.randn(in_features, device="cuda").bfloat16()
        for num_rows in ROWS:
            x, residual = (torch.randn(num_rows, in_features, device="cuda").bfloat16() for _ in range(2))
            times: dict[tuple[bool, Config | None], float] = {}
            for config in (None, *candidates):
                for fuses_norm, run in ways(kind, config).items():
                    times[fuses_norm, config] = _time(run, x, residual, norm, weights)
            best = min(times, key=times.__getitem__)
            entries[str(num_rows)] = {"fuses_norm": best[0], "config": best[1]}
            ranking = sorted(times.items(), key=lambda item: item[1])
            shown = ", ".join(
                f"{'fused ' if fused else ''}{tuple(config) if config else 'cuBLAS'} {seconds * 1e6:.1f}"
                for (fused, config), seconds in itertools.chain(
                    ranking[:3], (item for item in ranking[3:] if item[0][1] is None)
                )
            )
            print(f"{kind} {out_features}x{in_features}, {num_rows} rows, us: {shown}", flush=True)
    args.output.write_text(written(table))


def written(table: dict[str, dict[str, object]]) -> str:
    """JSON with a line for each number of rows."""
    layers = [
        f' "{name}": {{\n' + ",\n".join(f'  "{rows}": {json.dumps(entry)}' for rows, entry in entries.items()) + "\n }"
        for name, entries in table.items()
    ]
    return "{\n" + ",\n".join(layers) + "\n}\n"


def _time(run: Run, x: Tensor, residual: Tensor, norm: Tensor, weights: list[Tensor]) -> float:
    try:
        return time_graph(lambda: [run(x, residual, norm, weight) for weight in weights], 1, 3) / len(weights)
    except Exception as error:  # a candidate may want more shared memory than there is
        print(f"  left out: {error}"[:100])
        torch.cuda.synchronize()
        return float("inf")


if __name__ == "__main__":
    main()
