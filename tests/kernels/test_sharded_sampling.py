"""The CPU sampler over shards of the vocabulary: on every rank the tokens of the whole rows, from a few numbers."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.sampling import WHOLE_VOCABULARY, SamplingColumns, VocabularyShard, gather_rows, sample
from tests.kernels.sampling_cases import by_reference, columns, make_logits, row_params, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


class Exchange:
    """Gathers between threads; where a rank gives what the others do not, or not as often, all of them fail."""

    def __init__(self, num_ranks: int) -> None:
        self._parts = [torch.empty(0)] * num_ranks
        self._gathered = torch.empty(0)
        self._barrier = threading.Barrier(num_ranks, self._meet, timeout=10)
        self.parts_seen: list[list[int]] = []  # the shape of what each rank gave, exchange by exchange

    def gather(self, rank: int, part: Tensor) -> Tensor:
        self._parts[rank] = part
        self._barrier.wait()
        return self._gathered.clone()

    def abort(self) -> None:
        self._barrier.abort()

    def _meet(self) -> None:
        assert len({(part.shape, part.dtype) for part in self._parts}) == 1
        self.parts_seen.append(list(self._parts[0].shape))
        self._gathered = torch.cat(self._parts, dim=1)


def on_ranks(
    logits: Tensor, cuts: list[int], run: Callable[[Tensor, VocabularyShard], Tensor]
) -> tuple[list[Tensor], list[list[int]]]:
    """What `run` returns on each rank for its shard, and the parts that each of them gave for it.

    cuts: where a new shard begins.
    """
    shards = logits.tensor_split(cuts, dim=1)
    exchange = Exchange(len(shards))

    def run_rank(rank: int) -> Tensor:
        def gather(part: Tensor) -> Tensor:
            return exchange.gather(rank, part)

        try:
            return run(shards[rank].contiguous(), VocabularyShard([0, *cuts][rank], gather))
        except BaseException:
            exchange.abort()
            raise

    with ThreadPoolExecutor(len(shards)) as threads:
        ranks = [threads.submit(run_rank, rank) for rank in range(len(shards))]
    by_cause = sorted(ranks, key=lambda rank: isinstance(rank.exception(), threading.BrokenBarrierError))
    by_cause[0].result()  # what broke it comes first
    return [rank.result() for rank in ranks], exchange.parts_seen


def sample_in_shards(
    logits: Tensor, cuts: list[int], of: SamplingColumns, positions: Tensor
) -> tuple[list[int], list[list[int]]]:
    """The tokens on which all ranks agree, and the parts that each of them gave for it."""
    tokens, parts_seen = on_ranks(logits, cuts, lambda part, shard: sample(part, of, positions, shard))
    assert all(other.equal(tokens[0]) for other in tokens)
    return tokens[0].tolist(), parts_seen


def equal_cuts(vocab_size: int, num_ranks: int) -> list[int]:
    """Where all shards but the last have the same size."""
    size = -(-vocab_size // num_ranks)
    return [min(size * rank, vocab_size) for rank in range(1, num_ranks)]


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(row_params, min_size=1, max_size=5),
    shape=shapes,
    vocab_size=st.sampled_from([1, 2, 100, 257, 1000, 1003, 5000]),
    cuts=st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1), max_size=7).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_tokens_are_those_of_the_whole_rows_wherever_they_are_cut(
    rows: list[dict], shape: str, vocab_size: int, cuts: list[float], seed: int
) -> None:
    logits, params = make_logits(shape, len(rows), vocab_size, seed), columns(rows)
    positions = torch.arange(len(rows)) * 1000 + seed % 1000
    tokens, _ = sample_in_shards(logits, [int(cut * vocab_size) for cut in cuts], params, positions)
    assert tokens == sample(logits, params, positions).tolist()
    assert tokens == by_reference(logits, params, positions).tolist()


EVERY_WAY = [
    {"temperature": 0.0},  # greedy
    {},  # an outsider may overtake the candidates
    {"top_p": 0.7},  # 256 candidates do not tell
    {"top_p": 0.9999999},  # nor do 4,096
    {"temperature": 0.01, "top_p": 0.9},
    {"top_k": 2000, "top_p": 0.9},
    {"top_k": 40},
    {"min_p": 0.001},
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocab_size", [5, 256, 5003])
def test_rows_of_every_kind_stand_side_by_side(num_ranks: int, vocab_size: int) -> None:
    params = columns([way | {"seed": seed} for seed in range(4) for way in EVERY_WAY])
    logits, positions = make_logits("normal", 32, vocab_size, 5), torch.arange(32)
    tokens, _ = sample_in_shards(logits, equal_cuts(vocab_size, num_ranks), params, positions)
    assert tokens == by_reference(logits, params, positions).tolist()


def test_no_rows_have_no_tokens() -> None:
    tokens, _ = sample_in_shards(torch.zeros(0, 10), [5], columns([{}]).select(torch.tensor([False])), torch.arange(0))
    assert tokens == []


@pytest.mark.parametrize("cuts", [[50], [150], [300], [78, 300], [0, 0, 400, 500]])
def test_greedy_takes_the_lowest_of_equal_ids_on_several_ranks(cuts: list[int]) -> None:
    logits = torch.zeros(1, 500)
    logits[:, [77, 299, 300]] = 1.0
    tokens, _ = sample_in_shards(logits, cuts, columns([{"temperature": 0.0}]), torch.tensor([0]))
    assert tokens == [77]


# Found by trying seeds; the second has more equal logits than there are candidates.
@pytest.mark.parametrize(("seed", "vocab_size", "equals"), [(48637, 256, [133, 159]), (18430, 1000, [351, 530])])
def test_the_lowest_id_wins_where_logits_and_noise_are_equal_on_two_ranks(
    seed: int, vocab_size: int, equals: list[int]
) -> None:
    params, position = columns([{"seed": seed}]), torch.tensor([0])
    noise = reference.gumbel_noise(params.seed, params.choice_index, position, torch.arange(vocab_size))
    assert (noise == noise.max()).nonzero().flatten().tolist() == equals
    for cut in equals:
        tokens, _ = sample_in_shards(torch.zeros(1, vocab_size), [cut], params, position)
        assert tokens == equals[:1]


def test_unfiltered_rows_are_exact_where_the_winner_is_no_candidate() -> None:
    rows = 200
    logits, params = make_logits("normal", rows, 3000, 11), columns([{"seed": 7}] * rows)
    tokens, _ = sample_in_shards(logits, equal_cuts(3000, 3), params, torch.arange(rows))
    ranks = (logits > logits.gather(1, torch.tensor(tokens)[:, None])).sum(-1)
    assert (ranks >= 256).sum() > 20
    assert tokens == by_reference(logits, params, torch.arange(rows)).tolist()


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"temperature": 0.0}, [[3, 2]]),
        ({"temperature": 0.01}, [[3, 512]]),
        ({"temperature": 0.01, "top_p": 0.9}, [[3, 512], [3, 1]]),
        ({}, [[3, 512], [3, 2]]),
    ],
)
def test_ranks_exchange_candidates_and_no_logits(row: dict, parts: list[list[int]]) -> None:
    logits = make_logits("normal", 3, 20_000, 2)
    _, parts_seen = sample_in_shards(logits, equal_cuts(20_000, 2), columns([row] * 3), torch.arange(3))
    assert parts_seen == parts


@pytest.mark.parametrize("cuts", [[], [50], [1, 2], [0, 40, 40, 97], [97, 97]])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_gathered_rows_are_whole_on_every_rank(cuts: list[int], num_rows: int) -> None:
    logits = make_logits("normal", num_rows, 97, 4)
    ranks, _ = on_ranks(logits, cuts, gather_rows)
    assert all(rows.equal(logits) for rows in ranks)
    assert gather_rows(logits, WHOLE_VOCABULARY) is logits
