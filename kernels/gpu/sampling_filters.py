"""top_k, top_p and min_p of one row by one program: each keeps the logits from a threshold on, found by bisection.

Logits are compared by `ordered_key`. Each round of the bisection counts or weighs the row; as soon as few enough
logits can be kept, they are copied to a list of candidates, in the order of their ids, and the rounds read that.
A source is (values, length): the row, or the candidates where there are any (length of the list > 0).
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.gpu.gumbel import fast_exp2, gumbel_noise_log2, ordered_key

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def choose_filtered(
    values, vocab_size, candidates, candidate_ids, tile_largest, num_tiles, largest, inverse, top_k, top_p, min_p,
    hashed, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The kept token with the best score.

    values: [vocab_size], the row. tile_largest: [TILES], the largest logits of disjoint parts of the row, -inf behind
    num_tiles. top_k: at least vocab_size where it is off. inverse: 1 / temperature, in units of log 2.
    """
    highest = ordered_key(largest, KEY_BITS)
    least = tl.full((), -(2 ** (KEY_BITS - 1)), tl.int32)  # the least key that may be the threshold's
    length = tl.full((), 0, tl.int32)
    if top_k < vocab_size:
        if top_k <= num_tiles:
            least = _kth_largest(ordered_key(tile_largest, KEY_BITS), top_k, least, highest)  # of as many logits
            length = _collect(values, vocab_size, candidates, candidate_ids, least, KEY_BITS, CAPACITY, CHUNK)
        least, length = _bisect(
            values, vocab_size, candidates, candidate_ids, length, least, highest, top_k, largest, inverse,
            False, KEY_BITS, CAPACITY, CHUNK,
        )  # fmt: skip
    if top_p < 1:
        source, source_length = _source(values, vocab_size, candidates, length)
        _, mass = _measure(source, source_length, least, largest, inverse, True, KEY_BITS, CHUNK)
        share = top_p.to(tl.float64)
        # All logits below the bound weigh less than half of what may be dropped.
        allowed = ((1.0 - share) * mass / vocab_size).to(tl.float32) * 0.5
        bound = largest + tl.log2(tl.maximum(allowed, 1e-37)) / inverse
        least = tl.maximum(least, tl.minimum(ordered_key(bound, KEY_BITS) - 1, highest))
        least, length = _bisect(
            values, vocab_size, candidates, candidate_ids, length, least, highest, share * mass, largest, inverse,
            True, KEY_BITS, CAPACITY, CHUNK,
        )  # fmt: skip
    return _best(
        values, vocab_size, candidates, candidate_ids, length, least, largest, inverse, min_p, hashed, KEY_BITS, CHUNK
    )


@triton.jit
def _bisect(
    values, vocab_size, candidates, candidate_ids, length, least, highest, needed, largest, inverse,
    BY_MASS: tl.constexpr, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest threshold from `least` (which keeps enough) to `highest` whose kept mass or count is `needed`, and
    the length of the list of candidates."""
    while least < highest:
        middle = _upper_mean(least, highest)
        source, source_length = _source(values, vocab_size, candidates, length)
        count, mass = _measure(source, source_length, middle, largest, inverse, BY_MASS, KEY_BITS, CHUNK)
        if BY_MASS:
            is_enough = mass >= needed
        else:
            is_enough = count >= needed
        if is_enough:
            least = middle
            if (length == 0) & (count <= CAPACITY):
                length = _collect(values, vocab_size, candidates, candidate_ids, least, KEY_BITS, CAPACITY, CHUNK)
        else:
            highest = middle - 1
    return least, length


@triton.jit
def _kth_largest(keys, k, least, highest):
    """The k-th largest of `keys`, or `least` where that is larger; none is larger than `highest`."""
    while least < highest:
        middle = _upper_mean(least, highest)
        if tl.sum((keys >= middle).to(tl.int32), 0) >= k:
            least = middle
        else:
            highest = middle - 1
    return least


@triton.jit
def _upper_mean(a, b):
    """The mean of two integers, rounded up, without overflow."""
    return (a | b) - ((a ^ b) >> 1)


@triton.jit
def _source(values, vocab_size, candidates, length):
    if length > 0:
        source = candidates
        source_length = length
    else:
        source = values
        source_length = vocab_size
    return source, source_length


@triton.jit
def _measure(
    source, length, threshold, largest, inverse, BY_MASS: tl.constexpr, KEY_BITS: tl.constexpr, CHUNK: tl.constexpr
):
    """How many logits have a key of at least `threshold`, and their weight, the sum of exp(scaled), float64."""
    counts = tl.zeros([CHUNK], tl.int32)
    masses = tl.zeros([CHUNK], tl.float64)
    for start in range(0, length, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        logits = tl.load(source + offsets, mask=offsets < length, other=0.0).to(tl.float32)
        is_kept = (offsets < length) & (ordered_key(logits, KEY_BITS) >= threshold)
        counts += is_kept.to(tl.int32)
        if BY_MASS:
            masses += tl.where(is_kept, fast_exp2((logits - largest) * inverse), 0.0).to(tl.float64)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _collect(
    values, vocab_size, candidates, candidate_ids, threshold, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """List the logits with a key of at least `threshold`; returns how many, 0 where they are more than CAPACITY."""
    length = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, CHUNK):
        token_ids = start + tl.arange(0, CHUNK)
        logits = tl.load(values + token_ids, mask=token_ids < vocab_size, other=0.0)
        is_kept = (token_ids < vocab_size) & (ordered_key(logits.to(tl.float32), KEY_BITS) >= threshold)
        ends = length + tl.cumsum(is_kept.to(tl.int32), 0)
        fits = is_kept & (ends <= CAPACITY)
        tl.store(candidates + ends - 1, logits, mask=fits)
        tl.store(candidate_ids + ends - 1, token_ids, mask=fits)
        length = tl.max(ends, 0)
    tl.debug_barrier()  # other threads read the list
    return tl.where(length <= CAPACITY, length, 0)


@triton.jit
def _best(
    values, vocab_size, candidates, candidate_ids, length, threshold, largest, inverse, min_p, hashed,
    KEY_BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    source, source_length = _source(values, vocab_size, candidates, length)
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), _NO_TOKEN, tl.int32)
    for start in range(0, source_length, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        is_there = offsets < source_length
        logits = tl.load(source + offsets, mask=is_there, other=0.0).to(tl.float32)
        scaled = (logits - largest) * inverse
        is_kept = is_there & (ordered_key(logits, KEY_BITS) >= threshold) & (fast_exp2(scaled) >= min_p)
        if tl.max(is_kept.to(tl.int32), 0) > 0:
            token_ids = tl.load(candidate_ids + offsets, mask=is_there & (length > 0), other=_NO_TOKEN)
            token_ids = tl.where(length > 0, token_ids, offsets)
            scores = tl.where(is_kept, scaled + gumbel_noise_log2(hashed, token_ids), -float("inf"))
            chunk_best = tl.max(scores, 0)
            if chunk_best > best:
                best = chunk_best
                token = tl.min(tl.where(is_kept & (scores == chunk_best), token_ids, _NO_TOKEN), 0)
    return token
