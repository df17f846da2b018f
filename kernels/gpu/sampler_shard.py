"""The sampler over ranks: what a rank has of the vocabulary, and how what it finds in a tile reaches the others."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.peer_exchange import GATHER_WORDS, PeerMemory, mailboxes, read, tagged, wait

MIN_TILE = 1024  # logits
_FIELDS = tl.constexpr(5)  # of a tile that is sent: largest logit, sum, best score, its token, that token's logit
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary this rank has the logits of, and where the ranks tell each other what they find.

    On all ranks `sample` must be called with the same rows, in the same order.
    """

    vocab_size: int  # of all ranks
    span: int  # token ids of a rank, the first is rank * span; the last ranks may have fewer
    max_rows: int
    max_tiles: int  # of all ranks
    memory: PeerMemory  # of each row two entries of tiles, then one mailbox of its filters
    numbers: Tensor  # [2, max_rows] int32, on the device: samples of each row so far, exchanges of its filters
    max_programs: int  # of the second kernel, which the device runs at the same time

    @staticmethod
    def num_words(num_ranks: int, span: int, max_rows: int, min_tile: int = MIN_TILE) -> int:
        """That `memory` must have."""
        max_tiles = num_ranks * -(-span // min_tile)
        return max_rows * (2 * _FIELDS.value * max_tiles + num_ranks * GATHER_WORDS.value)

    @classmethod
    def make(cls, vocab_size: int, span: int, max_rows: int, memory: PeerMemory, min_tile: int = MIN_TILE) -> "Shard":
        """For up to max_rows rows and tiles of min_tile logits or more; `memory` is used for nothing else."""
        device = memory.addresses.device
        is_cuda = device.type == "cuda"
        return cls(
            vocab_size,
            span,
            max_rows,
            max_tiles=memory.num_ranks * -(-span // min_tile),
            memory=memory,
            numbers=torch.zeros((2, max_rows), dtype=torch.int32, device=device),
            max_programs=torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 2,
        )


@triton.jit
def send_tile(
    addresses, row, number, tile, max_tiles, largest, total, best, token, logit, TILE: tl.constexpr, SPAN: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """Tell all ranks what was found in a tile of a row; number: of the row's sample."""
    place = _tile_entry(row, number, max_tiles) + RANK * tl.cdiv(SPAN, TILE) + tile
    for step in tl.static_range(WORLD):
        words = mailboxes(addresses, (RANK + step) % WORLD) + place
        tl.store(words, tagged(largest.to(tl.int32, bitcast=True), number))
        tl.store(words + max_tiles, tagged(total.to(tl.int32, bitcast=True), number))
        tl.store(words + 2 * max_tiles, tagged(best.to(tl.int32, bitcast=True), number))
        tl.store(words + 3 * max_tiles, tagged(token, number))
        tl.store(words + 4 * max_tiles, tagged(logit.to(tl.int32, bitcast=True), number))


@triton.jit
def receive_tiles(
    addresses, row, number, vocab_size, num_tiles, max_tiles, TILES: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """Of the tiles of all ranks largest logits, sums, best scores, their tokens and those tokens' logits, [TILES] each,
    and how many there are."""
    index = tl.arange(0, TILES)
    first_token = index // tl.cdiv(SPAN, TILE) * SPAN + index % tl.cdiv(SPAN, TILE) * TILE
    is_tile = (index < num_tiles) & (first_token < vocab_size)
    place = mailboxes(addresses, RANK) + _tile_entry(row, number, max_tiles) + index
    field = tl.arange(0, triton.next_power_of_2(_FIELDS))
    words = (field * max_tiles)[:, None] + place[None, :]
    wait(words, (field < _FIELDS)[:, None] & is_tile[None, :], number)
    largest = read(place, is_tile, 0).to(tl.float32, bitcast=True)
    totals = read(place + max_tiles, is_tile, 0).to(tl.float32, bitcast=True)
    scores = read(place + 2 * max_tiles, is_tile, 0).to(tl.float32, bitcast=True)
    tokens = read(place + 3 * max_tiles, is_tile, _NO_TOKEN)
    logits = read(place + 4 * max_tiles, is_tile, 0).to(tl.float32, bitcast=True)
    lowest = -float("inf")
    return (
        tl.where(is_tile, largest, lowest),
        totals,
        tl.where(is_tile, scores, lowest),
        tokens,
        logits,
        tl.sum(is_tile.to(tl.int32), 0),
    )


@triton.jit
def _tile_entry(row, number, max_tiles):
    """Where a row's tiles stand among a rank's words: [_FIELDS, max_tiles]."""
    return (row * 2 + (number & 1)) * (_FIELDS * max_tiles)


@triton.jit
def filter_mailbox(row, max_rows, max_tiles, WORLD: tl.constexpr):
    """Where the mailbox of a row's filters begins among a rank's words."""
    return max_rows * (2 * _FIELDS * max_tiles) + row * (WORLD * GATHER_WORDS)
