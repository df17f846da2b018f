"""The model runner through real plans, against transformers' greedy generate on the same tiny weights."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from executor_service.config import ExecutorConfig
from executor_service.plan import InvalidPlan, Sampling
from executor_service.runner import kv_cache
from executor_service.runner.cpu_build import build_cpu_runner
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.runner.runner import LENGTH, STOPPED
from tests.unit.runner_harness import (
    ALONE,
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    VOCAB_SIZE,
    Core,
    chunks,
    column,
    prompt,
    save_tiny_llama,
    sequence,
    tiny_settings,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(model_directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def settings(model_directory: Path) -> ExecutorConfig:
    return tiny_settings(model_directory)


@pytest.fixture(scope="module")
def shared_runner(settings: ExecutorConfig) -> CpuRunner:
    return build_cpu_runner(settings, ALONE)


@pytest.fixture
def runner(shared_runner: CpuRunner) -> CpuRunner:
    shared_runner.reset()
    return shared_runner


def greedy(oracle: Any, tokens: Sequence[int], num_tokens: int) -> list[int]:
    with torch.inference_mode():
        ids = oracle.generate(torch.tensor([tokens]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return ids[0, len(tokens) :].tolist()


A, B, C = prompt(13, 1), prompt(30, 2), prompt(1, 3)


def test_chunked_prefill_mixed_plans_and_reused_slots_give_transformers_tokens(
    runner: CpuRunner, oracle: LlamaForCausalLM
) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [7, 3, 20]), sequence(3, B, [1, 40, 2, 9, 30])], **chunks((0, 0, 13, 1), (3, 0, 11, 0)))
    assert core.tokens == {0: greedy(oracle, A, 1)}
    outputs = core.run(**chunks((3, 11, 19, 1)), join_slots=[0], iterations=1)
    assert [output.partial for output in outputs] == [True, False]
    core.run(join_slots=[3], iterations=3)
    core.run(iterations=5, append_slots=[0, 3], append_blocks=[21, 31])
    assert core.tokens == {0: greedy(oracle, A, 10), 3: greedy(oracle, B, 9)}

    core.run([sequence(0, C, [21])], release_slots=[0], **chunks((0, 0, 1, 1)))
    core.tokens[0] = core.tokens[0][-1:]
    core.run(iterations=7, join_slots=[0], append_slots=[3], append_blocks=[32])
    assert core.tokens == {0: greedy(oracle, C, 8), 3: greedy(oracle, B, 16)}


def test_a_slot_that_left_the_decode_set_rests_and_goes_on_when_it_joins_again(
    runner: CpuRunner, oracle: LlamaForCausalLM
) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1, 2]), sequence(1, C, [3, 4])], **chunks((0, 0, 13, 1), (1, 0, 1, 1)))
    core.run(join_slots=[0, 1], iterations=2)
    core.run(leave_slots=[0], iterations=2)
    assert len(core.tokens[0]) == 3
    core.run(join_slots=[0], iterations=2)
    assert core.tokens == {0: greedy(oracle, A, 5), 1: greedy(oracle, C, 7)}


def test_a_cached_prefix_is_read_through_shared_blocks(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core, twin = Core(runner), B[:16] + A
    core.run([sequence(0, B, [5, 6, 7, 8])], **chunks((0, 0, 30, 1)))
    reader = sequence(1, twin, [5, 6, 20, 21, 22], num_cached_tokens=16)
    core.run([reader], iterations=1, join_slots=[0], **chunks((1, 16, 13, 1)))
    core.run(iterations=6, join_slots=[1], append_slots=[0], append_blocks=[9])
    assert core.tokens == {0: greedy(oracle, B, 8), 1: greedy(oracle, twin, 7)}


def test_a_preempted_sequence_resumes_with_identical_tokens(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1, 2])], **chunks((0, 0, 13, 1)))
    core.run(join_slots=[0], iterations=4)
    known = A + core.tokens[0]
    core.run(release_slots=[0])
    again = sequence(2, known, [30, 31, 32], num_prompt_tokens=len(A))
    core.run([again], **chunks((2, 0, len(known), 1)))
    core.run(join_slots=[2], iterations=4)
    assert core.tokens[0] + core.tokens[2] == greedy(oracle, A, 10)


def test_seeded_sampling_is_the_same_alone_batched_and_after_preemption(runner: CpuRunner) -> None:
    sampling = Sampling(temperature=1.3, top_k=0, top_p=0.95, min_p=0.0, seed=2**63 + 5, choice_index=1)
    alone, batched, greedy_alone = Core(runner), Core(runner), Core(runner)
    alone.run([sequence(0, A, [0, 1, 2], sampling=sampling)], **chunks((0, 0, 13, 1)))
    alone.run(join_slots=[0], iterations=9)
    runner.reset()
    batched.run([sequence(5, A, [4, 5, 6], sampling=sampling)], **chunks((5, 0, 13, 1)))
    batched.run([sequence(1, B, [10, 11, 12, 13])], **chunks((1, 0, 30, 1)), join_slots=[5], iterations=1)
    batched.run(join_slots=[1], iterations=2)
    known = A + batched.tokens[5]
    batched.run([sequence(2, known, [4, 5, 6], sampling=sampling)], release_slots=[5], **chunks((2, 0, 17, 1)))
    batched.run(join_slots=[2], iterations=5, append_slots=[1], append_blocks=[14])
    assert batched.tokens[5] + batched.tokens[2] == alone.tokens[0]
    runner.reset()
    greedy_alone.run([sequence(0, A, [0, 1, 2])], **chunks((0, 0, 13, 1)))
    greedy_alone.run(join_slots=[0], iterations=9)
    assert greedy_alone.tokens != alone.tokens


def test_a_done_slot_samples_nothing_until_it_is_released(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core, expected = Core(runner), greedy(oracle, A, 4)
    stop = next(index for index in range(1, 4) if expected[index] not in expected[:index])
    core.run(
        [
            sequence(0, A, [0, 1, 2], stop_token_ids=column([VOCAB_SIZE - 1, expected[stop]])),
            sequence(1, C, [3, 4], max_total_tokens=4),
        ],
        **chunks((0, 0, 13, 1), (1, 0, 1, 1)),
    )
    outputs = core.run(join_slots=[0, 1], iterations=6)
    assert core.tokens == {0: expected[: stop + 1], 1: greedy(oracle, C, 3)}
    assert core.reasons == {0: STOPPED, 1: LENGTH}
    assert len(outputs[-1].slots) == 0
    assert all(len(output.slots) == 0 for output in core.run(iterations=9))  # without blocks for the positions
    core.run([sequence(0, A, [0, 1, 2])], release_slots=[0], **chunks((0, 0, 13, 1)))
    core.run(join_slots=[0], iterations=1)
    assert core.tokens[0][stop + 1 :] == expected[:2]


def test_a_first_token_may_be_the_last(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1], max_total_tokens=14)], **chunks((0, 0, 13, 1)))
    assert core.reasons == {0: LENGTH}
    assert len(core.run(join_slots=[0], iterations=1)[-1].slots) == 0


def test_non_finite_logits_end_one_slot_alone(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1, 2]), sequence(1, C, [3, 4])], **chunks((0, 0, 13, 1), (1, 0, 1, 1)))
    for cache in runner._kv_caches:
        cache[1] = torch.nan
    output, last = core.run(join_slots=[0, 1], iterations=2)
    for cache in runner._kv_caches:
        cache.zero_()
    assert output.slot_errors == [(0, "non-finite logits")]
    assert output.slots.tolist() == [1]
    assert (last.slots.tolist(), last.slot_errors) == ([1], [])
    assert core.tokens[1] == greedy(oracle, C, 3)


def test_a_nan_reaches_neither_the_padding_of_others_nor_the_next_holder(
    runner: CpuRunner, oracle: LlamaForCausalLM
) -> None:
    core = Core(runner)
    core.run([sequence(1, A, [5, 1])], **chunks((1, 0, 13, 1)))  # leaves block 1 in the table of slot 1
    core.run([sequence(0, A, [0, 1, 2]), sequence(1, C, [3])], release_slots=[1], **chunks((0, 0, 13, 1), (1, 0, 1, 1)))
    core.tokens.clear()
    for cache in runner._kv_caches:
        cache[1] = torch.nan
    (output,) = core.run(join_slots=[0, 1], iterations=1)
    assert (output.slot_errors, output.slots.tolist()) == ([(0, "non-finite logits")], [1])
    core.run([sequence(2, C, [1]), sequence(0, A, [4, 6])], release_slots=[0], **chunks((2, 0, 1, 1), (0, 0, 13, 1)))
    outputs = core.run(join_slots=[0, 2], iterations=2)
    assert [output.slot_errors for output in outputs] == [[], []]
    assert core.tokens[2] == greedy(oracle, C, 3)


def test_a_plan_of_nothing_but_releases_has_one_empty_result(runner: CpuRunner) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1])], **chunks((0, 0, 13, 1)))
    (output,) = core.run(release_slots=[0])
    assert (len(output.slots), output.slot_errors, output.partial) == (0, [], False)


def test_a_refused_plan_leaves_the_slots_as_they_were(runner: CpuRunner, oracle: LlamaForCausalLM) -> None:
    core = Core(runner)
    core.run([sequence(0, A, [0, 1, 2])], **chunks((0, 0, 13, 1)))
    with pytest.raises(InvalidPlan, match="slot 1"):
        core.run(release_slots=[0], leave_slots=[1], iterations=1)
    core.run(join_slots=[0], iterations=3)
    assert core.tokens[0] == greedy(oracle, A, 4)


def test_info_tells_what_was_built(runner: CpuRunner) -> None:
    info = runner.info
    assert (info.architecture, info.dtype) == ("LlamaForCausalLM", "float32")
    assert dataclasses.astuple(info.limits) == (6, NUM_BLOCKS, BLOCK_SIZE, VOCAB_SIZE, MAX_MODEL_LEN, 64)


def test_the_kv_cache_takes_its_share_of_memory_and_no_more_than_sequences_can_use() -> None:
    shape = kv_cache.KVCacheShape(num_layers=3, num_kv_heads=2, block_size=8, head_dim=16, dtype=torch.bfloat16)
    assert shape.block_bytes == sum(cache.nbytes for cache in kv_cache.allocate_on_cpu(shape, 1))
    assert (
        kv_cache.count_blocks(
            shape, shape.block_bytes * 20 + 1, max_num_seqs=4, max_model_len=81, memory_flag="--memory-utilization"
        )
        == 20
    )
    assert (
        kv_cache.count_blocks(
            shape, shape.block_bytes * 1000, max_num_seqs=4, max_model_len=81, memory_flag="--memory-utilization"
        )
        == 4 * 11
    )
    with pytest.raises(kv_cache.UnfitSettings, match=r"--max-model-len.*--memory-utilization.*--num-blocks"):
        kv_cache.count_blocks(
            shape, shape.block_bytes * 11 - 1, max_num_seqs=4, max_model_len=81, memory_flag="--memory-utilization"
        )


def test_more_positions_than_the_model_has_are_refused(settings: ExecutorConfig) -> None:
    with pytest.raises(kv_cache.UnfitSettings, match="--max-model-len 129"):
        build_cpu_runner(dataclasses.replace(settings, max_model_len=129), ALONE)


def test_memory_is_no_more_than_the_cgroup_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_CGROUP", tmp_path)
    without_limit = kv_cache.available_memory_bytes()  # no such file: no cgroup v2
    (tmp_path / "memory.current").write_text("3000\n")
    for limit, left in {"10000": 7000, "2000": 0}.items():
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert kv_cache.available_memory_bytes() == left
    for no_limit in ("max", str(2**62)):  # the machine's own memory is the limit
        (tmp_path / "memory.max").write_text(f"{no_limit}\n")
        assert without_limit / 2 < kv_cache.available_memory_bytes() < 2**50
    assert without_limit > 7000


def test_setting_of_zero_is_not_taken_for_one_left_out(settings: ExecutorConfig) -> None:
    assert build_cpu_runner(dataclasses.replace(settings, max_model_len=0), ALONE).info.limits.max_model_len == 0
