"""The schedule of decode attention: every tile in one program, parts as even as can be."""

import dataclasses
import random

import pytest
import torch

from kernels.gpu import decode_split
from kernels.gpu.decode_split import Split, make_schedule
from tests.kernels.gpu.paged import poisoned_outputs

BLOCK_SIZE, TILE = 256, 64


@dataclasses.dataclass
class Segment:
    """What a program does of one (row, kv head), as `paged_decode_attention` reads it."""

    program: int
    head: tuple[int, int]
    first_tile: int
    end_tile: int
    partners: range  # the programs that share the (row, kv head)

    @property
    def size(self) -> int:
        return self.end_tile - self.first_tile


def segments_of(device: torch.device, lengths: list[int], split: Split) -> list[Segment]:
    """Of all programs, in order."""
    max_blocks = max(1, -(-max(lengths) // BLOCK_SIZE))
    slots = torch.randperm(len(lengths) + 1, generator=torch.Generator().manual_seed(0))[: len(lengths)].int()
    slots[torch.tensor(lengths) == 0] = -1
    tables = torch.arange((len(lengths) + 1) * max_blocks, dtype=torch.int32).view(-1, max_blocks) * 7
    lens = torch.tensor(lengths, dtype=torch.int32)
    with poisoned_outputs():
        schedule = make_schedule(lens.to(device), slots.to(device), tables.to(device), BLOCK_SIZE, split).cpu()
    counts = [-(-length // TILE) for length in lengths]
    segments, cleared = [], set()
    for program in range(split.num_programs):

        def field(name: str, program: int = program) -> int:
            return int(schedule[getattr(decode_split, name).value, program])

        mine = range(split.num_programs - 1 - program, len(lengths), split.num_programs)
        empty = {row for row in mine if lengths[row] == 0}
        assert bool(field("HAS_EMPTY")) == bool(empty)
        cleared |= empty
        row, kv_head, tile, remaining = field("ROW"), field("KV_HEAD"), field("FIRST_TILE"), field("NUM_TILES")
        if remaining:
            assert (field("LENGTH"), field("SLOT")) == (lengths[row], int(slots[row]))
            assert field("BLOCK_ID") == int(tables[slots[row], tile * TILE // BLOCK_SIZE])
        while remaining:
            end = min(tile + remaining, counts[row])
            first = program if tile == 0 else field("FIRST_PROGRAM")
            last = program if end == counts[row] else field("LAST_PROGRAM")
            segments.append(Segment(program, (row, kv_head), tile, end, range(first, last + 1)))
            remaining -= end - tile
            tile, kv_head = 0, kv_head + 1
            if kv_head == split.num_kv_heads and remaining:
                kv_head, row = 0, next(later for later in range(row + 1, len(lengths)) if counts[later])
    assert cleared == {row for row, length in enumerate(lengths) if length == 0}
    return segments


def check(segments: list[Segment], lengths: list[int], num_kv_heads: int) -> None:
    """Every tile has its turn, in order, and the programs of a (row, kv head) know each other."""
    tiles = [(segment.head, tile) for segment in segments for tile in range(segment.first_tile, segment.end_tile)]
    counts = [-(-length // TILE) for length in lengths]
    heads = [(row, kv_head) for row in range(len(lengths)) for kv_head in range(num_kv_heads)]
    assert tiles == [(head, tile) for head in heads for tile in range(counts[head[0]])]
    for segment in segments:
        assert [other.program for other in segments if other.head == segment.head] == list(segment.partners)


def fewest_tiles(counts: list[int], split: Split) -> int:
    """Of the largest part."""
    return next(
        part
        for part in range(split.min_share, 10**6)
        if split.num_kv_heads * sum(-(-count // part) for count in counts) <= split.max_items
    )


BATCHES = [[800], [800] * 3, [0, 0], [1], [0, 64, 0, 65, 1, 0], [8192], [100, 5000, 0, 700], [0] * 5 + [300] + [0] * 9]


@pytest.mark.parametrize("min_share", [1, 3])
@pytest.mark.parametrize("max_items", [32, 40])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_few_rows_are_cut_into_even_parts(device, lengths, max_items, min_share):
    split = Split(num_programs=40, num_kv_heads=4, max_items=max_items, min_share=min_share)
    segments = segments_of(device, lengths, split)
    check(segments, lengths, 4)
    counts = [-(-length // TILE) for length in lengths]
    part = fewest_tiles(counts, split)
    for row, count in enumerate(counts):
        sizes = [segment.size for segment in segments if segment.head[0] == row]
        assert len(sizes) == 4 * -(-count // part)
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert [segment.program for segment in segments] == list(range(len(segments)))


@pytest.mark.parametrize("num_programs", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_many_rows_are_cut_into_equal_shares(device, lengths, num_programs):
    segments = segments_of(device, lengths, Split(num_programs, num_kv_heads=3, max_items=0, min_share=1))
    check(segments, lengths, 3)
    shares = [sum(segment.size for segment in segments if segment.program == p) for p in range(num_programs)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(device, seed):
    rng = random.Random(seed)
    lengths = [rng.choice((0, rng.randint(1, 90), rng.randint(1, 3000))) for _ in range(rng.randint(1, 40))]
    num_kv_heads, num_programs = rng.randint(1, 8), rng.randint(1, 60)
    split = Split(num_programs, num_kv_heads, max_items=rng.randint(0, 80), min_share=rng.randint(1, 4))
    check(segments_of(device, lengths, split), lengths, num_kv_heads)
