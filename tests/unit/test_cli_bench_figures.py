"""Scenarios, metrics and limits of `duet bench`."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet.bench.limit import Ceilings, Limit, ModelCost, limit_of
from duet.bench.metrics import Arrivals, measure, median, percentile
from duet.bench.report import fractions, table
from duet.bench.scenarios import SCENARIOS, Request, Scenario
from duet.errors import InvalidRequest

QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
H200 = Ceilings("H200", read_bytes_per_s=4.39e12, flops_per_s=780e12)

# --- scenarios ------------------------------------------------------------------------------------------------------


def test_seeds_benchmark_is_that_of_nano_vllm() -> None:
    requests = SCENARIOS["seeds"].requests("0/0")
    generator = random.Random(0)
    prompts = [[generator.randint(0, 10000) for _ in range(generator.randint(100, 1024))] for _ in range(256)]
    output_lens = [generator.randint(100, 1024) for _ in range(256)]
    assert [request.output_len for request in requests] == output_lens
    assert [request.prompt[2:] for request in requests] == [prompt[2:] for prompt in prompts]
    assert (sum(output_lens), sum(len(request.prompt) for request in requests)) == (133_966, 142_827)
    assert {request.temperature for request in requests} == {0.6}
    assert {request.start_s for request in requests} == {0.0}


@pytest.mark.parametrize("name", SCENARIOS)
def test_runs_differ_in_the_beginnings_of_prompts_alone(name: str) -> None:
    scenario = dataclasses.replace(SCENARIOS[name], streams=12)
    runs = [scenario.requests(run, 5000) for run in ("0/0", "0/1", "1/0")]
    shapes = [[(len(one.prompt), one.output_len, one.start_s) for one in run] for run in runs]
    assert shapes[0] == shapes[1] == shapes[2]
    pairs = [zip(one.prompt, other.prompt, strict=True) for one, other in zip(*runs[:2], strict=True)]
    assert {index for pair in pairs for index, (one, other) in enumerate(pair) if one != other} == {0, 1}
    groups = scenario.groups if scenario.prefix_len else 12
    assert len({tuple(one.prompt[:2]) for run in runs for one in run}) == 3 * groups
    assert len({tuple(one.prompt) for run in runs for one in run}) == 3 * 12
    assert all(0 <= token < 5000 for run in runs for one in run for token in one.prompt)


def test_a_group_shares_its_prefix_and_no_more() -> None:
    requests = Scenario(6, (10, 10), prefix_len=30, groups=2).requests("0/0")
    for group in (requests[::2], requests[1::2]):
        assert len({tuple(one.prompt[:30]) for one in group}) == 1
        assert len({tuple(one.prompt[30:]) for one in group}) == 3
        assert {len(one.prompt) for one in group} == {40}
    assert requests[0].prompt[:30] != requests[1].prompt[:30]


def test_poisson_arrivals_have_their_rate() -> None:
    starts = [request.start_s for request in Scenario(2000, (1, 1), (1, 1), rate=50).requests("")]
    assert starts == sorted(starts)
    assert starts[0] == 0
    gaps = [later - sooner for sooner, later in itertools.pairwise(starts)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_known_arrivals() -> None:
    streams = [
        Arrivals(sent=0.0, times=[1.0, 2.0, 4.0], num_tokens=[1, 1, 2], prompt_tokens=7, cached_tokens=2, lag_s=0.5),
        Arrivals(sent=0.5, times=[2.0, 3.0, 5.0], num_tokens=[1, 3, 2], prompt_tokens=3, cached_tokens=0),
    ]
    assert dataclasses.asdict(measure(streams)) == {
        "requests": 2,
        "prompt_tokens": 10,
        "cached_tokens": 2,
        "output_tokens": 10,
        "elapsed_s": 5.0,
        "tokens_per_s": 2.0,
        "total_tokens_per_s": 4.0,
        "requests_per_s": 0.4,
        "decode_tokens_per_s": pytest.approx((2 + 3 + 2) / 3),
        "step_s": pytest.approx(2 * 2 / (2 + 3)),  # both run from 2 to 4
        "ttft_p50_s": 1.25,
        "ttft_p90_s": pytest.approx(1.45),
        "ttft_p99_s": pytest.approx(1.495),
        "gap_p50_s": 1.5,
        "gap_p99_s": 2.0,
        "gap_max_s": 2.0,
        "tpot_p50_s": pytest.approx((3 / 3 + 3 / 5) / 2),
        "tpot_p99_s": pytest.approx(3 / 5 + 0.99 * (1 - 3 / 5)),
        "lag_max_s": 0.5,
    }


def test_a_single_message_has_neither_gaps_nor_a_rate() -> None:
    alone = measure([Arrivals(0.0, [1.0], [1])])
    assert (alone.decode_tokens_per_s, alone.step_s, alone.gap_p50_s, alone.tpot_p99_s) == (None, None, None, None)
    assert alone.cached_tokens is None
    middle = median([alone, alone])
    assert (middle["tokens_per_s"], middle["step_s"]) == (1.0, None)
    assert any(line.split() == ["gap", "p50,", "ms", "-", "-"] for line in table([alone], None))


def test_the_median_is_of_each_figure() -> None:
    runs = [measure([Arrivals(0.0, [end], [1])]) for end in (1.0, 4.0, 2.0)]
    assert (median(runs)["elapsed_s"], median(runs)["tokens_per_s"]) == (2.0, 0.5)


@given(
    streams=st.integers(1, 6),
    steps=st.integers(2, 9),
    step_s=st.floats(0.001, 1),
    first_s=st.floats(0.001, 1),
    tokens=st.integers(1, 4),
)
def test_lockstep_decoding_is_measured_as_such(
    streams: int, steps: int, step_s: float, first_s: float, tokens: int
) -> None:
    times = [7.0 + first_s + index * step_s for index in range(steps)]
    result = measure([Arrivals(7.0, times, [tokens] * steps)] * streams)
    for figure in (result.step_s, result.tpot_p50_s, result.tpot_p99_s):
        assert figure == pytest.approx(step_s / tokens)
    assert (result.gap_p50_s, result.gap_max_s) == (pytest.approx(step_s), pytest.approx(step_s))
    assert result.ttft_p50_s == result.ttft_p99_s == pytest.approx(first_s)
    assert result.decode_tokens_per_s == pytest.approx(streams * tokens / step_s)
    assert result.tokens_per_s == pytest.approx(streams * tokens * steps / (first_s + (steps - 1) * step_s))


def arrivals() -> st.SearchStrategy[Arrivals]:
    """Times are multiples of 1/1024 s, which sums and powers of two keep exact."""

    def build(sent: int, messages: list[tuple[int, int]]) -> Arrivals:
        times = itertools.accumulate((wait for wait, _ in messages), initial=sent)
        counts = [count for _, count in messages]
        return Arrivals(sent / 1024, [time / 1024 for time in times][1:], counts, prompt_tokens=3)

    return st.builds(
        build, st.integers(0, 5000), st.lists(st.tuples(st.integers(1, 900), st.integers(1, 4)), min_size=1, max_size=8)
    )


@given(streams=st.lists(arrivals(), min_size=1, max_size=6), scale=st.sampled_from([0.25, 0.5, 8.0]), data=st.data())
def test_figures_follow_the_clock_and_not_the_order(streams: list[Arrivals], scale: float, data: st.DataObject) -> None:
    result = measure(streams)
    shuffled = [
        dataclasses.replace(one, sent=one.sent * scale, times=[time * scale for time in one.times])
        for one in data.draw(st.permutations(streams))
    ]
    for name, figure in dataclasses.asdict(measure(shuffled)).items():
        before = getattr(result, name)
        if before is not None and name.endswith("_s"):
            before = before / scale if name.endswith("_per_s") else before * scale
        assert figure == before or figure == pytest.approx(before), name
    assert result.ttft_p50_s <= result.ttft_p90_s <= result.ttft_p99_s
    assert result.requests_per_s <= result.tokens_per_s < result.total_tokens_per_s
    if result.gap_p50_s is not None and result.gap_p99_s is not None and result.gap_max_s is not None:
        assert result.gap_p50_s <= result.gap_p99_s <= result.gap_max_s


@given(values=st.lists(st.floats(-10, 10), min_size=1), percent=st.floats(0, 100))
@settings(max_examples=50)
def test_percentiles_lie_among_the_values(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    assert ordered[0] - 1e-9 <= percentile(ordered, percent) <= ordered[-1] + 1e-9
    assert (percentile(ordered, 0), percentile(ordered, 100)) == (ordered[0], ordered[-1])


# --- the limit ------------------------------------------------------------------------------------------------------


def test_costs_of_qwen3_06b_are_those_of_its_checkpoint() -> None:
    cost = ModelCost.of(QWEN3_06B)
    assert cost.layer_params == 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    assert cost.weight_bytes == 2 * 596_049_920  # the published number of parameters, the embedding tied to the head
    assert cost.kv_bytes == 114_688
    assert ModelCost.of(QWEN3_06B, "float32").weight_bytes == 4 * 596_049_920


def test_head_sizes_and_counts_that_a_config_leaves_out() -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    cost = ModelCost.of(config | {"vocab_size": 10, "dtype": "float32"})
    assert (cost.layer_params, cost.kv_bytes) == (4 * 8 * 8 + 3 * 8 * 4, 4 * 2 * 2 * 4)
    assert cost.weight_bytes == 4 * (cost.layer_params + 3 * 8 + 10 * 8)


def test_limit_of_the_seeds_benchmark_is_the_measured_one() -> None:
    limit = limit_of(SCENARIOS["seeds"].requests(""), ModelCost.of(QWEN3_06B), H200)
    assert limit.kv_s == pytest.approx(13.87e12 / 4.39e12, rel=1e-3)
    assert limit.weights_s == pytest.approx(1024 * 1.1921e9 / 4.39e12, rel=1e-3)
    assert limit.prefill_s == pytest.approx(142_827 * 2 * 0.4404e9 / 780e12, rel=1e-3)
    assert limit.seconds == pytest.approx(limit.kv_s + limit.weights_s + limit.prefill_s)
    assert limit.tokens_per_s == pytest.approx(37_246, rel=1e-3)
    assert limit.step_s is None  # streams end one after another


def test_limit_of_a_step_is_that_of_the_batch() -> None:
    limit = limit_of(Scenario(256, (512, 512), (512, 512)).requests(""), ModelCost.of(QWEN3_06B), H200)
    context = 512 + 511 / 2
    assert limit.step_s == pytest.approx((1.1921e9 + 256 * context * 114_688) / 4.39e12, rel=1e-4)
    alone = limit_of(SCENARIOS["single"].requests(""), ModelCost.of(QWEN3_06B), H200)
    assert alone.step_s == pytest.approx(0.28e-3, rel=0.02)


def test_shared_prefixes_are_computed_once_and_read_once_a_step() -> None:
    cost, ceilings = ModelCost(layer_params=1, weight_bytes=0, kv_bytes=1), Ceilings("", 1.0, 2.0)
    requests = [
        Request([0] * 12, output_len, group=group, prefix_len=10) for group, output_len in ((0, 1), (0, 3), (1, 2))
    ]
    limit = limit_of(requests, cost, ceilings)
    assert limit.prefill_s == 2 * 10 + 3 * 2
    assert limit.kv_s == (1 * 2 + 0) + (3 * 2 + 0 + 1 + 2) + (2 * 2 + 0 + 1) + 3 * 10 + 2 * 10


def test_no_load_ends_before_its_last_request_could() -> None:
    cost, ceilings = ModelCost(layer_params=1, weight_bytes=2, kv_bytes=1), Ceilings("", 1.0, 1e9)
    late = [Request([0], 1), Request([0], 5, start_s=100.0)]
    assert limit_of(late, cost, ceilings).seconds == 100 + 5 * 2
    assert limit_of(late[:1], cost, ceilings).seconds == pytest.approx(1 + 2)


def test_fractions_are_of_the_limit() -> None:
    limit = Limit("", 2.0, 50.0, 0.01, 1, 1, 0)
    assert fractions({"tokens_per_s": 25.0, "step_s": 0.04}, limit) == {"tokens_per_s": 0.5, "step_s": 0.25}
    assert fractions({"tokens_per_s": 25.0, "step_s": None}, limit)["step_s"] is None
    together = dataclasses.replace(limit, step_s=None)
    assert fractions({"tokens_per_s": 25.0, "step_s": 0.04}, together)["step_s"] is None
    run = measure([Arrivals(0.0, [1.0, 2.0], [1, 1])])
    assert table([run], together)[5].split()[-3:] == ["1000.000", "-", "-"]


def test_files_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="mixture"):
        ModelCost.of(QWEN3_06B | {"num_experts": 8})
    file = tmp_path / "ceilings.json"
    file.write_text("{")
    with pytest.raises(InvalidRequest, match="not JSON"):
        Ceilings.load(file)
    file.write_text(json.dumps({"device": "x", "flops_per_s": 1}))
    with pytest.raises(InvalidRequest, match="lacks read_bytes_per_s"):
        Ceilings.load(file)
