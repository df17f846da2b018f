"""Paged attention on the CPU: gather a sequence's blocks, then PyTorch's flash attention over them.

kv_cache: [num_blocks, kv_heads, 2, block_size, head_dim], keys at 0 and values at 1. The gather costs a tenth of the
attention proper. Queries that share a kv head are folded into the query length (decode) or the head dimension
with stride 0 keys (prefill), so that keys and values are never repeated.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

# A further group costs about as much as attending to this many more padded tokens.
_GROUP_COST_TOKENS = 512

# PyTorch's kernel is slow with these numbers of queries to a kv head: 16 sequences of 256 tokens, 3 kv heads of 64
# dimensions, one EPYC core, took 1290, 430, 586 and 454 us for 1, 2, 3 and 4 of them in bf16, 680 and 605 for 7 and 8;
# in fp32 180, 300, 440 and 335 us, 570 and 490.
_PADDED_QUERIES = {torch.bfloat16: {1: 2, 3: 4, 7: 8}, torch.float32: {3: 4, 7: 8}}


def cache_rows(slot_mapping: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """Rows of kv_cache.view(-1, head_dim) for keys, then values, of each token.

    slot_mapping: [n] int64 -> [n * 2 * kv_heads] int64, in the order of cat((k, v), dim=1).
    """
    heads = torch.arange(num_kv_heads)
    planes = torch.cat((2 * heads, 2 * heads + 1)) * block_size  # [2 * kv_heads]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    return (block * (2 * num_kv_heads * block_size) + offset).unsqueeze(1).add(planes).flatten()


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, rows: Tensor) -> None:
    """Write k and v: [n, kv_heads, head_dim] to `rows` of the cache, see cache_rows."""
    head_dim = k.shape[-1]
    kv_cache.view(-1, head_dim).index_copy_(0, rows, torch.cat((k, v), dim=1).view(-1, head_dim))


@dataclasses.dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar length, padded to the longest of them."""

    size: int
    planes: Tensor  # [size * kv_heads * 2 * blocks] int64, rows of kv_cache.view(-1, block_size * head_dim)
    num_keys: int  # the longest context
    mask: Tensor | None  # [size, 1, 1, num_keys], added to the scores; None for equal lengths


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What is the same for all layers of a decode step."""

    groups: list[DecodeGroup]
    order: Tensor | None  # [batch] int64, the sequence at each place of the groups; None: as given
    inverse: Tensor | None  # [batch] int64, the place of each sequence


def plan_decode(
    block_tables: Tensor, context_lens: Tensor, num_kv_heads: int, block_size: int, dtype: torch.dtype
) -> DecodePlan:
    """block_tables: [batch, max_blocks] int32; context_lens: [batch] int32, each at least 1."""
    lengths = context_lens.tolist()
    members = _group_by_length(lengths)
    groups = [
        _decode_group(block_tables[group], [lengths[i] for i in group], num_kv_heads, block_size, dtype)
        for group in members
    ]
    if len(groups) == 1:
        return DecodePlan(groups, None, None)
    order = torch.tensor([i for group in members for i in group])
    return DecodePlan(groups, order, order.argsort())


def decode_attention(q: Tensor, kv_cache: Tensor, plan: DecodePlan) -> Tensor:
    """q: [batch, heads, head_dim] -> the same shape."""
    num_kv_heads, _, block_size, head_dim = kv_cache.shape[1:]
    num_queries = q.shape[1] // num_kv_heads
    grouped_q = q.view(q.shape[0], num_kv_heads, num_queries, head_dim)
    padded_queries = _PADDED_QUERIES[q.dtype].get(num_queries)
    if padded_queries is not None:
        grouped_q = F.pad(grouped_q, (0, 0, 0, padded_queries - num_queries))
    if plan.order is not None:
        grouped_q = grouped_q.index_select(0, plan.order)
    planes = kv_cache.view(-1, block_size * head_dim)
    outputs = []
    start = 0
    for group in plan.groups:
        kv = planes.index_select(0, group.planes).view(group.size, num_kv_heads, 2, -1, head_dim)
        kv = kv[..., : group.num_keys, :]
        queries = grouped_q[start : start + group.size]
        outputs.append(F.scaled_dot_product_attention(queries, kv.select(2, 0), kv.select(2, 1), attn_mask=group.mask))
        start += group.size
    output = outputs[0] if plan.inverse is None else torch.cat(outputs).index_select(0, plan.inverse)
    return output[:, :, :num_queries].reshape(q.shape)


def _group_by_length(lengths: list[int]) -> list[list[int]]:
    """Cut the sequences, longest first, where padding on would cost more than a new group; one group: as given."""
    groups: list[list[int]] = []
    waste = longest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        waste += longest - lengths[i]
        if not groups or waste > _GROUP_COST_TOKENS:
            groups.append([])
            waste, longest = 0, lengths[i]
        groups[-1].append(i)
    return groups if len(groups) > 1 else [list(range(len(lengths)))]


def _decode_group(
    block_tables: Tensor, lengths: list[int], num_kv_heads: int, block_size: int, dtype: torch.dtype
) -> DecodeGroup:
    num_keys = max(lengths)
    blocks = block_tables[:, : -(-num_keys // block_size)]
    # Padding reads the sequence's own first block: masked or not, a NaN in another's would spread (0 * NaN is NaN).
    held = -(-torch.tensor(lengths) // block_size)
    blocks = blocks.where(torch.arange(blocks.shape[1]) < held[:, None], blocks[:, :1])
    mask = None
    if min(lengths) < num_keys:
        is_padding = torch.arange(num_keys) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(len(lengths), num_keys, dtype=dtype).masked_fill_(is_padding, float("-inf"))[:, None, None]
    return DecodeGroup(len(lengths), _planes(blocks, num_kv_heads), num_keys, mask)


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """One sequence's part of a prefill step; planes and mask are None where nothing precedes the chunk."""

    start: int  # rows of q, k and v
    end: int
    context_len: int
    planes: Tensor | None  # [kv_heads * 2 * blocks] int64, rows of kv_cache.view(-1, block_size * head_dim)
    mask: Tensor | None  # [end - start, context_len], added to the scores


