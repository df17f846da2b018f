"""Compile every kernel for sm_90 as its wrapper launches it, without a GPU: python -m tests.kernels.gpu.compile_sm90.

Writes a line of JSON for each compiled variant. Tensors are on the CPU and are never touched: a wrapper's launch ends
behind the compiler. Not under TRITON_INTERPRET.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from executor_service.layers.partition import even_span
from kernels.gpu import (
    activation,
    decode_attention,
    decode_split,
    logit_changes,
    logprobs,
    norm,
    peer_all_reduce,
    peer_exchange,
    prefill_attention,
    qk_norm_rope,
    sampler,
    sampler_shard,
    skinny_linear,
    slot_state,
    step_rings,
)

CPU = torch.device("cpu")
NUM_SLOTS, MAX_BLOCKS = 264, 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    has_qk_norm: bool

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = [
    Shape("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151936, True),
    Shape("SmolLM2-135M", 576, 9, 3, 64, 1536, 49152, False),
]


class Sm90Driver:
    """As much of Triton's driver as the compiler asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def run_elementwise(shape: Shape, dtype: torch.dtype) -> None:
    def rows(num_rows: int, size: int) -> torch.Tensor:
        return torch.empty(num_rows, size, dtype=dtype)

    weight = rows(1, shape.hidden_size)[0]
    x = rows(32, shape.hidden_size)
    norm.rms_norm(x, weight, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)
    activation.silu_and_mul(rows(32, 2 * shape.intermediate_size))

    kv_cache = torch.empty(4, shape.num_kv_heads, 2, 64, shape.head_dim, dtype=dtype)
    table = torch.empty(4096, shape.head_dim, dtype=torch.float32)
    head_norm = rows(1, shape.head_dim)[0] if shape.has_qk_norm else None
    bias = rows(1, shape.qkv_size)[0]
    for num_tokens in (1, 256, 16384):
        for qkv_bias in (None, bias):
            qk_norm_rope.qk_norm_rope_store(
                rows(num_tokens, shape.qkv_size), ints(num_tokens), ints(num_tokens), table, kv_cache, head_norm,
                head_norm, qkv_bias, 1e-6, shape.num_heads, shape.num_kv_heads,
            )  # fmt: skip
        k = torch.empty(num_tokens, shape.num_kv_heads, shape.head_dim, dtype=dtype)
        qk_norm_rope.store_kv(k, k, kv_cache, ints(num_tokens))


def run_linear(shape: Shape, dtype: torch.dtype) -> None:
    def weight(out_features: int, in_features: int) -> torch.Tensor:
        return torch.empty(out_features, in_features, dtype=dtype)

    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    norm_weight = weight(1, hidden)[0]
    # float32 takes cuBLAS on a GPU: one number of rows is for the tests.
    for num_rows in (1, 2, 4, 8, 16) if dtype == torch.bfloat16 else (4,):
        x = torch.empty(num_rows, hidden, dtype=dtype)
        skinny_linear.linear(weight(num_rows, heads), weight(hidden, heads), None)
        skinny_linear.linear(weight(num_rows, shape.intermediate_size), weight(hidden, shape.intermediate_size), None)
        skinny_linear.linear(x, weight(shape.vocab_size, hidden), None)
        for given in (None, x):
            inputs = (given, x, norm_weight, 1e-6)
            skinny_linear.add_norm_linear(*inputs, weight(shape.qkv_size, hidden), None)
            skinny_linear.add_norm_gate_up(*inputs, weight(2 * shape.intermediate_size, hidden), None)
            skinny_linear.add_norm_linear(*inputs, weight(shape.vocab_size, hidden), None)
    x, bias = weight(4, hidden), weight(1, shape.qkv_size)[0]
    skinny_linear.add_norm_linear(x, x, norm_weight, 1e-6, weight(shape.qkv_size, hidden), bias)


