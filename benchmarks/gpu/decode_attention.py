"""Time of the attention kernels on the GPU: bandwidth of decode and arithmetic of prefill, over launch configurations.

Decode counts the bytes of keys and values once; its launches go over different sequences, so that the L2 cache holds
none of what they read. Every configuration is first compared with plain torch, and repeated: the bits must not change.
Run: `python -m benchmarks.gpu.decode_attention [--quick]`.
"""

import argparse
import functools
import importlib.util
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.timing import time_graph
from kernels.gpu.decode_attention import DecodeConfig, Workspace, make_workspace, paged_decode_attention
from kernels.gpu.decode_split import Split, make_schedule
from kernels.gpu.prefill_attention import PrefillConfig, num_tiles, paged_prefill_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 64
KV_BYTES_PER_TOKEN = NUM_KV_HEADS * 2 * HEAD_DIM * 2
RAGGED = random.Random(0).choices(range(100, 2049), k=256)
DECODE_BATCHES = {
    "1x800": [800],
    "2x800": [800] * 2,
    "8x800": [800] * 8,
    "16x800": [800] * 16,
    "32x800": [800] * 32,
    "64x800": [800] * 64,
    "256x800": [800] * 256,
    "8 ragged": RAGGED[:8],
    "256 ragged": RAGGED,
    "1x8192": [8192],
}
PREFILL_BATCHES = {  # queries, context
    "16x1024": [(1024, 1024)] * 16,
    "256x512": [(512, 512)] * 256,
    "1x8192": [(8192, 8192)],
    "8x256 at 4096": [(256, 4096)] * 8,
}
DECODE_CONFIGS = [
    DecodeConfig(),
    DecodeConfig(max_items=0),
    *(
        DecodeConfig(num_warps=num_warps, max_items=max_items, min_share=min_share)
        for num_warps in (4, 2)
        for max_items in (132, 264, 396)
        for min_share in (1, 2, 4)
    ),
    DecodeConfig(num_stages=4, programs_per_sm=2),
    DecodeConfig(num_warps=2, num_stages=4, programs_per_sm=2),
]
PREFILL_CONFIGS = [
    PrefillConfig(),
    PrefillConfig(block_n=128, num_stages=2),
    PrefillConfig(num_stages=4),
    PrefillConfig(block_m=64, num_warps=4),
]


