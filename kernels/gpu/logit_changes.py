"""Changing rows of logits in place before they are sampled from: what `kernels.reference.process_logits` defines.

Each step computes with float32 and rounds to it, as the definition does, and the result is stored in the logits' own
dtype: what becomes of a bfloat16 logit is a bfloat16 again. A token that is out of the question gets BANNED instead of
minus infinity, so that the sampler's check of whether a row is finite holds; for the same reason nothing overflows. A
logit that is not finite stays what it is, banned or not, so that its row fails.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.step_rings import NONE_LEFT

BANNED = tl.constexpr(-1e30)
IN_PROMPT = tl.constexpr(1 << 30)  # is part of a token's count where the token stands in the prompt
_LEAST_LEFT = tl.constexpr(-9e29)  # the largest logit of a row, unless every token is BANNED
_LARGEST = tl.constexpr(3.38e38)  # finite as bfloat16 too
_TILE = 2048

# Where each field stands in a record, in int64.
_ROW = tl.constexpr(0)
_COUNTS = tl.constexpr(1)
_MASK = tl.constexpr(2)
_EARLY_MASK = tl.constexpr(3)
_STEP_MASK = tl.constexpr(4)
_MIN_TOTAL = tl.constexpr(5)
_BIASES = tl.constexpr(6)
_NUM_BIASES = tl.constexpr(7)
_REPETITION_PENALTY = tl.constexpr(8)
_FREQUENCY_PENALTY = tl.constexpr(9)
_PRESENCE_PENALTY = tl.constexpr(10)
RECORD_SIZE = tl.constexpr(11)

# What is done to one row; every field takes 8 bytes.
RECORD = np.dtype([
    ("row", "<i8"),
    # Addresses on the device, 0 where there is nothing.
    ("counts", "<i8"),  # [vocab_size] int32: how often each token was generated, see make_counts
    ("mask", "<i8"),  # [ceil(vocab_size / 32)] int32: bit i % 32 of word i / 32 says that token i is allowed
    ("early_mask", "<i8"),  # takes the place of `mask` while the sequence holds fewer than min_total tokens
    ("step_mask", "<i8"),  # holds as well
    ("min_total", "<i8"),
    ("biases", "<i8"),  # [2, num_biases] int32: token ids, ascending, then the bits of what is added, float32
    ("num_biases", "<i8"),
    # float32 in value.
    ("repetition_penalty", "<f8"), ("frequency_penalty", "<f8"), ("presence_penalty", "<f8"),
])  # fmt: skip


def make_counts(token_ids: Tensor, num_prompt_tokens: int, vocab_size: int) -> Tensor:
    """Counts of the tokens that a sequence holds: [vocab_size] int32; token_ids: [num_tokens] int64, prompt first."""
    counts = torch.zeros(vocab_size, dtype=torch.int32, device=token_ids.device)
    counts.index_fill_(0, token_ids[:num_prompt_tokens], IN_PROMPT.value)
    generated = token_ids[num_prompt_tokens:]
    return counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))


def change_logits(logits: Tensor, row_slots: Tensor, context_lens: Tensor, records: Tensor) -> None:
    """Change the rows that `records` name.

    logits: [n, vocab_size] bfloat16 or float32, rows contiguous. row_slots: [n] int32, -1 = the row stays as it is.
    context_lens: [n] int32, tokens that each row's sequence holds. records: [num_changed, RECORD_SIZE] int64, RECORDs
    of distinct rows.
    """
    vocab_size = logits.shape[1]
    _change_kernel[(triton.cdiv(vocab_size, _TILE), len(records))](
        logits, logits.stride(0), vocab_size, row_slots, context_lens, records, TILE=_TILE, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def settle_tokens(token_ids: Tensor, logits: Tensor, records: Tensor) -> None:
    """Count what was sampled from each row that `records` name and that has counts.

    token_ids: [n] int32, below 0 = nothing; becomes NONE_LEFT where all tokens of such a row are out of the question.
    logits, records: as change_logits left them.
    """
    _settle_kernel[(len(records),)](token_ids, logits, logits.stride(0), records, num_warps=1)


@triton.jit
def _change_kernel(logits, logits_stride, vocab_size, row_slots, context_lens, records, TILE: tl.constexpr):
    tile = tl.program_id(0)
    record = records + tl.program_id(1) * RECORD_SIZE
    row = tl.load(record + _ROW)
    if tl.load(row_slots + row) >= 0:
        token_ids = tile * TILE + tl.arange(0, TILE)
        is_token = token_ids < vocab_size
        places = logits + row * logits_stride + token_ids
        raw = tl.load(places, mask=is_token, other=0.0).to(tl.float32)
        is_early = tl.load(context_lens + row) < tl.load(record + _MIN_TOTAL)
        mask = tl.where(is_early, tl.load(record + _EARLY_MASK), tl.load(record + _MASK))
        possible = _is_allowed(mask, token_ids, is_token)
        possible = possible & _is_allowed(tl.load(record + _STEP_MASK), token_ids, is_token)
        values = _add_biases(raw, record, token_ids, tile * TILE, TILE)
        counts = tl.load(record + _COUNTS)
        if counts != 0:
            packed = tl.load(counts.to(tl.pointer_type(tl.int32)) + token_ids, mask=is_token, other=0)
            values = _penalize(values, packed, record)
        values = tl.where(possible, tl.minimum(tl.maximum(values, -_LARGEST), _LARGEST), BANNED)
        values = tl.where(tl.abs(raw) < float("inf"), values, raw)
        tl.store(places, values, mask=is_token)


@triton.jit
def _is_allowed(mask, token_ids, is_token):
    """mask: an address, 0 = all tokens are."""
    allowed = is_token
    if mask != 0:
        words = tl.load(mask.to(tl.pointer_type(tl.int32)) + token_ids // 32, mask=is_token, other=0)
        allowed = ((words >> (token_ids % 32)) & 1) != 0
    return allowed


@triton.jit
def _add_biases(values, record, token_ids, first_token, TILE: tl.constexpr):
    num_biases = tl.load(record + _NUM_BIASES).to(tl.int32)
    if num_biases > 0:
        biased = tl.load(record + _BIASES).to(tl.pointer_type(tl.int32))
        begin = tl.full((), 0, tl.int32)  # of the entries in this tile
        end = tl.full((), 0, tl.int32)
        for start in range(0, num_biases, 256):
            entries = start + tl.arange(0, 256)
            ids = tl.load(biased + entries, mask=entries < num_biases, other=0x7FFFFFFF)
            begin += tl.sum((ids < first_token).to(tl.int32), 0)
            end += tl.sum((ids < first_token + TILE).to(tl.int32), 0)
        biases = tl.zeros([TILE], tl.float32)
        for entry in range(begin, end):
            bias = tl.load(biased + num_biases + entry).to(tl.float32, bitcast=True)
            biases = tl.where(token_ids == tl.load(biased + entry), bias, biases)
        values += biases
    return values


@triton.jit
def _penalize(values, packed, record):
    """packed: the tokens' counts."""
    repetition = _float(record + _REPETITION_PENALTY)
    count = packed & (IN_PROMPT - 1)
    penalized = tl.where(values > 0, tl.div_rn(values, tl.zeros_like(values) + repetition), values * repetition)
    values = tl.where(packed != 0, penalized, values)
    values -= count.to(tl.float32) * _float(record + _FREQUENCY_PENALTY)
    return values - tl.where(count > 0, _float(record + _PRESENCE_PENALTY), 0.0)


@triton.jit
def _float(place):
    return tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _settle_kernel(token_ids, logits, logits_stride, records):
    record = records + tl.program_id(0) * RECORD_SIZE
    counts = tl.load(record + _COUNTS)
    row = tl.load(record + _ROW)
    token = tl.load(token_ids + row)
    if token >= 0:
        if tl.load(logits + row * logits_stride + token).to(tl.float32) < _LEAST_LEFT:
            tl.store(token_ids + row, NONE_LEFT)
        elif counts != 0:
            place = counts.to(tl.pointer_type(tl.int32)) + token
            tl.store(place, tl.load(place) + 1)
