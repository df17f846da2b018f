"""Choosing tokens on the device: what `kernels.reference.sample` defines, without a sort.

The first kernel reads the logits once, a program a tile of a row. The second has a program a row: it combines the
tiles, and where top_k, top_p or min_p cut it finds the least logit kept by bisection (`kernels.gpu.sampling_filters`).
Ties are those of the logits: two that only scaling makes equal keep their order. Same inputs, same bits; another
number of rows may choose other tiles and so round scores and log-probabilities differently.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.gumbel import LOG2_E, fast_exp2, gumbel_noise_log2, noise_state
from kernels.gpu.sampling_filters import choose_filtered
from kernels.gpu.slot_state import MIN_P, TEMPERATURE, TOP_K, TOP_P
from kernels.gpu.step_rings import FAILED

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)
_KEY_BITS = {torch.bfloat16: 16, torch.float32: 32}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that change speed and rounding, nothing else."""

    tile: int  # logits of a program of the first kernel
    tile_warps: int
    chunk: int = 4096  # logits that the second kernel reads at a time from a filtered row
    row_warps: int = 16


def default_tuning(num_rows: int) -> Tuning:
    """Enough programs to fill a GPU at one row, few enough to keep reductions rare at many."""
    if num_rows <= 8:
        return Tuning(tile=1024, tile_warps=4)
    return Tuning(tile=2048, tile_warps=4) if num_rows <= 32 else Tuning(tile=4096, tile_warps=8)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Scratch of `sample`, its contents free between calls."""

    tiles: Tensor  # [3, max_rows, max_tiles] float32: largest logit, sum of exp(logit - largest), best score
    tile_tokens: Tensor  # [max_rows, max_tiles] int32, of the best score
    candidates: Tensor  # [max_rows, num_candidates], of the logits' dtype
    candidate_ids: Tensor  # [max_rows, num_candidates] int32

    @classmethod
    def empty(
        cls, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device,
        min_tile: int = 1024, num_candidates: int = 4096,
    ) -> "Workspace":  # fmt: skip
        """For up to max_rows rows and tiles of min_tile logits or more.

        A filtered row is read again and again until at most num_candidates of its logits can win, then never more.
        """
        num_tiles = triton.cdiv(vocab_size, min_tile)
        return cls(
            tiles=torch.empty((3, max_rows, num_tiles), dtype=torch.float32, device=device),
            tile_tokens=torch.empty((max_rows, num_tiles), dtype=torch.int32, device=device),
            candidates=torch.empty((max_rows, num_candidates), dtype=dtype, device=device),
            candidate_ids=torch.empty((max_rows, num_candidates), dtype=torch.int32, device=device),
        )


def sample(
    logits: Tensor, row_slots: Tensor, state: Tensor, positions: Tensor, workspace: Workspace,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose one token a row, independently of the other rows.

    logits: [n, vocab_size] bfloat16 or float32, rows contiguous. row_slots: [n] int32, -1 = choose none. state: see
    `kernels.gpu.slot_state`. positions: [n] int32, tokens before the one to choose.
    Returns token ids [n] int32 (-1 for none, FAILED where a logit is not finite) and the chosen tokens'
    log-probabilities by the logits as they are, before temperature and filters, [n] float32 (0 without a token).
    """
    num_rows, vocab_size = logits.shape
    tuning = tuning or default_tuning(num_rows)
    num_tiles = triton.cdiv(vocab_size, tuning.tile)
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    tiles, tile_tokens = workspace.tiles, workspace.tile_tokens
    assert num_tiles <= tiles.shape[2], "the workspace was made for larger tiles"
    _tile_kernel[(num_tiles, num_rows)](
        logits, logits.stride(0), vocab_size, row_slots, state, state.stride(0), positions, tiles, tile_tokens,
        tiles.stride(0), tiles.stride(1), LOWEST=torch.finfo(logits.dtype).min, TILE=tuning.tile,
        num_warps=tuning.tile_warps,
    )  # fmt: skip
    _row_kernel[(num_rows,)](
        logits, logits.stride(0), vocab_size, row_slots, state, state.stride(0), positions, tiles, tile_tokens,
        tiles.stride(0), tiles.stride(1), num_tiles, workspace.candidates, workspace.candidate_ids, token_ids,
        logprobs, TILES=triton.next_power_of_2(num_tiles), KEY_BITS=_KEY_BITS[logits.dtype],
        CAPACITY=workspace.candidates.shape[1], CHUNK=tuning.chunk, num_warps=tuning.row_warps,
    )  # fmt: skip
    return token_ids, logprobs


