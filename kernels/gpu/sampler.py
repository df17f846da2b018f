"""Choosing tokens on the device: what `kernels.reference.sample` defines, without a sort.

The first kernel reads the logits once, a program a tile of a row. The second has a program a row: it combines the
tiles, and where top_k, top_p or min_p cut it finds the least logit kept by bisection (`kernels.gpu.sampling_filters`).
Ties are those of the logits: two that only scaling makes equal keep their order. Same inputs, same bits; another
number of rows may choose other tiles and so round scores and log-probabilities differently.

Where each rank of a group has the logits of a part of the vocabulary, the first kernel sends what it finds in a tile
to all ranks, and the second one combines the tiles of all. A filtered row is bisected by all ranks together. So every
rank chooses the same token, and scores are the very bits of one device with the same logits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.gumbel import LOG2_E, fast_exp2, gumbel_noise_log2, noise_state
from kernels.gpu.sampler_shard import MIN_TILE, Shard, filter_mailbox, receive_tiles, send_tile
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
    shard: Shard | None = None  # None: the logits are of all tokens

    @classmethod
    def empty(
        cls, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device,
        min_tile: int = MIN_TILE, num_candidates: int = 4096, shard: Shard | None = None,
    ) -> "Workspace":  # fmt: skip
        """For up to max_rows rows and tiles of min_tile logits or more; vocab_size: of all ranks.

        A filtered row is read again and again until at most num_candidates of its logits can win, then never more.
        """
        num_tiles = 0 if shard else triton.cdiv(vocab_size, min_tile)
        return cls(
            tiles=torch.empty((3, max_rows, num_tiles), dtype=torch.float32, device=device),
            tile_tokens=torch.empty((max_rows, num_tiles), dtype=torch.int32, device=device),
            candidates=torch.empty((max_rows, num_candidates), dtype=dtype, device=device),
            candidate_ids=torch.empty((max_rows, num_candidates), dtype=torch.int32, device=device),
            shard=shard,
        )


def sample(
    logits: Tensor, row_slots: Tensor, state: Tensor, positions: Tensor, workspace: Workspace,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose one token a row, independently of the other rows.

    logits: [n, vocab_size] bfloat16 or float32, rows contiguous; of a shard [n, up to its span], n up to its max_rows.
    row_slots: [n] int32, -1 = choose none. state: see `kernels.gpu.slot_state`. positions: [n] int32, tokens before
    the one to choose.
    Returns token ids [n] int32 (-1 for none, FAILED where a logit is not finite) and the chosen tokens'
    log-probabilities by the logits as they are, before temperature and filters, [n] float32 (0 without a token).
    """
    tuning = tuning or default_tuning(len(logits))
    run_tiles(logits, row_slots, state, positions, workspace, tuning)
    return run_rows(logits, row_slots, state, positions, workspace, tuning)


def run_tiles(
    logits: Tensor, row_slots: Tensor, state: Tensor, positions: Tensor, workspace: Workspace, tuning: Tuning
) -> None:
    """The first half of `sample`, which waits for no other rank."""
    num_rows, num_logits = logits.shape
    tiles, place = workspace.tiles, _place(workspace, num_logits, tuning.tile)
    _tile_kernel[(triton.cdiv(num_logits, tuning.tile), num_rows)](
        logits, logits.stride(0), num_logits, place.vocab_size, row_slots, state, state.stride(0), positions, tiles,
        workspace.tile_tokens, tiles.stride(0), tiles.stride(1), place.addresses, place.numbers, place.max_tiles,
        LOWEST=torch.finfo(logits.dtype).min, TILE=tuning.tile, SPAN=place.span, RANK=place.rank, WORLD=place.num_ranks,
        num_warps=tuning.tile_warps,
    )  # fmt: skip


