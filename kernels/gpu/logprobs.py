"""Log-probabilities of given tokens and of the likeliest ones: what `kernels.reference.log_probabilities` defines.

The first kernel reads the logits once, a program a tile of a row, and keeps the tile's best token. The second has a
program a row: it combines the tiles, then takes the best token of all again and again, and looks for the next one only
in the tile that it came from.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.gumbel import LOG2_E, fast_exp2, ordered_key

MAX_WIDTH = 21  # the given token and 20 of the likeliest
ENTRY_SIZE = 2 * MAX_WIDTH + 1  # int32 of a row's results: token ids, bits of float32 log-probabilities, the rank
_TILE = 1024
_LEAST = tl.constexpr(-(2**63))


@dataclasses.dataclass(frozen=True)
class LogprobWorkspace:
    """Scratch of `log_probabilities`, its contents free between calls."""

    tiles: Tensor  # [2, max_rows, num_tiles] float32: largest logit, sum of exp(logit - largest)
    above: Tensor  # [max_rows, num_tiles] int32: logits above the given token's
    keys: Tensor  # [max_rows, num_tiles] int64: of the best token

    @classmethod
    def empty(cls, max_rows: int, vocab_size: int, device: torch.device) -> "LogprobWorkspace":
        """For up to max_rows rows."""
        size = (max_rows, triton.cdiv(vocab_size, _TILE))
        return cls(
            tiles=torch.empty((2, *size), dtype=torch.float32, device=device),
            above=torch.empty(size, dtype=torch.int32, device=device),
            keys=torch.empty(size, dtype=torch.int64, device=device),
        )


@dataclasses.dataclass(frozen=True)
class LogprobEntries:
    """What `log_probabilities` wrote, on the host."""

    token_ids: NDArray[np.int32]  # [num_rows, MAX_WIDTH]
    logprobs: NDArray[np.float32]  # [num_rows, MAX_WIDTH]
    ranks: NDArray[np.int32]  # [num_rows]

    @classmethod
    def of(cls, entries: NDArray[np.int32]) -> "LogprobEntries":
        """Views; entries: [num_rows, ENTRY_SIZE]."""
        logprobs = entries[:, MAX_WIDTH : 2 * MAX_WIDTH].view(np.float32)
        return cls(entries[:, :MAX_WIDTH], logprobs, entries[:, 2 * MAX_WIDTH])


def log_probabilities(
    logits: Tensor, token_ids: Tensor, rows: Tensor, entries: Tensor, workspace: LogprobWorkspace
) -> None:
    """Of `token_ids` and of the likeliest tokens, the lowest id first among equals.

    logits: [n, vocab_size] bfloat16 or float32, rows contiguous. token_ids: [n] int32, below 0 = nothing is written for
    the row. rows: [2, m] int32: rows of logits, and how many tokens are wanted of each, the given one included.
    entries: [m, ENTRY_SIZE] int32, contiguous, of which as many tokens and log-probabilities as are wanted are written,
    and the rank: how many tokens are likelier than the given one, plus 1.
    """
    num_rows, vocab_size = rows.shape[1], logits.shape[1]
    tiles, num_tiles = workspace.tiles, triton.cdiv(vocab_size, _TILE)
    arguments = (
        logits, logits.stride(0), vocab_size, token_ids, rows, rows.stride(0), tiles, tiles.stride(0), tiles.stride(1),
        workspace.above, workspace.keys,
    )  # fmt: skip
    _logprob_tile_kernel[(num_tiles, num_rows)](*arguments, TILE=_TILE, num_warps=4)
    _logprob_row_kernel[(num_rows,)](
        *arguments, entries, num_tiles, TILE=_TILE, TILES=triton.next_power_of_2(num_tiles), WIDTH=MAX_WIDTH,
        num_warps=4,
    )  # fmt: skip


# Columns of rows are as long as there are rows, and slices of a prompt begin anywhere: one variant for all.
@triton.jit(do_not_specialize=["rows_stride"], do_not_specialize_on_alignment=["token_ids", "rows"])
def _logprob_tile_kernel(
    logits, logits_stride, vocab_size, token_ids, rows, rows_stride, tiles, tiles_stride, tile_rows_stride, above, keys,
    TILE: tl.constexpr,
):  # fmt: skip
    tile, index = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index).to(tl.int64)
    token = tl.load(token_ids + row)
    if token >= 0:
        values = logits + row * logits_stride
        own = tl.load(values + token).to(tl.float32)
        tile_values, tile_keys = _read_tile(values, vocab_size, tile, TILE)
        largest = tl.max(tile_values, 0)
        place = index * tile_rows_stride + tile
        tl.store(tiles + place, largest)
        tl.store(tiles + tiles_stride + place, tl.sum(fast_exp2((tile_values - largest) * LOG2_E), 0))
        tl.store(above + place, tl.sum((tile_values > own).to(tl.int32), 0))
        tl.store(keys + place, tl.max(tile_keys, 0))


@triton.jit(do_not_specialize=["rows_stride"], do_not_specialize_on_alignment=["token_ids", "rows", "entries"])
def _logprob_row_kernel(
    logits, logits_stride, vocab_size, token_ids, rows, rows_stride, tiles, tiles_stride, tile_rows_stride, above, keys,
    entries, num_tiles, TILE: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = tl.load(rows + index).to(tl.int64)
    token = tl.load(token_ids + row)
    if token >= 0:
        values = logits + row * logits_stride
        tile = tl.arange(0, TILES)
        is_tile = tile < num_tiles
        place = index * tile_rows_stride + tile
        tile_largest = tl.load(tiles + place, mask=is_tile, other=-float("inf"))
        totals = tl.load(tiles + tiles_stride + place, mask=is_tile, other=0.0)
        largest = tl.max(tile_largest, 0)
        log_total = tl.log(tl.sum(totals * fast_exp2((tile_largest - largest) * LOG2_E), 0))
        own = tl.load(values + token).to(tl.float32)
        entry = entries + index * (2 * WIDTH + 1)
        tl.store(entry, token)
        tl.store(entry + WIDTH, (own - largest - log_total).to(tl.int32, bitcast=True))
        tl.store(entry + 2 * WIDTH, tl.sum(tl.load(above + place, mask=is_tile, other=0), 0) + 1)

        best_keys = tl.load(keys + place, mask=is_tile, other=_LEAST)
        for column in range(1, tl.load(rows + rows_stride + index)):
            best = tl.max(best_keys, 0)
            likeliest = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
            logit = tl.load(values + likeliest).to(tl.float32)
            tl.store(entry + column, likeliest)
            tl.store(entry + WIDTH + column, (logit - largest - log_total).to(tl.int32, bitcast=True))
            _, tile_keys = _read_tile(values, vocab_size, likeliest // TILE, TILE)
            next_best = tl.max(tl.where(tile_keys < best, tile_keys, _LEAST), 0)
            best_keys = tl.where(tile == likeliest // TILE, next_best, best_keys)


@triton.jit
def _read_tile(values, vocab_size, tile, TILE: tl.constexpr):
    """Logits of a tile as float32, and keys that order tokens: the larger logit first, then the lower id; int64."""
    token_ids = tile * TILE + tl.arange(0, TILE)
    is_token = token_ids < vocab_size
    logits = tl.load(values + token_ids, mask=is_token, other=-float("inf")).to(tl.float32)
    keys = (ordered_key(logits, 32).to(tl.int64) << 32) | (0x7FFFFFFF - token_ids).to(tl.int64)
    return logits, tl.where(is_token, keys, _LEAST)
