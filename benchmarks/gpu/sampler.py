"""Time on the GPU of what stands around a step's model: the sampler, and the kernels that read and write the rings.

Logits are bfloat16 over Qwen3's vocabulary: "peaked" ones have a head of likely tokens, as a language model's do, the
"flat" ones are normal, the worst case of top_p. The limit is one read of the logits from memory at the rate of a copy.
Run: `python -m benchmarks.gpu.sampler [--tune]`.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.timing import time_graph
from kernels.gpu.decode_split import Split
from kernels.gpu.sampler import Tuning, Workspace, default_tuning, sample
from kernels.gpu.slot_state import NUM_FIELDS, Admission, admit, pack, packed_size
from kernels.gpu.step_rings import RingLayout, advance, decode_inputs

VOCAB_SIZE = 151_936
BATCHES = (1, 8, 64, 256)
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "top_k 50, top_p 0.95": {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
    "min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
}
TILE_TUNINGS = [(tile, warps) for tile in (1024, 2048, 4096, 8192) for warps in (4, 8)]
ROW_TUNINGS = [(2048, 8), (4096, 8), (4096, 16), (8192, 16)]


class Slots:
    """Slot state of 256 sequences, all sampled alike."""

    def __init__(self, **params: float) -> None:
        self.state, self.stops, self.tables = (
            torch.zeros(size, dtype=torch.int32, device="cuda")
            for size in ((NUM_FIELDS.value, BATCHES[-1]), (BATCHES[-1], 8), (BATCHES[-1], 64))
        )
        one_block = np.zeros(1, dtype=np.int32)
        defaults = {"context_len": 100, "max_total": 2**30, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "choice_index": 0}
        sequences = [
            Admission(**(defaults | params), slot=slot, seed=slot, block_ids=one_block, stop_token_ids=one_block)  # pyright: ignore[reportArgumentType]
            for slot in range(BATCHES[-1])
        ]
        staging = np.zeros(packed_size(sequences), dtype=np.int32)
        pack(sequences, staging)
        admit(torch.from_numpy(staging).cuda(), len(sequences), self.state, self.stops, self.tables)


def make_logits(*, is_peaked: bool) -> Tensor:
    """[256, VOCAB_SIZE] bfloat16."""
    logits = torch.randn(BATCHES[-1], VOCAB_SIZE, device="cuda") * 2.5
    if is_peaked:
        heads = torch.rand(BATCHES[-1], 100, device="cuda").argsort(-1) * 1500 + 7
        logits.scatter_(1, heads, 20 - 3 * torch.arange(1, 101, device="cuda").log().expand(BATCHES[-1], -1))
    return logits.bfloat16()


def sampler(logits: Tensor, slots: Slots, batch: int, tuning: Tuning | None = None) -> Callable[[], object]:
    """A launch over the first `batch` rows."""
    workspace = Workspace.empty(batch, VOCAB_SIZE, logits.dtype, logits.device)
    row_slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    positions = torch.full_like(row_slots, 101)
    torch.cuda.synchronize()  # the graph's stream does not wait for what makes the inputs
    return lambda: sample(logits[:batch], row_slots, slots.state, positions, workspace, tuning)


def print_times() -> None:
    """Microseconds of every kind of row."""
    print("sampler, us".ljust(32) + "".join(f"{batch:>9}" for batch in BATCHES))
    for name, is_peaked in (("peaked", True), ("flat", False)):
        logits = make_logits(is_peaked=is_peaked)
        copied = torch.empty_like(logits)
        for kind, params in KINDS.items():
            slots = Slots(**params)
            times = [time_graph(sampler(logits, slots, batch)) for batch in BATCHES]
            print(f"{name}, {kind}".ljust(32) + "".join(f"{seconds * 1e6:9.1f}" for seconds in times), flush=True)
        seconds = [time_graph(lambda b=batch: copied[:b].copy_(logits[:b])) / 2 for batch in BATCHES]  # noqa: B023
        print("limit".ljust(32) + "".join(f"{second * 1e6:9.1f}" for second in seconds), flush=True)


def print_step_kernels() -> None:
    """Microseconds of the first and the last kernel of a decode step."""
    slots, layout = Slots(temperature=0.0), RingLayout(BATCHES[-1], 2 * BATCHES[-1])
    ring = torch.zeros(4, layout.inputs_size, dtype=torch.int32, pin_memory=True)
    results = torch.zeros(4, layout.result_size, dtype=torch.int32, pin_memory=True)
    cursor, clock = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
    rows = torch.arange(BATCHES[-1], dtype=torch.int32, device="cuda")
    tokens, logprobs = torch.ones_like(rows), torch.zeros(BATCHES[-1], device="cuda")
    slots.tables.zero_()
    split = Split(num_programs=396, num_kv_heads=8, max_items=264, min_share=1)  # Qwen3-0.6B's on an H200
    torch.cuda.synchronize()

    def begin(batch: int) -> object:
        return decode_inputs(ring, layout, cursor, slots.state, slots.tables, rows, clock, batch, 64, split)

    def end(batch: int) -> object:
        return advance(
            tokens[:batch], logprobs[:batch], rows[:batch], slots.state, slots.stops, cursor, clock, results, layout,
            decode=False,
        )  # fmt: skip

    for name, launch in (("decode_inputs", begin), ("advance", end)):
        times = [time_graph(lambda b=batch, f=launch: f(b)) for batch in BATCHES]
        print(name.ljust(32) + "".join(f"{seconds * 1e6:9.1f}" for seconds in times), flush=True)
    ring[:, 1], ring[:, layout.rows()] = 1, rows.cpu()
    ring[:, 0], ring[:, layout.append(1)] = 4, 60
    times = [time_graph(lambda b=batch: begin(b)) for batch in BATCHES]
    print("decode_inputs, rows and 4 blocks".ljust(32) + "".join(f"{seconds * 1e6:9.1f}" for seconds in times))


def print_tunings() -> None:
    """Microseconds of each launch configuration: tiles on rows with a temperature, chunks on filtered ones."""
    logits, temperature = make_logits(is_peaked=True), Slots(**KINDS["temperature"])
    cut = Slots(**KINDS["top_p 0.95"])
    for tile, warps in TILE_TUNINGS:
        tuning = Tuning(tile, warps)
        times = [time_graph(sampler(logits, temperature, batch, tuning)) for batch in BATCHES]
        print(
            f"tile {tile}, {warps} warps".ljust(32) + "".join(f"{seconds * 1e6:9.1f}" for seconds in times), flush=True
        )
    for chunk, warps in ROW_TUNINGS:
        tunings = [
            Tuning(default_tuning(batch).tile, default_tuning(batch).tile_warps, chunk, warps) for batch in BATCHES
        ]
        for slots, name in ((temperature, "free"), (cut, "top_p")):
            pairs = zip(BATCHES, tunings, strict=True)
            times = [time_graph(sampler(logits, slots, batch, tuning)) for batch, tuning in pairs]
            print(
                f"{name}, chunk {chunk}, {warps} warps".ljust(32)
                + "".join(f"{seconds * 1e6:9.1f}" for seconds in times), flush=True,
            )  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="other launch configurations too")
    tune = parser.parse_args().tune
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.sampler needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    print_times()
    print_step_kernels()
    if tune:
        print_tunings()


if __name__ == "__main__":
    main()
