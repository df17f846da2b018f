"""The GPU's runner through real plans against the CPU's, on the same tiny weights in float32: equal tokens.

Without a GPU every kernel is interpreted and nothing is captured.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.layers.cuda import CudaOps
from executor_service.layers.cuda_attention import TritonAttention
from executor_service.plan import InvalidPlan, NewSequence, Plan, Sampling
from executor_service.runner.build import load
from executor_service.runner.cpu_build import build_cpu_runner
from executor_service.runner.gpu import buffers as gpu_buffers
from executor_service.runner.gpu import gpu_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner
from executor_service.runner.gpu.graphs import StepGraphs, decode_batch_sizes
from executor_service.runner.gpu.rings import StepRings
from executor_service.runner.gpu.step_program import StepProgram
from executor_service.runner.runner import Runner, StepOutput
from kernels.gpu.decode_attention import make_workspace

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
SEEDED = Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, seed=2**63 + 5, choice_index=1)
NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN, VOCAB_SIZE = 4, 24, 16, 64, 160


class _NoEvent:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "Event", _NoEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: _NoEvent())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ExecutorConfig:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, attention_bias=True,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny-qwen3")
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    return ExecutorConfig(
        model=str(directory), dtype="float32", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_num_seqs=NUM_SLOTS,
        max_tokens_per_step=64, max_model_len=MAX_MODEL_LEN, num_threads=1,
    )  # fmt: skip


@pytest.fixture
def runner(settings: ExecutorConfig, device: torch.device) -> GpuRunner:
    loaded = load(settings, RankGroup(Placement(), device), CudaOps(device), 1, 1)
    limits = loaded.limits(NUM_BLOCKS)
    buffers = gpu_buffers.DeviceBuffers(limits, MAX_MODEL_LEN // BLOCK_SIZE, device)
    rings = StepRings(NUM_SLOTS)
    shape = loaded.cache_shape
    size = (NUM_BLOCKS, shape.num_kv_heads, 2, BLOCK_SIZE, shape.head_dim)
    # Whatever lies in a block that nobody wrote must not be read.
    caches = [torch.full(size, torch.nan, device=device) for _ in range(shape.num_layers)]
    attention = loaded.model.attention_config(BLOCK_SIZE)
    workspace = make_workspace(attention.num_heads, attention.num_kv_heads, attention.head_dim, device, num_programs=3)
    backend = TritonAttention(attention, buffers.block_tables, MAX_MODEL_LEN, workspace)
    program = StepProgram(loaded.model, caches, backend, buffers, rings, BLOCK_SIZE)
    graphs = StepGraphs(program, NUM_SLOTS, limits.max_tokens_per_step, MAX_MODEL_LEN)
    return GpuRunner(loaded.info(NUM_BLOCKS, "test"), graphs, buffers, rings)


@pytest.fixture
def oracle(settings: ExecutorConfig) -> Iterator[Runner]:
    before = torch.get_num_threads()
    yield build_cpu_runner(settings, RankGroup(Placement(), torch.device("cpu")))
    torch.set_num_threads(before)


def column(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def sequence(slot: int, tokens: Sequence[int], blocks: Sequence[int], **changes: Any) -> NewSequence:
    values = {"sampling": GREEDY, "stop_token_ids": column([]), "max_total_tokens": MAX_MODEL_LEN} | changes
    cached = values.pop("num_cached_tokens", 0)
    return NewSequence(slot, column(tokens), len(tokens), cached, column(blocks), **values)


def plan(step_id: int, new: Sequence[NewSequence] = (), iterations: int = 0, **columns: Sequence[int]) -> Plan:
    names = ("release_slots", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts",
             "prefill_samples", "join_slots", "leave_slots", "mask_slots")  # fmt: skip
    return Plan(
        step_id=step_id, new_sequences=list(new), iterations=iterations,
        **{name: column(columns.get(name, ())) for name in names},
    )  # fmt: skip


def run(runner: Runner, plans: Sequence[Plan]) -> list[StepOutput]:
    return [pending.wait() for one in plans for pending in runner.execute(one)]


def plain(outputs: Sequence[StepOutput]) -> list[tuple[Any, ...]]:
    return [
        (o.step_id, o.partial, o.slots.tolist(), o.token_ids.tolist(), o.finish_reasons.tolist(), o.slot_errors)
        for o in outputs
    ]


def chunk(slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], samples: Sequence[int]) -> dict[str, Any]:
    return {"prefill_slots": slots, "prefill_starts": starts, "prefill_counts": counts, "prefill_samples": samples}


PROMPTS = [[(7 * i + 3 * s) % 150 for i in range(n)] for s, n in enumerate([5, 21, 16])]


def test_ragged_prompts_chunks_joins_appends_and_releases_give_the_cpus_tokens(
    runner: GpuRunner, oracle: Runner
) -> None:
    plans = [
        plan(1, [sequence(0, PROMPTS[0], [9]), sequence(1, PROMPTS[1], [3, 7], sampling=SEEDED)],
             **chunk([0, 1], [0, 0], [5, 10], [1, 0])),
        plan(2, [sequence(2, PROMPTS[2], [4])], 1, **chunk([1, 2], [10, 0], [11, 16], [1, 1]), join_slots=[0]),
        plan(3, [], 3, join_slots=[1, 2], append_slots=[2], append_blocks=[5]),
        plan(4, [], 0),
        plan(6, [], 8, leave_slots=[2], append_slots=[0], append_blocks=[11]),
        plan(15, [sequence(0, PROMPTS[2], [6])], 2, release_slots=[0], join_slots=[2],
             append_slots=[1], append_blocks=[12], **chunk([0], [0], [16], [1])),
    ]  # fmt: skip
    # Step 4 of plan 3 to 5, and so on: the runners take step ids as they come.
    plans[3] = dataclasses.replace(plans[3], step_id=6)
    plans[4] = dataclasses.replace(plans[4], step_id=7)
    plans[5] = dataclasses.replace(plans[5], step_id=16, iterations=1)
    expected = plain(run(oracle, plans))
    assert sum(len(tokens) for _, _, _, tokens, _, _ in expected) > 25
    assert plain(run(runner, plans)) == expected


def test_a_cached_prefix_is_read_from_its_blocks(runner: GpuRunner, oracle: Runner) -> None:
    plans = [
        plan(1, [sequence(0, PROMPTS[1], [3, 7])], **chunk([0], [0], [21], [1])),
        plan(2, [sequence(1, PROMPTS[1], [3, 8], num_cached_tokens=16)], **chunk([1], [16], [5], [1])),
        plan(3, [], 4, join_slots=[0, 1]),
    ]
    expected = plain(run(oracle, plans))
    assert plain(run(runner, plans)) == expected


def test_stop_tokens_and_lengths_end_a_sequence_on_the_device(runner: GpuRunner, oracle: Runner) -> None:
    first = [plan(1, [sequence(0, PROMPTS[0], [1])], **chunk([0], [0], [5], [1])), plan(2, [], 5, join_slots=[0])]
    tokens = [output.token_ids[0] for output in run(oracle, first)]
    stop = next(token for token in tokens[1:] if token != tokens[0])
    oracle.reset()
    plans = [
        plan(1, [sequence(0, PROMPTS[0], [1], stop_token_ids=column([150, stop])),
                 sequence(1, PROMPTS[0], [2], max_total_tokens=8)], **chunk([0, 1], [0, 0], [5, 5], [1, 1])),
        plan(2, [], 5, join_slots=[0, 1]),
    ]  # fmt: skip
    outputs = run(runner, plans)
    assert plain(outputs) == plain(run(oracle, plans))
    assert {reason for output in outputs for reason in output.finish_reasons.tolist()} == {0, 1, 2}


def test_a_reset_forgets_every_slot(runner: GpuRunner, oracle: Runner) -> None:
    plans = [
        plan(1, [sequence(0, PROMPTS[0], [1])], **chunk([0], [0], [5], [1])),
        plan(2, [], 2, join_slots=[0]),
    ]
    first = plain(run(runner, plans))
    runner.reset()
    assert plain(run(runner, plans)) == first == plain(run(oracle, plans))


def test_a_slot_without_finite_logits_fails_alone_and_its_blocks_harm_nobody(runner: GpuRunner, oracle: Runner) -> None:
    """Its blocks hold NaN afterwards; the next holder of them must not see it."""
    good = [plan(1, [sequence(1, PROMPTS[0], [2])], **chunk([1], [0], [5], [1])), plan(2, [], 2, join_slots=[1])]
    expected = [o.token_ids.tolist() for o in run(oracle, good)]
    embedding = runner._graphs._program._model._embedding.weight
    spoiled = embedding[149].clone()
    embedding[149] = torch.nan
    outputs = run(runner, [
        plan(1, [sequence(0, [149] * 9, [1]), sequence(1, PROMPTS[0], [2])], **chunk([0, 1], [0, 0], [9, 5], [1, 1])),
        plan(2, [], 2, join_slots=[0, 1]),
    ])  # fmt: skip
    assert [o.slot_errors for o in outputs] == [[(0, "non-finite logits")], [], []]
    assert [o.slots.tolist() for o in outputs] == [[1], [1], [1]]
    assert [o.token_ids.tolist() for o in outputs] == expected
    embedding[149] = spoiled
    oracle.reset()
    after = [
        plan(4, [sequence(0, PROMPTS[0], [1])], release_slots=[0, 1], **chunk([0], [0], [5], [1])),
        plan(5, [], 2, join_slots=[0]),
    ]
    assert [o.token_ids.tolist() for o in run(runner, after)] == expected


def test_a_plan_that_is_left_in_the_middle_is_forgotten_by_a_reset(runner: GpuRunner, oracle: Runner) -> None:
    plans = [plan(1, [sequence(0, PROMPTS[0], [1])], **chunk([0], [0], [5], [1])), plan(2, [], 6, join_slots=[0])]
    expected = plain(run(oracle, plans))
    first, *_ = runner.execute(plans[0])
    left = runner.execute(plans[1])
    pending = [first, next(left), next(left)]
    del left
    runner.reset()
    assert plain([one.wait() for one in pending]) == expected[:3]
    assert plain(run(runner, plans)) == expected


def test_more_stop_tokens_than_the_table_holds_are_refused(runner: GpuRunner) -> None:
    many = column(range(gpu_buffers.MAX_STOP_TOKEN_IDS + 1))
    with pytest.raises(InvalidPlan, match="slot 0: more than"):
        list(runner.execute(plan(1, [sequence(0, [1], [0], stop_token_ids=many)])))


def test_more_appended_blocks_than_an_entry_holds_reach_the_tables(
    runner: GpuRunner, oracle: Runner, monkeypatch
) -> None:
    monkeypatch.setattr(runner.rings, "layout", dataclasses.replace(runner.rings.layout, max_appends=1))
    appended: list[int] = []
    monkeypatch.setattr(gpu_runner.torch, "from_numpy", _counting(appended, torch.from_numpy))
    plans = [
        plan(
            1, [sequence(0, PROMPTS[2], [1]), sequence(1, PROMPTS[2], [2])], **chunk([0, 1], [0, 0], [16, 16], [1, 1])
        ),
        plan(2, [], 4, join_slots=[0, 1], append_slots=[0, 1], append_blocks=[5, 6]),
    ]
    assert plain(run(runner, plans)) == plain(run(oracle, plans))
    assert appended


def _counting(calls: list[int], function: Any) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counted


def test_batch_sizes_ascend_to_the_largest() -> None:
    assert decode_batch_sizes(1) == [1]
    assert decode_batch_sizes(4) == [1, 2, 4]
    assert decode_batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_batch_sizes(256)[-3:] == [240, 248, 256]
