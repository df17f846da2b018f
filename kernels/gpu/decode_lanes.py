"""Decode attention of few query heads a kv head without tensor cores: a chain that is short where latency counts.

Lanes of a warp read whole tokens, 16 bytes a lane, and every such group of lanes keeps a softmax of its own. So
neither scores nor weights leave the registers, and warps exchange nothing before the last token.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

MAX_QUERY_SIZE = 256  # elements of the queries of a kv head, padded: with more, the registers do not suffice


def lane_groups(num_warps: int, head_dim: int, element_size: int, tile: int) -> int:
    """Groups of lanes in a program; each takes every so many-th token of a tile."""
    return min(num_warps * 32 * (16 // element_size) // head_dim, tile)


@triton.jit
def attend_by_lanes(
    q, kv_head_cache, block_table, block, length, first_tile, end_tile, scale,
    BLOCK_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Softmax attention, not normalised, over some tiles of one context; scale includes log2(e).

    q: [GROUP, HEAD_DIM]; block: the one that holds first_tile; LANES: see `lane_groups`. Returns values
    [HEADS, HEAD_DIM], largest scores [HEADS] and sums of weights [HEADS], and the first block of the context.
    """
    TILES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE
    TOKENS: tl.constexpr = TILE // LANES
    heads, lanes, dims = tl.arange(0, HEADS), tl.arange(0, LANES), tl.arange(0, HEAD_DIM)
    element = (lanes * HEAD_DIM)[None, :, None] + dims[None, None, :]
    real_heads = tl.minimum(heads, GROUP - 1)  # the padding computes what the last head does
    head_element = (real_heads * HEAD_DIM)[:, None, None] + (lanes * 0)[None, :, None] + dims[None, None, :]
    start = kv_head_cache + block.to(tl.int64) * BLOCK_STRIDE + (first_tile % TILES_PER_BLOCK) * (TILE * HEAD_DIM)
    # One iteration ahead, so that no load waits for an address; at the end, for the next head.
    following = tl.where(first_tile + 1 < end_tile, first_tile + 1, 0)
    block = tl.load(block_table + following // TILES_PER_BLOCK)
    left = length - first_tile * TILE  # tokens from the tile's first on
    keys = _load_tokens(start + element, lanes, left, HEAD_DIM, TOKENS, LANES)
    values = _load_tokens(start + BLOCK_SIZE * HEAD_DIM + element, lanes, left, HEAD_DIM, TOKENS, LANES)
    queries = tl.load(q + head_element).to(tl.float32) * scale  # the same for all groups of lanes
    largest = tl.full([HEADS, LANES], -1e30, dtype=tl.float32)  # finite: a group of lanes may see no token
    sums = tl.zeros([HEADS, LANES], dtype=tl.float32)
    totals = tl.zeros([HEADS, LANES, HEAD_DIM], dtype=tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=1):
        start = kv_head_cache + block.to(tl.int64) * BLOCK_STRIDE + ((tile + 1) % TILES_PER_BLOCK) * (TILE * HEAD_DIM)
        following = tl.where(tile + 2 < end_tile, tile + 2, 0)
        block = tl.load(block_table + following // TILES_PER_BLOCK)
        new_largest, scores = largest, ()
        for i in tl.static_range(TOKENS):
            score = tl.sum(queries * keys[i].to(tl.float32), axis=2)  # [HEADS, LANES]
            score = tl.where((i * LANES + lanes < left)[None, :], score, float("-inf"))
            scores += (score,)
            new_largest = tl.maximum(new_largest, score)
        next_left = tl.where(tile + 1 < end_tile, left - TILE, 0)
        keys = _load_tokens(start + element, lanes, next_left, HEAD_DIM, TOKENS, LANES)
        rescale = tl.exp2(largest - new_largest)
        sums, totals = sums * rescale, totals * rescale[:, :, None]
        for i in tl.static_range(TOKENS):
            weight = tl.exp2(scores[i] - new_largest)
            sums += weight
            totals += weight[:, :, None] * values[i].to(tl.float32)
        values = _load_tokens(start + BLOCK_SIZE * HEAD_DIM + element, lanes, next_left, HEAD_DIM, TOKENS, LANES)
        largest, left = new_largest, next_left
    overall = tl.max(largest, axis=1)
    share = tl.exp2(largest - overall[:, None])
    return _sum_groups(totals * share[:, :, None]), overall, tl.sum(sums * share, axis=1), block


@triton.jit
def _load_tokens(
    pointers, lanes, left, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """TOKENS tensors [1, LANES, HEAD_DIM], all under way at once; beyond `left` may lie anything, NaN too."""
    loaded = ()
    for i in tl.static_range(TOKENS):
        is_there = (i * LANES + lanes < left)[None, :, None]
        loaded += (tl.load(pointers + i * LANES * HEAD_DIM, mask=is_there, other=0.0),)
    return loaded


@triton.jit
def _sum_groups(x):
    """[HEADS, LANES, HEAD_DIM] over LANES. By halves: a sum over warps would go through conflicting banks."""
    HEADS: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    HEAD_DIM: tl.constexpr = x.shape[2]
    x = tl.permute(x, (0, 2, 1))
    for level in tl.static_range(1, 8):
        if (LANES >> level) > 0:
            a, b = tl.split(tl.reshape(x, [HEADS, HEAD_DIM, LANES >> level, 2]))
            x = a + b
    return tl.reshape(x, [HEADS, HEAD_DIM])
