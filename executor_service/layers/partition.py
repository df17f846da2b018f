"""How the dimensions of a model are cut over the ranks of a tensor-parallel group.

What does not divide evenly is padded with zeros, which change no result: a head of zeros attends to nothing that the
output projection, zero there too, would let through.
"""

import dataclasses

from executor_service.weights.checkpoint import Span


def even_span(size: int, rank: int, num_ranks: int, multiple: int = 1) -> Span:
    """A rank's part of a dimension, as long on every rank: a multiple of `multiple`, unless that left a rank empty."""
    length = -(-size // num_ranks)
    rounded = -(-length // multiple) * multiple
    if rounded * (num_ranks - 1) < size:
        length = rounded
    start = min(rank * length, size)
    return Span(start, min(start + length, size), length)


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """A rank's heads: each of its key-value heads serves as many of its query heads, one after the other."""

    query: Span
    key_value: Span


def split_heads(num_heads: int, num_kv_heads: int, rank: int, num_ranks: int) -> HeadSplit:
    """Cut heads along groups, those that share a key-value head.

    Where there are more ranks than groups, and as many for each, they share a group: its key-value head is on all of
    them.
    """
    group = num_heads // num_kv_heads
    ranks_per_group, rest = divmod(num_ranks, num_kv_heads)
    if rest or not ranks_per_group:
        key_value = even_span(num_kv_heads, rank, num_ranks)
        return HeadSplit(key_value.times(group), key_value)
    kv_head, place = divmod(rank, ranks_per_group)
    part = even_span(group, place, ranks_per_group)
    first = kv_head * group
    query = Span(first + part.start, first + part.stop, part.length)
    return HeadSplit(query, Span(kv_head, kv_head + 1, 1))
