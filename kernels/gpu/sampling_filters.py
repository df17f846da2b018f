"""top_k, top_p and min_p of one row by one program: each keeps the logits from a threshold on, found by bisection.

Logits are compared by `ordered_key`. Each round of the bisection counts or weighs the row; as soon as few enough
logits can be kept, they are copied to a list of candidates, in the order of their ids, and the rounds read that.
A source is (values, length): the row, or the candidates where they are listed (length of the list >= 0).

Where ranks have a part of the row each, they run this together: counts, weights and what each of them found best are
exchanged (`kernels.gpu.peer_exchange`), and so every rank takes the same branches. Logits and candidates stay.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from kernels.gpu.gumbel import fast_exp2, gumbel_noise_log2, ordered_key
from kernels.gpu.peer_exchange import all_gather

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def choose_filtered(
    values, num_values, vocab_size, candidates, candidate_ids, tile_largest, num_tiles, largest, inverse, top_k, top_p,
    min_p, hashed, addresses, mailbox, number, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
    FIRST_TOKEN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """The kept token with the best score, its logit (of several ranks only), and the number of the last exchange.

    values: [num_values], this rank's part of the row, from FIRST_TOKEN on. tile_largest: [TILES], the largest logits
    of disjoint parts of the whole row, -inf where there is none of the num_tiles. top_k: at least vocab_size where it
    is off. inverse: 1 / temperature, in units of log 2. addresses, mailbox, number: of exchanges so far.
    """
    highest = ordered_key(largest, KEY_BITS)
    least = tl.full((), -(2 ** (KEY_BITS - 1)), tl.int32)  # the least key that may be the threshold's
    length = tl.full((), -1, tl.int32)
    if top_k < vocab_size:
        if top_k <= num_tiles:
            least = _kth_largest(ordered_key(tile_largest, KEY_BITS), top_k, least, highest)  # of as many logits
            length = _collect(
                values, num_values, candidates, candidate_ids, least, KEY_BITS, CAPACITY, CHUNK, FIRST_TOKEN
            )
        least, length, number = _bisect(
            values, num_values, candidates, candidate_ids, length, least, highest, top_k, largest, inverse, addresses,
            mailbox, number, False, KEY_BITS, CAPACITY, CHUNK, FIRST_TOKEN, RANK, WORLD,
        )  # fmt: skip
    if top_p < 1:
        source, source_length = _source(values, num_values, candidates, length)
        count, mass = _measure(source, source_length, least, largest, inverse, True, KEY_BITS, CHUNK)
        _, mass, number = _sum_over_ranks(count, mass, addresses, mailbox, number, RANK, WORLD)
        share = top_p.to(tl.float64)
        # All logits below the bound weigh less than half of what may be dropped.
        allowed = ((1.0 - share) * mass / vocab_size).to(tl.float32) * 0.5
        bound = largest + tl.log2(tl.maximum(allowed, 1e-37)) / inverse
        least = tl.maximum(least, tl.minimum(ordered_key(bound, KEY_BITS) - 1, highest))
        least, length, number = _bisect(
            values, num_values, candidates, candidate_ids, length, least, highest, share * mass, largest, inverse,
            addresses, mailbox, number, True, KEY_BITS, CAPACITY, CHUNK, FIRST_TOKEN, RANK, WORLD,
        )  # fmt: skip
    best, token = _best(
        values, num_values, candidates, candidate_ids, length, least, largest, inverse, min_p, hashed, KEY_BITS, CHUNK,
        FIRST_TOKEN,
    )  # fmt: skip
    chosen = 0.0
    if WORLD > 1:
        is_any = token != _NO_TOKEN
        logit = tl.load(values + tl.where(is_any, token - FIRST_TOKEN, 0), mask=is_any, other=0.0).to(tl.float32)
        number += 1
        bests, tokens, logits = all_gather(
            best.to(tl.int32, bitcast=True), token, logit.to(tl.int32, bitcast=True), addresses, mailbox, number, RANK,
            WORLD,
        )  # fmt: skip
        is_rank = tl.arange(0, triton.next_power_of_2(WORLD)) < WORLD
        scores = tl.where(is_rank, bests.to(tl.float32, bitcast=True), -float("inf"))
        is_best = scores == tl.max(scores, 0)
        token = tl.min(tl.where(is_best, tokens, _NO_TOKEN), 0)
        is_chosen = is_best & (tokens == token)
        chosen = tl.max(tl.where(is_chosen, logits.to(tl.float32, bitcast=True), -float("inf")), 0)
    return token, chosen, number


@triton.jit
def _bisect(
    values, num_values, candidates, candidate_ids, length, least, highest, needed, largest, inverse, addresses, mailbox,
    number, BY_MASS: tl.constexpr, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
    FIRST_TOKEN: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """The largest threshold from `least` (which keeps enough) to `highest` whose kept mass or count is `needed`, the
    length of the list of candidates, and the number of the last exchange."""
    while least < highest:
        middle = _upper_mean(least, highest)
        source, source_length = _source(values, num_values, candidates, length)
        own_count, mass = _measure(source, source_length, middle, largest, inverse, BY_MASS, KEY_BITS, CHUNK)
        count, mass, number = _sum_over_ranks(own_count, mass, addresses, mailbox, number, RANK, WORLD)
        if BY_MASS:
            is_enough = mass >= needed
        else:
            is_enough = count >= needed
        if is_enough:
            least = middle
            if (length < 0) & (own_count <= CAPACITY):
                length = _collect(
                    values, num_values, candidates, candidate_ids, least, KEY_BITS, CAPACITY, CHUNK, FIRST_TOKEN
                )
        else:
            highest = middle - 1
    return least, length, number


@triton.jit
def _sum_over_ranks(count, mass, addresses, mailbox, number, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Totals, the same bits on all ranks, and the number of the last exchange."""
    if WORLD > 1:
        number += 1
        bits = mass.to(tl.int64, bitcast=True)
        counts, lows, highs = all_gather(
            count, bits.to(tl.int32), (bits >> 32).to(tl.int32), addresses, mailbox, number, RANK, WORLD
        )
        lows = lows.to(tl.uint32, bitcast=True).to(tl.int64)
        masses = ((highs.to(tl.int64) << 32) | lows).to(tl.float64, bitcast=True)
        count = tl.sum(counts, 0)
        mass = tl.sum(masses, 0)
    return count, mass, number


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
def _source(values, num_values, candidates, length):
    if length >= 0:
        source = candidates
        source_length = length
    else:
        source = values
        source_length = num_values
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
    values, num_values, candidates, candidate_ids, threshold, KEY_BITS: tl.constexpr, CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr, FIRST_TOKEN: tl.constexpr,
):  # fmt: skip
    """List the logits with a key of at least `threshold`; returns how many, -1 where they are more than CAPACITY."""
    length = tl.full((), 0, tl.int32)
    for start in range(0, num_values, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        logits = tl.load(values + offsets, mask=offsets < num_values, other=0.0)
        is_kept = (offsets < num_values) & (ordered_key(logits.to(tl.float32), KEY_BITS) >= threshold)
        ends = length + tl.cumsum(is_kept.to(tl.int32), 0)
        fits = is_kept & (ends <= CAPACITY)
        tl.store(candidates + ends - 1, logits, mask=fits)
        tl.store(candidate_ids + ends - 1, FIRST_TOKEN + offsets, mask=fits)
        length = tl.max(ends, 0)
    tl.debug_barrier()  # other threads read the list
    return tl.where(length <= CAPACITY, length, -1)


@triton.jit
def _best(
    values, num_values, candidates, candidate_ids, length, threshold, largest, inverse, min_p, hashed,
    KEY_BITS: tl.constexpr, CHUNK: tl.constexpr, FIRST_TOKEN: tl.constexpr,
):  # fmt: skip
    """The best score of what is kept, and its token; -inf and _NO_TOKEN where none is."""
    source, source_length = _source(values, num_values, candidates, length)
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), _NO_TOKEN, tl.int32)
    for start in range(0, source_length, CHUNK):
        offsets = start + tl.arange(0, CHUNK)
        is_there = offsets < source_length
        logits = tl.load(source + offsets, mask=is_there, other=0.0).to(tl.float32)
        scaled = (logits - largest) * inverse
        is_kept = is_there & (ordered_key(logits, KEY_BITS) >= threshold) & (fast_exp2(scaled) >= min_p)
        if tl.max(is_kept.to(tl.int32), 0) > 0:
            token_ids = tl.load(candidate_ids + offsets, mask=is_there & (length >= 0), other=_NO_TOKEN)
            token_ids = tl.where(length >= 0, token_ids, FIRST_TOKEN + offsets)
            scores = tl.where(is_kept, scaled + gumbel_noise_log2(hashed, token_ids), -float("inf"))
            chunk_best = tl.max(scores, 0)
            if chunk_best > best:
                best = chunk_best
                token = tl.min(tl.where(is_kept & (scores == chunk_best), token_ids, _NO_TOKEN), 0)
    return best, token