def run_rows(
    logits: Tensor, row_slots: Tensor, state: Tensor, positions: Tensor, workspace: Workspace, tuning: Tuning
) -> tuple[Tensor, Tensor]:
    """The second half of `sample`, which waits for the other ranks."""
    num_rows, num_logits = logits.shape
    tiles, place = workspace.tiles, _place(workspace, num_logits, tuning.tile)
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _row_kernel[(min(num_rows, place.max_programs),)](
        logits, logits.stride(0), num_logits, place.vocab_size, num_rows, row_slots, state, state.stride(0), positions,
        tiles, workspace.tile_tokens, tiles.stride(0), tiles.stride(1), place.num_tiles, workspace.candidates,
        workspace.candidate_ids, token_ids, logprobs, place.addresses, place.numbers, place.max_rows, place.max_tiles,
        TILES=triton.next_power_of_2(place.num_tiles), KEY_BITS=_KEY_BITS[logits.dtype],
        CAPACITY=workspace.candidates.shape[1], CHUNK=tuning.chunk, TILE=tuning.tile, SPAN=place.span, RANK=place.rank,
        WORLD=place.num_ranks, num_warps=tuning.row_warps,
    )  # fmt: skip
    return token_ids, logprobs


@dataclasses.dataclass(frozen=True)
class _Place:
    """What the kernels take of a shard."""

    rank: int
    num_ranks: int
    vocab_size: int
    span: int
    num_tiles: int  # as many of each rank, of which some may be empty
    max_programs: int
    max_rows: int = 0
    max_tiles: int = 0
    addresses: Tensor | None = None
    numbers: Tensor | None = None


