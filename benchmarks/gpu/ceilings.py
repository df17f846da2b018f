"""What the machine itself can do: memory, matrix products, linear layers by shape and batch, nodes of a graph.

usage: python -m benchmarks.gpu.ceilings [--json FILE]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import time_call, time_graph
from kernels.gpu import skinny_linear

# [out_features, in_features] of Qwen3-0.6B, and how many of each a decode step has.
SHAPES = {
    "qkv": (4096, 1024, 28),
    "o": (1024, 2048, 28),
    "gate_up": (6144, 1024, 28),
    "down": (1024, 3072, 28),
    "lm_head": (151936, 1024, 1),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
L2_BYTES = 64 << 20


def main() -> None:
    """Print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ceilings = measure()
    print(json.dumps(ceilings))
    if args.json:
        args.json.write_text(json.dumps(ceilings, indent=2) + "\n")
    print_graph_nodes()
    print_linears()


def measure() -> dict[str, float | str]:
    """Bytes and operations a second."""
    x = torch.randn(2**30, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copy_s = time_call(lambda: y.copy_(x))
    wide = x.view(torch.float32)
    read_s = time_call(wide.sum)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = time_call(lambda: a @ b)
    return {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": 2 * x.nbytes / copy_s,
        "read_bytes_per_s": max(x.nbytes / read_s, 2 * x.nbytes / copy_s),
        "flops_per_s": 2 * 8192**3 / product_s,
    }


def print_graph_nodes() -> None:
    """What a node costs that does next to nothing."""
    x = torch.zeros(1024, device="cuda")
    for nodes in (50, 200):
        print(f"graph of {nodes} tiny nodes: {time_graph(lambda: x.add_(1.0), nodes) * 1e6:.2f} us a node")


def print_linears() -> None:
    """Microseconds a call, over weights that no cache holds: cuBLAS, and our own kernel where it applies."""
    print("us a call".ljust(12) + "".join(f"{batch:>14}" for batch in BATCHES))
    for name, (out_features, in_features, _) in SHAPES.items():
        count = max(2, 4 * L2_BYTES // (2 * out_features * in_features))
        weights = [
            torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(count)
        ]
        cells: list[str] = []
        for batch in BATCHES:
            x = torch.randn(batch, in_features, device="cuda", dtype=torch.bfloat16)
            cublas = _time_each(F.linear, x, weights)
            own = ""
            if batch <= skinny_linear.MAX_ROWS:
                own = f"/{_time_each(skinny_linear.linear, x, weights) * 1e6:.1f}"
            cells.append(f"{cublas * 1e6:.1f}{own}".rjust(14))
        print(name.ljust(12) + "".join(cells), flush=True)


def _time_each(linear: Callable[[Tensor, Tensor, None], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    return time_graph(lambda: [linear(x, weight, None) for weight in weights], 1) / len(weights)


if __name__ == "__main__":
    main()
