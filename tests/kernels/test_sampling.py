"""The CPU sampler against the oracle, and the noise against what it claims to be."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from kernels import reference
from kernels.sampling import SamplingColumns, sample
from tests.kernels.sampling_cases import by_reference, columns, make_logits, row_params, rule_out, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(row_params, min_size=1, max_size=5),
    shape=shapes,
    vocab_size=st.sampled_from([1, 2, 100, 256, 257, 1000, 5000]),
    seed=st.integers(0, 2**32),
)
def test_tokens_are_those_of_the_full_sort(rows: list[dict], shape: str, vocab_size: int, seed: int) -> None:
    logits = make_logits(shape, len(rows), vocab_size, seed)
    positions = torch.arange(len(rows)) * 1000 + seed % 1000
    params = columns(rows)
    assert sample(logits, params, positions).tolist() == by_reference(logits, params, positions).tolist()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(row_params, min_size=1, max_size=5),
    shape=shapes,
    vocab_size=st.sampled_from([1, 2, 100, 256, 257, 1000, 5000]),
    num_left=st.sampled_from([1, 1, 2, 30, 255, 256, 257, 600]),
    seed=st.integers(0, 2**32),
)
def test_tokens_of_minus_infinity_are_never_chosen(
    rows: list[dict], shape: str, vocab_size: int, num_left: int, seed: int
) -> None:
    logits = rule_out(make_logits(shape, len(rows), vocab_size, seed), num_left, seed)
    positions, params = torch.arange(len(rows)) * 1000 + seed % 1000, columns(rows)
    tokens = sample(logits, params, positions)
    assert bool(logits.gather(1, tokens[:, None]).isfinite().all())
    assert tokens.tolist() == by_reference(logits, params, positions).tolist()


@settings(max_examples=200, deadline=None)
@given(
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 50, 400]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_tokens_are_drawn_from_what_transformers_warpers_keep(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits, position = make_logits("normal", 1, 300, seed) * 2, torch.tensor([5])
    warpers = [theirs.TemperatureLogitsWarper(temperature)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)  # pyright: ignore
    row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    params = columns([row])
    noise = reference.gumbel_noise(params.seed, params.choice_index, position, torch.arange(300))
    expected = (scores.double() + noise).argmax(-1)
    assert sample(logits, params, position).tolist() == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(row_params, min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_a_row_does_not_depend_on_the_other_rows(rows: list[dict], seed: int) -> None:
    logits, positions, params = make_logits("normal", len(rows), 3000, seed) * 3, torch.arange(len(rows)), columns(rows)
    together = sample(logits, params, positions)
    for row in range(len(rows)):
        index = torch.tensor([row])
        assert sample(logits[index], params.select(index), positions[index]).item() == together[row].item()


def test_greedy_takes_the_lowest_of_equal_ids_beside_sampled_rows() -> None:
    logits = torch.zeros(2, 500)
    logits[:, [77, 300]] = 1.0
    tokens = sample(logits, columns([{"temperature": 0.0}, {"temperature": 1e-9, "top_k": 1}]), torch.tensor([0, 0]))
    assert tokens[0] == 77
    assert tokens[1] in (77, 300)
    assert sample(logits[:1], columns([{"temperature": 0.0}]), torch.tensor([0])) == 77


def test_the_lowest_id_wins_where_logits_and_noise_are_equal() -> None:
    params = columns([{"seed": 48637}])
    position, equals = torch.tensor([0]), torch.tensor([133, 159])
    noise = reference.gumbel_noise(params.seed, params.choice_index, position, torch.arange(256))
    assert (noise == noise.max()).nonzero().flatten().tolist() == equals.tolist()  # found by trying seeds
    assert sample(torch.zeros(1, 256), params, position).item() == 133


def test_unfiltered_rows_are_exact_where_the_winner_is_no_candidate() -> None:
    rows = 300
    logits, params = make_logits("normal", rows, 3000, 11), columns([{"seed": 7}] * rows)
    tokens = sample(logits, params, torch.arange(rows))
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(-1)
    assert (ranks >= 256).sum() > 30
    assert tokens.tolist() == by_reference(logits, params, torch.arange(rows)).tolist()


def murmur3_of_bytes(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 in plain Python integers, for whole words."""
    state, mask = 0, 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", data):
        word = word * 0xCC9E2D51 & mask
        word = (word << 15 | word >> 17) & mask
        state ^= word * 0x1B873593 & mask
        state = (state << 13 | state >> 19) & mask
        state = (state * 5 + 0xE6546B64) & mask
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16


def test_the_hash_is_murmur3() -> None:
    assert murmur3_of_bytes(b"test") == 0xBA6BD213  # the published test vector
    words = [0x12345678, 0xFFFFFFFF, 3, 8191, 151_000]
    expected = murmur3_of_bytes(struct.pack("<5I", *words))
    assert reference.murmur3_32(tuple(torch.tensor([word]) for word in words)).item() == expected


@pytest.mark.parametrize("varied", ["seed", "choice_index", "position"])
def test_draws_follow_the_softmax_whatever_counts_up(varied: str) -> None:
    num_draws, vocab_size = 20_000, 12
    logits = torch.linspace(-2, 2, vocab_size).repeat(num_draws, 1)
    counter = torch.arange(num_draws)
    fixed = torch.full((num_draws,), 5)
    params = columns([{"temperature": 0.8}] * num_draws)
    params = SamplingColumns(
        params.temperature, params.top_k, params.top_p, params.min_p,
        counter if varied == "seed" else fixed, counter if varied == "choice_index" else fixed,
    )  # fmt: skip
    tokens = sample(logits, params, counter if varied == "position" else fixed)
    counts = tokens.bincount(minlength=vocab_size).double()
    expected = torch.softmax(logits[0].double() / 0.8, -1) * num_draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 31.3  # the 99.9th percentile at 11 degrees of freedom


def test_draws_of_neighbouring_positions_are_independent() -> None:
    num_draws = 20_000
    params = columns([{"seed": 9}] * num_draws)
    tokens = sample(torch.zeros(num_draws, 4), params, torch.arange(num_draws))
    pairs = (tokens[:-1] * 4 + tokens[1:]).bincount(minlength=16).double()
    expected = (num_draws - 1) / 16
    assert ((pairs - expected) ** 2 / expected).sum().item() < 37.7  # the 99.9th percentile at 15 degrees of freedom