def run_attention(shape: Shape, dtype: torch.dtype) -> None:
    def queries(num_tokens: int) -> torch.Tensor:
        qkv = torch.empty(num_tokens, shape.qkv_size, dtype=dtype)
        return qkv.view(num_tokens, -1, shape.head_dim)[:, : shape.num_heads]

    tables = ints(NUM_SLOTS, MAX_BLOCKS)
    workspace = decode_attention.make_workspace(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, CPU, num_programs=396
    )
    config = prefill_attention.CONFIGS[dtype]
    max_tiles = prefill_attention.num_tiles(512, 4, shape.num_heads // shape.num_kv_heads, config)
    for block_size in (64, 256):
        kv_cache = torch.empty(4, shape.num_kv_heads, 2, block_size, shape.head_dim, dtype=dtype)
        for batch in (1, 256):
            schedule = decode_split.make_schedule(ints(batch), ints(batch), tables, block_size, workspace.split)
            decode_attention.paged_decode_attention(
                queries(batch), kv_cache, tables, ints(batch), ints(batch), schedule, workspace
            )
        prefill_attention.paged_prefill_attention(
            queries(512), kv_cache, ints(5), ints(4), ints(4), tables, max_tiles, config
        )


def run_sampler(shape: Shape, dtype: torch.dtype) -> None:
    state = ints(slot_state.NUM_FIELDS.value, NUM_SLOTS)
    workspace = sampler.Workspace.empty(256, shape.vocab_size, dtype, CPU)
    for batch in (1, 32, 256):
        logits = torch.empty(batch, shape.vocab_size, dtype=dtype)
        sampler.sample(logits, ints(batch), state, ints(batch), workspace)


def run_special_rows(shape: Shape, dtype: torch.dtype) -> None:
    logits = torch.empty(32, shape.vocab_size, dtype=dtype)
    records = torch.empty(3, logit_changes.RECORD_SIZE.value, dtype=torch.int64)
    logit_changes.change_logits(logits, ints(32), ints(32), records)
    logit_changes.settle_tokens(ints(32), logits, records)
    workspace = logprobs.LogprobWorkspace.empty(256, shape.vocab_size, CPU)
    for num_rows in (1, 16, 21):  # one variant for all
        columns = ints(4, num_rows)
        entries = ints(num_rows, logprobs.ENTRY_SIZE)
        logprobs.log_probabilities(logits, columns[3], columns[1:3], entries, workspace)


def run_peers(shape: Shape, dtype: torch.dtype) -> None:
    """What ranks run together, for the last rank of a small and of a large group."""
    state = ints(slot_state.NUM_FIELDS.value, NUM_SLOTS)
    for num_ranks, batches in ((2, (1, 32, 256)), (8, (32,))):
        span = even_span(shape.vocab_size, num_ranks - 1, num_ranks, 4096)
        memory = peer_exchange.PeerMemory(num_ranks - 1, torch.empty(num_ranks, dtype=torch.int64), 2**20)
        x, residual = (torch.empty(8, shape.hidden_size, dtype=dtype) for _ in range(2))
        for norm_one_shot in (16384, 0):
            limits = peer_all_reduce.AllReduceLimits(65536, norm_one_shot, 16384)
            all_reduce = peer_all_reduce.PeerAllReduce.make(memory, limits)
            all_reduce.all_reduce(x)
            if all_reduce.takes_rows(x):
                all_reduce.all_reduce_norm(x, residual, residual[0], 1e-6)
        shard = sampler_shard.Shard.make(shape.vocab_size, span.length, 256, memory)
        workspace = sampler.Workspace.empty(256, shape.vocab_size, dtype, CPU, shard=shard)
        for batch in batches:
            logits = torch.empty(batch, span.stop - span.start, dtype=dtype)
            sampler.sample(logits, ints(batch), state, ints(batch), workspace)


def run_step(shape: Shape, dtype: torch.dtype) -> None:
    """The kernels of slot state and rings, which do not know the model's dtype."""
    state, tables, stops = ints(slot_state.NUM_FIELDS.value, NUM_SLOTS), ints(NUM_SLOTS, MAX_BLOCKS), ints(NUM_SLOTS, 8)
    clock = torch.empty(1, dtype=torch.int64)
    slot_state.admit(ints(1000), 3, state, stops, tables)
    slot_state.prefill_inputs(ints(4, 3), state, tables, clock, ints(512), ints(512), 64, 512)
    layout = step_rings.RingLayout(max_batch=256, max_appends=256)
    inputs, results = ints(8, layout.inputs_size), ints(8, layout.result_size)
    split = decode_split.Split(num_programs=396, num_kv_heads=shape.num_kv_heads, max_items=264, min_share=1)
    for batch in (1, 8, 256):
        step_rings.decode_inputs(inputs, layout, clock, state, tables, ints(256), clock, batch, 64, split)
        for decode in (False, True):
            logprobs = torch.empty(batch, dtype=torch.float32)
            step_rings.advance(
                ints(batch), logprobs, ints(batch), state, stops, clock, clock, results, layout, decode=decode
            )


RUNS: list[Callable[[Shape, torch.dtype], None]] = [
    run_elementwise,
    run_linear,
    run_attention,
    run_sampler,
    run_special_rows,
    run_peers,
    run_step,
]


def resources(cubin: bytes) -> dict[str, int]:
    """What ptxas gave a kernel: registers a thread, and bytes of the local memory that it spills to."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}


def variants(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every variant of a dtype once, each {kernel, run, shape, dtype, seconds, shared, registers, spilled}."""
    launched: list[tuple[str, Any, float]] = []
    seen: set[int] = set()
    original = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((f"{self.fn.__module__}.{self.fn.__name__}", kernel, time.perf_counter() - start))
        return kernel

    driver.set_active(Sm90Driver())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    # What knows no dtype is compiled beside the one that has fewer variants.
    runs = [run for run in RUNS if run is not run_step or dtype == torch.float32]
    for shape in SHAPES:
        for run in runs:
            launched.clear()
            run(shape, dtype)
            for name, kernel, seconds in launched:
                if id(kernel) in seen:
                    continue
                seen.add(id(kernel))
                yield {
                    "kernel": name,
                    "run": run.__name__,
                    "shape": shape.name,
                    "dtype": str(dtype),
                    "seconds": round(seconds, 2),
                    "shared": kernel.metadata.shared,
                    **resources(kernel.asm["cubin"]),
                }


if __name__ == "__main__":
    for variant in variants(getattr(torch, sys.argv[1])):
        sys.stdout.write(json.dumps(variant) + "\n")
        sys.stdout.flush()