def plan_prefill(
    query_starts: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_tables: Tensor,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
) -> list[PrefillChunk]:
    """query_starts: [num_seqs + 1]; context_lens: [num_seqs]; block_tables: [num_seqs, max_blocks] int32."""
    chunks = []
    for i, context_len in enumerate(context_lens):
        start, end = query_starts[i], query_starts[i + 1]
        if context_len == end - start:
            chunks.append(PrefillChunk(start, end, context_len, None, None))
            continue
        blocks = block_tables[i : i + 1, : -(-context_len // block_size)]
        mask = torch.full((end - start, context_len), float("-inf"), dtype=dtype)
        mask.triu_(context_len - (end - start) + 1)
        chunks.append(PrefillChunk(start, end, context_len, _planes(blocks, num_kv_heads), mask))
    return chunks


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, chunks: list[PrefillChunk]) -> Tensor:
    """q: [n, heads, head_dim]; k, v: [n, kv_heads, head_dim], in the cache already; returns q's shape."""
    num_kv_heads, _, block_size, head_dim = kv_cache.shape[1:]
    planes = kv_cache.view(-1, block_size * head_dim)
    grouped = (q.shape[0], num_kv_heads, -1, head_dim)
    queries = q.view(grouped).permute(1, 2, 0, 3)  # [kv_heads, group, n, head_dim]
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    outputs = output.view(grouped).permute(1, 2, 0, 3)
    for chunk in chunks:
        rows = slice(chunk.start, chunk.end)
        if chunk.planes is None:
            keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        else:
            kv = planes.index_select(0, chunk.planes).view(num_kv_heads, 2, -1, head_dim)[:, :, : chunk.context_len]
            keys, values = kv[:, 0], kv[:, 1]
        group = (-1, queries.shape[1], -1, -1)
        outputs[:, :, rows] = F.scaled_dot_product_attention(
            queries[:, :, rows],
            keys[:, None].expand(group),
            values[:, None].expand(group),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
        )
    return output


def _planes(blocks: Tensor, num_kv_heads: int) -> Tensor:
    """Rows of kv_cache.view(-1, block_size * head_dim), ordered by sequence, kv head, key or value, block.

    blocks: [batch, n] int32 -> [batch * kv_heads * 2 * n] int64.
    """
    planes = torch.arange(2 * num_kv_heads)[:, None]
    return (blocks.long()[:, None] * (2 * num_kv_heads) + planes).flatten()