@dataclass
class Batch:
    """Sequences over one cache; block_tables holds several sets of blocks for them, which do not overlap."""

    context_lens: Tensor  # [batch] int32
    slots: Tensor  # [batch] int32
    block_tables: list[Tensor]  # each [batch, max_blocks] int32
    kv_cache: Tensor  # [num_blocks, kv_heads, 2, block_size, head_dim]

    @classmethod
    def random(cls, lengths: list[int], total_bytes: int) -> "Batch":
        """As many sets of blocks as total_bytes asks for."""
        max_blocks = -(-max(lengths) // BLOCK_SIZE)
        num_sets = max(1, -(-total_bytes // (sum(lengths) * KV_BYTES_PER_TOKEN)))
        num_blocks = num_sets * len(lengths) * max_blocks
        kv_cache = torch.randn(num_blocks, NUM_KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        blocks = torch.randperm(num_blocks, dtype=torch.int32, device="cuda")
        context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        return cls(
            context_lens=context_lens,
            slots=torch.arange(len(lengths), dtype=torch.int32, device="cuda"),
            block_tables=list(blocks.view(num_sets, len(lengths), max_blocks)),
            kv_cache=kv_cache,
        )

    def schedule(self, table: Tensor, split: Split) -> Tensor:
        """See `make_schedule`."""
        return make_schedule(self.context_lens, self.slots, table, BLOCK_SIZE, split)

    def decode(self, q: Tensor, table: Tensor, schedule: Tensor, workspace: Workspace) -> Tensor:
        """One launch."""
        return paged_decode_attention(q, self.kv_cache, table, self.slots, self.context_lens, schedule, workspace)

    def prefill(self, q: Tensor, table: Tensor, query_starts: Tensor, config: PrefillConfig) -> Tensor:
        """One launch."""
        max_tiles = num_tiles(len(q), len(self.slots), NUM_HEADS // NUM_KV_HEADS, config)
        return paged_prefill_attention(
            q, self.kv_cache, query_starts, self.context_lens, self.slots, table, max_tiles, config
        )

    def attend(self, q: Tensor, row: int) -> Tensor:
        """Plain torch, float32: q [n, heads, head_dim], the newest tokens of a sequence."""
        length = int(self.context_lens[row])
        if length == 0:
            return torch.zeros_like(q, dtype=torch.float32)
        entries = self.kv_cache[self.block_tables[0][row].long()].float().permute(2, 1, 0, 3, 4)
        keys, values = entries.reshape(2, NUM_KV_HEADS, -1, HEAD_DIM)[:, :, :length].repeat_interleave(
            NUM_HEADS // NUM_KV_HEADS, dim=1
        )
        scores = torch.einsum("nhd,hmd->hnm", q.float(), keys) / HEAD_DIM**0.5
        is_future = torch.ones_like(scores[0], dtype=torch.bool).triu(length - len(q) + 1)
        return torch.einsum("hnm,hmd->nhd", scores.masked_fill(is_future, -torch.inf).softmax(-1), values)


def queries(num_tokens: int) -> Tensor:
    """[num_tokens, heads, head_dim], a view of the result of a QKV projection."""
    qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return qkv[:, :NUM_HEADS]


def verdict(launch: Callable[[], Tensor], expected: Tensor) -> str:
    """The relative error of a launch, and whether 100 more give its bits."""
    first = launch()
    num_different = sum((launch() != first).any() for _ in range(100))
    error = (first.float() - expected).abs().max() / expected.abs().max()
    return f"{float(error):.1e} {'same' if not num_different else f'{int(num_different)} DIFFER'}"


def starts_of(chunks: list[tuple[int, int]]) -> list[int]:
    """Where each chunk's queries begin, and where the last ones end."""
    return list(itertools.accumulate((count for count, _ in chunks), initial=0))


class CheckedDecode:
    """A batch whose attention is known."""

    def __init__(self, lengths: list[int]) -> None:
        self.batch, self.q = Batch.random(lengths, 0), queries(len(lengths))
        self.expected = torch.cat([self.batch.attend(self.q[row : row + 1], row) for row in range(len(lengths))])

    def decode(self, workspace: Workspace) -> Tensor:
        """A schedule and a launch."""
        table = self.batch.block_tables[0]
        return self.batch.decode(self.q, table, self.batch.schedule(table, workspace.split), workspace)


def sweep_decode(configs: list[DecodeConfig], names: list[str], total_bytes: int) -> None:
    """A line a configuration: microseconds and TB/s of each batch."""
    batches = {name: Batch.random(DECODE_BATCHES[name], total_bytes) for name in names}
    checked = [CheckedDecode(lengths) for lengths in ([0, 1, 63, 64, 65, 0, *RAGGED[:40], 5000], [0, 65, 5000])]
    print("decode: us, TB/s".ljust(24) + "".join(f"{name:>15}" for name in names) + "   error, repeats")
    split = make_workspace(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.device("cuda")).split
    line = "schedule".ljust(24)
    for batch in batches.values():
        torch.cuda.synchronize()
        line += f"{time_graph(lambda b=batch: b.schedule(b.block_tables[0], split)) * 1e6:9.1f}".ljust(15)
    print(line, flush=True)
    for config in configs:
        workspace = make_workspace(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.device("cuda"), config)
        line = f"w{config.num_warps} s{config.num_stages} {config.programs_per_sm}/SM "
        line = (line + f"i{config.max_items} m{config.min_share}").ljust(24)
        for name, batch in batches.items():
            q, tables = queries(len(batch.slots)), batch.block_tables
            sets = itertools.cycle([(table, batch.schedule(table, workspace.split)) for table in tables])
            torch.cuda.synchronize()  # the graph's stream does not wait for what makes the inputs
            seconds = time_graph(
                lambda b=batch, q=q, s=sets, w=workspace: b.decode(q, *next(s), w), calls=max(20, len(tables))
            )
            rate = sum(DECODE_BATCHES[name]) * KV_BYTES_PER_TOKEN / seconds / 1e12
            line += f"{seconds * 1e6:9.1f} {rate:5.2f}"
        verdicts = [verdict(lambda c=case, w=workspace: c.decode(w), case.expected) for case in checked]
        print(line + "   " + ", ".join(verdicts), flush=True)


def num_pairs(name: str) -> int:
    """Of a query and a token that it sees, in a batch of prefill."""
    return sum(count * context - count * (count - 1) // 2 for count, context in PREFILL_BATCHES[name])


def sweep_prefill(configs: list[PrefillConfig], names: list[str]) -> None:
    """A line a configuration: TFLOP/s of each batch, counting what the causal mask leaves."""
    batches = {name: Batch.random([context for _, context in PREFILL_BATCHES[name]], 0) for name in names}
    chunks = [(70, 70), (1, 1), (0, 64), (130, 700), (257, 321), (1, 999)]
    checked, checked_starts = Batch.random([context for _, context in chunks], 0), starts_of(chunks)
    q_checked = queries(checked_starts[-1])
    ranges = list(itertools.pairwise(checked_starts))
    expected = torch.cat([checked.attend(q_checked[start:end], row) for row, (start, end) in enumerate(ranges)])
    print("prefill: TFLOP/s".ljust(24) + "".join(f"{name:>15}" for name in names) + "   error, repeats")
    for config in configs:
        line = f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.num_stages}".ljust(24)
        for name, batch in batches.items():
            starts = starts_of(PREFILL_BATCHES[name])
            q, query_starts = queries(starts[-1]), torch.tensor(starts, dtype=torch.int32, device="cuda")
            launch = lambda b=batch, q=q, s=query_starts, c=config: b.prefill(q, b.block_tables[0], s, c)  # noqa: E731
            torch.cuda.synchronize()
            line += f"{4 * HEAD_DIM * NUM_HEADS * num_pairs(name) / time_graph(launch, calls=5) / 1e12:15.0f}"
        query_starts = torch.tensor(checked_starts, dtype=torch.int32, device="cuda")
        launch = lambda c=config, s=query_starts: checked.prefill(q_checked, checked.block_tables[0], s, c)  # noqa: E731
        print(line + "   " + verdict(launch, expected), flush=True)


def print_flash_attention(names: list[str]) -> None:
    """The same line for the package flash-attn, whose keys and values are not in a paged cache."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    line = "flash-attn".ljust(24)
    for name in names:
        counts, contexts = ([chunk[side] for chunk in PREFILL_BATCHES[name]] for side in (0, 1))
        starts = [
            torch.tensor(list(itertools.accumulate(side, initial=0)), dtype=torch.int32, device="cuda")
            for side in (counts, contexts)
        ]
        q, (k, v) = queries(sum(counts)), queries(2 * sum(contexts))[:, :NUM_KV_HEADS].chunk(2)
        torch.cuda.synchronize()
        launch = functools.partial(flash_attn_varlen_func, q, k, v, *starts, max(counts), max(contexts), causal=True)
        seconds = time_graph(launch, calls=5)
        line += f"{4 * HEAD_DIM * NUM_HEADS * num_pairs(name) / seconds / 1e12:15.0f}"
    print(line, flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default configurations only")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.decode_attention needs a GPU")
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}")
    torch.manual_seed(0)
    sweep_decode(DECODE_CONFIGS[: 1 if quick else None], list(DECODE_BATCHES), 4 * properties.L2_cache_size)
    sweep_prefill(PREFILL_CONFIGS[: 1 if quick else None], list(PREFILL_BATCHES))
    if importlib.util.find_spec("flash_attn") is not None:
        print_flash_attention(list(PREFILL_BATCHES))


if __name__ == "__main__":
    main()