def _place(workspace: Workspace, num_logits: int, tile: int) -> _Place:
    shard = workspace.shard
    if shard is None:
        num_tiles = triton.cdiv(num_logits, tile)
        assert num_tiles <= workspace.tiles.shape[2], "the workspace was made for larger tiles"
        return _Place(0, 1, num_logits, 0, num_tiles, max_programs=2**30)
    rank, num_ranks = shard.memory.rank, shard.memory.num_ranks
    assert num_logits == max(0, min(shard.span, shard.vocab_size - rank * shard.span))
    num_tiles = num_ranks * triton.cdiv(shard.span, tile)
    assert num_tiles <= shard.max_tiles, "the shard was made for larger tiles"
    return _Place(
        rank, num_ranks, shard.vocab_size, shard.span, num_tiles, shard.max_programs, shard.max_rows, shard.max_tiles,
        shard.memory.addresses, shard.numbers,
    )  # fmt: skip


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
    logits, logits_stride, num_logits, vocab_size, row_slots, state, state_stride, positions, tiles, tile_tokens,
    tiles_stride, rows_stride, addresses, numbers, max_tiles, LOWEST: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        offsets = tile * TILE + tl.arange(0, TILE)
        token_ids = RANK * SPAN + offsets
        values = tl.load(logits + row * logits_stride + offsets, mask=offsets < num_logits, other=LOWEST)
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
        if WORLD == 1:
            place = tiles + row * rows_stride + tile
            tl.store(place, largest)
            tl.store(place + tiles_stride, total)
            tl.store(place + 2 * tiles_stride, best)
            tl.store(tile_tokens + row * rows_stride + tile, token)
        else:
            chosen = tl.max(tl.where(token_ids == token, values, -float("inf")), 0)
            send_tile(
                addresses, row, tl.load(numbers + row) + 1, tile, max_tiles, largest, total, best.to(tl.float32), token,
                chosen, TILE, SPAN, RANK, WORLD,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _row_kernel(
    logits, logits_stride, num_logits, vocab_size, num_rows, row_slots, state, state_stride, positions, tiles,
    tile_tokens, tiles_stride, rows_stride, num_tiles, candidates, candidate_ids, token_ids, logprobs, addresses,
    numbers, max_rows, max_tiles, TILES: tl.constexpr, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    if WORLD == 1:
        _sample_row(
            tl.program_id(0).to(tl.int64), logits, logits_stride, num_logits, vocab_size, row_slots, state,
            state_stride, positions, tiles, tile_tokens, tiles_stride, rows_stride, num_tiles, candidates,
            candidate_ids, token_ids, logprobs, addresses, numbers, max_rows, max_tiles, TILES, KEY_BITS, CAPACITY,
            CHUNK, TILE, SPAN, RANK, WORLD,
        )  # fmt: skip
    else:
        # All programs run at the same time, and those of one number take the same rows in the same order on all ranks:
        # so none waits for a program that waits for it.
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            _sample_row(
                tl.full((), 0, tl.int64) + row, logits, logits_stride, num_logits, vocab_size, row_slots, state,
                state_stride, positions, tiles, tile_tokens, tiles_stride, rows_stride, num_tiles, candidates,
                candidate_ids, token_ids, logprobs, addresses, numbers, max_rows, max_tiles, TILES, KEY_BITS, CAPACITY,
                CHUNK, TILE, SPAN, RANK, WORLD,
            )  # fmt: skip


@triton.jit
def _sample_row(
    row, logits, logits_stride, num_logits, vocab_size, row_slots, state, state_stride, positions, tiles, tile_tokens,
    tiles_stride, rows_stride, num_tiles, candidates, candidate_ids, token_ids, logprobs, addresses, numbers, max_rows,
    max_tiles, TILES: tl.constexpr, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    slot = tl.load(row_slots + row)
    token = -1
    logprob = 0.0
    if slot >= 0:
        index = tl.arange(0, TILES)
        if WORLD == 1:
            place = tiles + row * rows_stride + index
            tile_largest = tl.load(place, mask=index < num_tiles, other=-float("inf"))
            tile_totals = tl.load(place + tiles_stride, mask=index < num_tiles, other=0.0)
            tile_scores = tl.load(place + 2 * tiles_stride, mask=index < num_tiles, other=-float("inf"))
            tokens = tl.load(tile_tokens + row * rows_stride + index, mask=index < num_tiles, other=_NO_TOKEN)
        else:
            number = tl.load(numbers + row) + 1
            tile_largest, tile_totals, tile_scores, tokens, tile_logits, num_tiles = receive_tiles(
                addresses, row, number, vocab_size, num_tiles, max_tiles, TILES, TILE, SPAN, RANK, WORLD
            )
            tl.store(numbers + row, number)
        temperature, inverse, top_k, top_p, min_p = _params(state, state_stride, slot, vocab_size)
        largest = tl.max(tile_largest, 0)
        total = tl.sum(tile_totals * fast_exp2((tile_largest - largest) * LOG2_E), 0)
        if total != total:
            token = FAILED
        else:
            is_filtered = (top_k < vocab_size) | (top_p < 1) | (min_p > 0)
            chosen = 0.0
            if (temperature > 0) & is_filtered:
                hashed = noise_state(state, state_stride, slot, tl.load(positions + row))
                if WORLD == 1:
                    mailbox = row
                    exchanges = tl.full((), 0, tl.int32)
                else:
                    mailbox = filter_mailbox(row, max_rows, max_tiles, WORLD)
                    exchanges = tl.load(numbers + max_rows + row)
                token, chosen, exchanges = choose_filtered(
                    logits + row * logits_stride, num_logits, vocab_size, candidates + row * CAPACITY,
                    candidate_ids + row * CAPACITY, tile_largest, num_tiles, largest, inverse, top_k, top_p, min_p,
                    hashed, addresses, mailbox, exchanges, KEY_BITS, CAPACITY, CHUNK, RANK * SPAN, RANK, WORLD,
                )  # fmt: skip
                if WORLD > 1:
                    tl.store(numbers + max_rows + row, exchanges)
            else:
                scale = tl.where(temperature > 0, inverse, 1.0)
                scores = (tile_largest - largest) * scale + tile_scores
                is_best = scores == tl.max(scores, 0)
                token = tl.min(tl.where(is_best, tokens, _NO_TOKEN), 0)
                if WORLD > 1:
                    chosen = tl.max(tl.where(is_best & (tokens == token), tile_logits, -float("inf")), 0)
            if WORLD == 1:
                chosen = tl.load(logits + row * logits_stride + token).to(tl.float32)
            logprob = chosen - largest - tl.log(total)
    tl.store(token_ids + row, token)
    tl.store(logprobs + row, logprob)