@triton.jit
def _params(state, state_stride, slot, vocab_size):
    """Temperature, its inverse in units of log 2, top_k (at least vocab_size where it is off), top_p and min_p."""
    temperature = tl.load(state + TEMPERATURE * state_stride + slot).to(tl.float32, bitcast=True)
    top_k = tl.load(state + TOP_K * state_stride + slot)
    top_k = tl.where(top_k <= 0, vocab_size, top_k)
    top_p = tl.load(state + TOP_P * state_stride + slot).to(tl.float32, bitcast=True)
    min_p = tl.load(state + MIN_P * state_stride + slot).to(tl.float32, bitcast=True)
    inverse = LOG2_E / tl.maximum(temperature, 1e-30)  # finite, so that its product with 0 is 0
    return temperature, inverse, top_k, top_p, min_p


@triton.jit
def _tile_kernel(
    logits, logits_stride, vocab_size, row_slots, state, state_stride, positions, tiles, tile_tokens, tiles_stride,
    rows_stride, LOWEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        token_ids = tile * TILE + tl.arange(0, TILE)
        values = tl.load(logits + row * logits_stride + token_ids, mask=token_ids < vocab_size, other=LOWEST)
        values = values.to(tl.float32)
        temperature, inverse, top_k, top_p, min_p = _params(state, state_stride, slot, vocab_size)
        largest = tl.max(values, 0)
        relative = values - largest
        # The product is 0, or NaN where the logit is not finite: then so is the sum.
        total = tl.sum(fast_exp2(relative * LOG2_E) + values * 0.0, 0)
        is_filtered = (top_k < vocab_size) | (top_p < 1) | (min_p > 0)
        if (temperature > 0) & (is_filtered == 0):
            hashed = noise_state(state, state_stride, slot, tl.load(positions + row))
            scores = relative * inverse + gumbel_noise_log2(hashed, token_ids)
            best = tl.max(scores, 0)
            token = tl.min(tl.where(scores == best, token_ids, _NO_TOKEN), 0)
        else:
            best = 0.0
            token = tl.min(tl.where(values == largest, token_ids, _NO_TOKEN), 0)
        place = tiles + row * rows_stride + tile
        tl.store(place, largest)
        tl.store(place + tiles_stride, total)
        tl.store(place + 2 * tiles_stride, best)
        tl.store(tile_tokens + row * rows_stride + tile, token)


@triton.jit
def _row_kernel(
    logits, logits_stride, vocab_size, row_slots, state, state_stride, positions, tiles, tile_tokens, tiles_stride,
    rows_stride, num_tiles, candidates, candidate_ids, token_ids, logprobs, TILES: tl.constexpr,
    KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row)
    token = -1
    logprob = 0.0
    if slot >= 0:
        index = tl.arange(0, TILES)
        place = tiles + row * rows_stride + index
        tile_largest = tl.load(place, mask=index < num_tiles, other=-float("inf"))
        tile_totals = tl.load(place + tiles_stride, mask=index < num_tiles, other=0.0)
        tile_scores = tl.load(place + 2 * tiles_stride, mask=index < num_tiles, other=-float("inf"))
        tokens = tl.load(tile_tokens + row * rows_stride + index, mask=index < num_tiles, other=_NO_TOKEN)
        temperature, inverse, top_k, top_p, min_p = _params(state, state_stride, slot, vocab_size)
        largest = tl.max(tile_largest, 0)
        total = tl.sum(tile_totals * fast_exp2((tile_largest - largest) * LOG2_E), 0)
        if total != total:
            token = FAILED
        else:
            is_filtered = (top_k < vocab_size) | (top_p < 1) | (min_p > 0)
            if (temperature > 0) & is_filtered:
                hashed = noise_state(state, state_stride, slot, tl.load(positions + row))
                token = choose_filtered(
                    logits + row * logits_stride, vocab_size, candidates + row * CAPACITY,
                    candidate_ids + row * CAPACITY, tile_largest, num_tiles, largest, inverse, top_k, top_p, min_p,
                    hashed, KEY_BITS, CAPACITY, CHUNK,
                )  # fmt: skip
            else:
                scale = tl.where(temperature > 0, inverse, 1.0)
                scores = (tile_largest - largest) * scale + tile_scores
                token = tl.min(tl.where(scores == tl.max(scores, 0), tokens, _NO_TOKEN), 0)
            chosen = tl.load(logits + row * logits_stride + token).to(tl.float32)
            logprob = chosen - largest - tl.log(total)
    tl.store(token_ids + row, token)
    tl.store(logprobs + row, logprob)
