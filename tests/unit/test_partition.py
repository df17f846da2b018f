"""What each rank holds of a dimension or of the heads, for all sizes that a model may have."""

from hypothesis import given
from hypothesis import strategies as st

from executor_service.layers.partition import even_span, split_heads

NUM_RANKS = st.integers(1, 8)


@given(st.integers(1, 300_000), NUM_RANKS, st.sampled_from([1, 64, 4096]))
def test_spans_of_all_ranks_are_the_dimension_in_order_and_as_long(size: int, num_ranks: int, multiple: int) -> None:
    spans = [even_span(size, rank, num_ranks, multiple) for rank in range(num_ranks)]
    held = [entry for span in spans for entry in range(span.start, span.stop)]
    assert held == list(range(size))
    assert len({span.length for span in spans}) == 1
    assert all(0 <= span.stop - span.start <= span.length for span in spans)


@given(st.integers(1, 300_000), NUM_RANKS)
def test_a_span_is_a_multiple_wherever_that_leaves_every_rank_something(size: int, num_ranks: int) -> None:
    spans = [even_span(size, rank, num_ranks, 4096) for rank in range(num_ranks)]
    if size > 4096 * num_ranks * num_ranks:
        assert spans[0].length % 4096 == 0
    if spans[0].length % 4096 == 0:
        assert all(span.stop > span.start for span in spans)


@given(st.integers(1, 16), st.integers(1, 8), NUM_RANKS)
def test_every_query_head_is_on_one_rank_beside_its_own_key_value_head(
    num_kv_heads: int, group: int, num_ranks: int
) -> None:
    splits = [split_heads(num_kv_heads * group, num_kv_heads, rank, num_ranks) for rank in range(num_ranks)]
    held = sorted(head for split in splits for head in range(split.query.start, split.query.stop))
    assert held == list(range(num_kv_heads * group))
    for split in splits:
        served = split.query.length // split.key_value.length
        assert served * split.key_value.length == split.query.length
        for head in range(split.query.start, split.query.stop):
            place = (head - split.query.start) // served
            assert split.key_value.start + place == head // group


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), NUM_RANKS)
def test_nothing_is_padded_where_heads_divide_evenly(num_kv_heads: int, group: int, num_ranks: int) -> None:
    num_heads = num_kv_heads * group
    divides = num_kv_heads % num_ranks == 0 or (num_ranks % num_kv_heads == 0 and num_heads % num_ranks == 0)
    for rank in range(num_ranks):
        split = split_heads(num_heads, num_kv_heads, rank, num_ranks)
        if divides:
            assert split.query.length == num_heads // num_ranks == split.query.stop - split.query.start
            assert split.key_value.stop - split.key_value.start == split.key_value.length
