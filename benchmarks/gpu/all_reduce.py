"""All-reduce between the GPUs of a host: NCCL, our exchange through peer memory, and PyTorch's one-shot kernel.

usage: torchrun --nproc-per-node N -m benchmarks.gpu.all_reduce [--write] [--json FILE] [--plot FILE]

Times are those of a call in a CUDA graph of 20, the slowest rank's; "norm" ones are of rows of 4,096 bfloat16, with the
residual's addition and the norm that follow in a decoder layer. --write puts what the executor shall use into the table
that it reads. PyTorch's kernel is for comparison: it sums bfloat16 in bfloat16, behind two barriers.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch.cuda import nccl

from benchmarks.gpu.timing import time_graph
from executor_service.distributed.gpu_collectives import TABLE, table_key
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from kernels.gpu.norm import add_rms_norm
from kernels.gpu.peer_all_reduce import AllReduceLimits, PeerAllReduce

SIZES = [2 << (10 + step) for step in range(14)]  # bytes: 2 KiB to 16 MiB
MAX_PEER_BYTES = 4 << 20
ROW_SIZE = 4096  # of Qwen3-8B
WAYS = {
    "one-shot": AllReduceLimits(MAX_PEER_BYTES, MAX_PEER_BYTES, 0),
    "two-shot": AllReduceLimits(0, 0, MAX_PEER_BYTES),
}
COPY_BYTES = 256 << 20
TORCH_GROUP_SIZES = (2, 4, 8)  # in others its ranks sum in different orders


class Bench:
    """One rank's part; all ranks run it alike."""

    def __init__(self) -> None:
        self.placement = Placement.read(os.environ)
        self.device = torch.device("cuda", self.placement.local_rank)
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))
        self.group = RankGroup(self.placement, self.device)
        self.ways: dict[str, PeerAllReduce] = {}
        for name, limits in WAYS.items():
            if memory := self.group.peer_memory(PeerAllReduce.num_words(self.placement.size, limits)):
                self.ways[name] = PeerAllReduce.make(memory, limits)
        self.shared, self.handle = self._share(COPY_BYTES) if self.ways else (None, None)
        torch.cuda.synchronize()

    def _share(self, num_bytes: int) -> tuple[Tensor, Any]:
        shared = _SymmetricMemory.empty_strided_p2p((num_bytes // 2,), (1,), torch.bfloat16, self.device)
        return shared.zero_(), _SymmetricMemory.rendezvous(shared, _group_name())

    def time(self, launch: Callable[[], object], calls: int = 20) -> float:
        """Seconds a call, of the slowest rank."""
        self.group.least(0)
        microseconds = time_graph(launch, calls) * 1e6
        torch.cuda.synchronize()
        return -self.group.least(-round(microseconds * 1000)) / 1e9

    def candidates(self, num_bytes: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """All-reduces of tensors of so many bytes, which may overwrite their argument."""
        found: dict[str, Callable[[Tensor], Tensor]] = {"nccl": _nccl}
        if self.ways and num_bytes <= MAX_PEER_BYTES:
            found["one-shot"] = self.ways["one-shot"].all_reduce
            if self.placement.size in TORCH_GROUP_SIZES:
                found["torch"] = self._torch
        return found

    def _torch(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        part = self.shared[: x.numel()].copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce_out(part, "sum", _group_name(), torch.empty_like(x))

    def norm_times(self, num_bytes: int) -> dict[str, float]:
        """Microseconds of each way to sum rows and take their norm; nothing below a row and above the largest size."""
        if not 2 * ROW_SIZE <= num_bytes <= MAX_PEER_BYTES:
            return {}
        size = (num_bytes // (2 * ROW_SIZE), ROW_SIZE)
        x, residual, weight = (torch.full(size, 2.0**-100, dtype=torch.bfloat16, device=self.device) for _ in range(3))
        launches: dict[str, Callable[[], object]] = {
            "nccl, norm": lambda: add_rms_norm(_nccl(x), residual, weight[0], 1e-6)
        }
        for name, way in self.ways.items():
            launches[f"{name} norm"] = lambda way=way: way.all_reduce_norm(x, residual, weight[0], 1e-6)
        torch.cuda.synchronize()
        return {name: round(self.time(launch) * 1e6, 2) for name, launch in launches.items()}

    def check(self, all_reduce: Callable[[Tensor], Tensor], num_bytes: int) -> str:
        """ok, or what is wrong with the results: the sum of all ranks, the same bits on all of them."""
        inputs = [self._input(num_bytes, rank) for rank in range(self.placement.size)]
        expected = torch.stack(inputs).double().sum(0)
        for _ in range(3):
            result = all_reduce(inputs[self.placement.rank].clone())
            worst = (result.double() - expected).abs().max()
            is_sum = bool(worst <= 2**-6 * expected.abs().max())
            gathered = result.new_empty((self.placement.size, result.numel()))
            dist.all_gather_into_tensor(gathered, result)
            is_same = all(torch.equal(gathered[0].view(torch.int16), other.view(torch.int16)) for other in gathered)
            if not self.group.least(int(is_sum and is_same)):
                return f"WRONG (sum {is_sum}, same bits {is_same})"
        return "ok"

    def _input(self, num_bytes: int, rank: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(rank)
        return torch.randn(num_bytes // 2, generator=generator, device=self.device).bfloat16()

    def copy_rates(self) -> dict[str, float]:
        """GB/s of writing to the next rank's memory: by rank 0 alone, and by all ranks at once."""
        if self.handle is None or self.shared is None:
            return {}
        peer = (self.placement.rank + 1) % self.placement.size
        remote = self.handle.get_buffer(peer, (COPY_BYTES // 2,), torch.bfloat16)
        local = torch.randn(COPY_BYTES // 2, device=self.device).bfloat16()
        small = local[:1024]
        is_first = self.placement.rank == 0
        alone = self.time(lambda: (remote if is_first else local[:1024]).copy_(local if is_first else small), calls=5)
        together = self.time(lambda: remote.copy_(local), calls=5)
        return {"alone": COPY_BYTES / alone / 1e9, "together": COPY_BYTES / together / 1e9}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each size: microseconds of each candidate."""
        rows = []
        for num_bytes in SIZES:
            row: dict[str, Any] = {"bytes": num_bytes}
            for name, all_reduce in self.candidates(num_bytes).items():
                try:
                    verdict = self.check(all_reduce, num_bytes)
                except RuntimeError as error:  # PyTorch's differs between versions
                    row[f"{name} is"] = str(error).splitlines()[0]
                    continue
                x = torch.full((num_bytes // 2,), 2.0**-100, dtype=torch.bfloat16, device=self.device)
                torch.cuda.synchronize()  # the graph's stream does not wait for what makes the input
                row[name] = round(self.time(lambda f=all_reduce, x=x: f(x)) * 1e6, 2)
                if verdict != "ok":
                    row[f"{name} is"] = verdict
            rows.append(row | self.norm_times(num_bytes))
            if self.placement.rank == 0:
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        return rows


def _group_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def _nccl(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def limits(rows: list[dict[str, Any]]) -> AllReduceLimits:
    """What our exchange is used for: up to where it is always right and no slower than the next way."""
    is_right = not any("one-shot is" in row for row in rows)

    def up_to(name: str, others: list[str]) -> int:
        best = 0
        for row in rows:
            if name in row and min(row[other] for other in others) < row[name]:
                break
            best = row["bytes"] if name in row and is_right else best
        return best

    return AllReduceLimits(
        one_shot=up_to("one-shot", ["nccl"]),
        norm_one_shot=up_to("one-shot norm", ["two-shot norm", "nccl, norm"]),
        norm_two_shot=up_to("two-shot norm", ["nccl, norm"]),
    )


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time by size, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in ("nccl", "one-shot", "torch", "nccl, norm", "one-shot norm", "two-shot norm"):
        points = [(row["bytes"] / 1024, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="KiB of bfloat16", ylabel="µs", title=title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print the table; rank 0 writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    bench = Bench()
    key = table_key(torch.cuda.get_device_name(bench.device), bench.placement.size)
    is_first = bench.placement.rank == 0
    if is_first:
        print(f"{key}, torch {torch.__version__}, NCCL {nccl.version()}; µs a call", flush=True)
    rows = bench.rows()
    rates = bench.copy_rates()
    if is_first:
        for name, rate in rates.items():
            print(f"writes to a peer's memory, {name}: {rate:.0f} GB/s")
        print(limits(rows), flush=True)
        if args.write:
            table = json.loads(TABLE.read_text()) | {key: dataclasses.asdict(limits(rows))}
            TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
        if args.json:
            args.json.write_text(json.dumps({"group": key, "GB/s": rates, "rows": rows}, indent=2) + "\n")
        if args.plot:
            plot(rows, key, args.plot)
    bench.group.least(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
