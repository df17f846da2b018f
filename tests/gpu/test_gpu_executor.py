"""The whole executor on a GPU, in process: transformers as the oracle, graphs against eager launches, races."""

import dataclasses
import queue
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.layers.cuda import CudaOps
from executor_service.layers.cuda_attention import PrefillStep, TritonAttention
from executor_service.layers.cuda_attention_libraries import has_flash_attn
from executor_service.plan import NewSequence, Plan, Sampling
from executor_service.runner.build import load
from executor_service.runner.gpu.build import build_gpu_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner
from executor_service.runner.runner import Pending
from executor_service.weights.errors import UnfitSettings
from kernels.gpu.decode_attention import make_workspace

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=99, choice_index=0)
NEAR_TIE = 1e-3  # logits
MODELS = {
    "qwen3-128": (Qwen3Config, Qwen3ForCausalLM, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen2-64": (Qwen2Config, Qwen2ForCausalLM, {"num_attention_heads": 6, "num_key_value_heads": 2}),
}
ALONE = RankGroup(Placement(), torch.device("cuda"))
SETTINGS = ExecutorConfig(
    model="", dtype="float32", num_blocks=160, max_num_seqs=40, max_tokens_per_step=2048, max_model_len=512
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config_class, model_class, changes = MODELS[request.param]
    config = config_class(
        vocab_size=5000, hidden_size=384, intermediate_size=768, num_hidden_layers=4, max_position_embeddings=1024,
        initializer_range=0.06, bos_token_id=None, eos_token_id=None, pad_token_id=None, **changes,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    model_class(config).save_pretrained(path)
    return path


def theirs(directory: Path, dtype: torch.dtype) -> Any:
    classes = {name: model_class for name, (_, model_class, _) in MODELS.items()}
    name = next(name for name in classes if directory.name.startswith(name))
    return classes[name].from_pretrained(directory, dtype=dtype).cuda().eval()


def column(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def plan(step_id: int, new: Sequence[NewSequence] = (), iterations: int = 0, **columns: Sequence[int]) -> Plan:
    names = ("release_slots", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts",
             "prefill_samples", "join_slots", "leave_slots")  # fmt: skip
    arrays = {name: column(columns.get(name, ())) for name in names}
    return Plan(step_id=step_id, new_sequences=list(new), iterations=iterations, **arrays)


def batch_plans(prompts: Sequence[list[int]], steps: int, sampling: Sampling, block_size: int) -> list[Plan]:
    """Every prompt whole in one plan, then `steps` decode steps in two plans."""
    num_blocks = [-(-(len(prompt) + steps + 1) // block_size) for prompt in prompts]
    firsts = [sum(num_blocks[:i]) for i in range(len(prompts))]
    new = [
        NewSequence(
            slot, column(prompt), len(prompt), 0, column(range(firsts[slot], firsts[slot] + num_blocks[slot])),
            dataclasses.replace(sampling, choice_index=slot), column([]), len(prompt) + steps + 1,
        )
        for slot, prompt in enumerate(prompts)
    ]  # fmt: skip
    slots = range(len(prompts))
    prefill = plan(
        1, new, prefill_slots=slots, prefill_starts=[0] * len(prompts), prefill_samples=[1] * len(prompts),
        prefill_counts=[len(prompt) for prompt in prompts],
    )  # fmt: skip
    return [prefill, plan(2, [], 1, join_slots=slots), plan(3, [], steps - 1)]


def run(runner: GpuRunner, plans: Sequence[Plan], num_seqs: int) -> list[list[int]]:
    """Tokens of each slot. Every plan is launched before a result is waited for, so that host and device overlap."""
    tokens: list[list[int]] = [[] for _ in range(num_seqs)]
    launched: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()

    def collect() -> None:
        while (pending := launched.get()) is not None:
            output = pending.wait()
            assert not output.slot_errors
            for slot, token in zip(output.slots.tolist(), output.token_ids.tolist(), strict=True):
                tokens[slot].append(token)

    with ThreadPoolExecutor(1) as thread:
        collecting = thread.submit(collect)
        for one in plans:
            for pending in runner.execute(one):
                launched.put(pending)
        launched.put(None)
        collecting.result()
    return tokens


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(5000), k=rng.randint(1, longest)) for _ in range(count)]


@pytest.fixture(scope="module")
def runner(directory: Path) -> GpuRunner:
    return build_gpu_runner(dataclasses.replace(SETTINGS, model=str(directory)), ALONE)


@torch.inference_mode()
def assert_greedy(model: Any, prompt: list[int], tokens: list[int]) -> int:
    """Each token is transformers' best by its own logits for what came before; returns the near ties."""
    logits = model(torch.tensor([prompt + tokens], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(-1).values
    gaps = best - logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    assert gaps.max() < NEAR_TIE
    return int((gaps > 0).sum())


def test_greedy_tokens_in_float32_are_those_of_transformers(runner: GpuRunner, directory: Path, tell: Any) -> None:
    model, prompts = theirs(directory, torch.float32), random_prompts(25, 60)
    runner.reset()
    tokens = run(runner, batch_plans(prompts, 40, GREEDY, 64), len(prompts))
    ties = sum(assert_greedy(model, prompt, ours) for prompt, ours in zip(prompts, tokens, strict=True))
    tell(f"GPU, {directory.name}: {ties} near ties in 25 x 41 tokens")


def backends() -> list[str]:
    return ["torch", "triton", *(["flash-attn"] if torch.cuda.is_available() and has_flash_attn() else [])]


@pytest.mark.parametrize("backend", backends())
def test_every_attention_backend_follows_float32_as_closely_as_transformers_in_bfloat16(
    backend: str, directory: Path
) -> None:
    exact, rounded = theirs(directory, torch.float32), theirs(directory, torch.bfloat16)
    block_size = 256 if backend == "flash-attn" else 64
    config = dataclasses.replace(
        SETTINGS, model=str(directory), dtype="bfloat16", attention_backend=backend, block_size=block_size
    )
    runner = build_gpu_runner(config, ALONE)
    prompts = random_prompts(12, 80, seed=3)
    tokens = run(runner, batch_plans(prompts, 24, GREEDY, block_size), len(prompts))
    losses: list[tuple[float, float]] = []
    with torch.inference_mode():
        for prompt, ours in zip(prompts, tokens, strict=True):
            ids = torch.tensor([prompt + ours], device="cuda")
            reference = exact(ids).logits[0, len(prompt) - 1 : -1].float()
            best = reference.max(-1).values
            mine = best - reference.gather(1, torch.tensor(ours, device="cuda")[:, None])[:, 0]
            other = rounded(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
            losses.append((mine.mean().item(), (best - reference.gather(1, other[:, None])[:, 0]).mean().item()))
    # What greedy tokens lose by rounding, in logits: ours no more than transformers'.
    ours_mean, theirs_mean = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    assert ours_mean < 1.5 * theirs_mean + 1e-3


@torch.inference_mode()
def test_prefill_logits_in_bfloat16_are_as_close_to_float32_as_those_of_transformers(directory: Path) -> None:
    device = torch.device("cuda")
    config = dataclasses.replace(SETTINGS, model=str(directory), dtype="bfloat16")
    loaded = load(config, ALONE, CudaOps(device), 1, 1)
    attention = loaded.model.attention_config(64)
    tables = torch.arange(8, dtype=torch.int32, device=device)[None].flip(1).contiguous()
    workspace = make_workspace(attention.num_heads, attention.num_kv_heads, attention.head_dim, device)
    backend = TritonAttention(attention, tables, 512, workspace)
    n = 300
    positions = torch.arange(n, dtype=torch.int32, device=device)
    slot_mapping = tables[0, positions // 64] * 64 + positions % 64
    size = (8, attention.num_kv_heads, 2, 64, attention.head_dim)
    caches = [torch.full(size, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(4)]
    ids = torch.tensor(random_prompts(1, 1, seed=5)[0] + random.Random(4).choices(range(5000), k=n - 1), device=device)
    step = PrefillStep(
        positions,
        slot_mapping.int(),
        column_tensor([0, n]),
        column_tensor([n]),
        column_tensor([0]),
        n,
        has_cached=False,
    )
    hidden = loaded.model.forward(ids, caches, backend.begin_prefill(step))
    ours = loaded.model.compute_logits(hidden).float()
    exact = theirs(directory, torch.float32)(ids[None]).logits[0]
    rounded = theirs(directory, torch.bfloat16)(ids[None]).logits[0].float()
    assert (ours - exact).square().mean() < 1.5 * (rounded - exact).square().mean()


def column_tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_gives_the_bits_of_eager_launches_at_the_same_padded_batch(dtype: str, directory: Path) -> None:
    config = dataclasses.replace(SETTINGS, model=str(directory), dtype=dtype)
    for count in (1, 5, 23):
        prompts = random_prompts(count, 30, seed=count)
        plans = batch_plans(prompts, 20, SAMPLED, 64)
        results = []
        for eager in (False, True):
            runner = build_gpu_runner(dataclasses.replace(config, enforce_eager=eager), ALONE)
            tokens = run(runner, plans, count)
            results.append((tokens, runner.rings.results[1:21].clone()))
        assert results[0][0] == results[1][0]
        layout = runner.rings.layout
        for index in range(3):  # tokens, reasons, and the bits of log-probabilities
            graph, eager = (ring[:, layout.result(index)][:, :count] for _, ring in results)
            assert torch.equal(graph, eager)


def test_a_hundred_repeats_give_the_same_bits(runner: GpuRunner) -> None:
    prompts = random_prompts(33, 60, seed=7)
    plans = batch_plans(prompts, 6, SAMPLED, 64)
    first: tuple[list[list[int]], torch.Tensor] | None = None
    layout = runner.rings.layout
    for _ in range(100):
        runner.reset()
        start = runner.rings.num_launched
        tokens = run(runner, plans, len(prompts))
        steps = [step % len(runner.rings.results) for step in range(start, start + 7)]
        bits = runner.rings.results[steps][:, layout.result(2)][:, : len(prompts)].clone()
        first = first or (tokens, bits)
        assert tokens == first[0]
        assert torch.equal(bits, first[1])


def test_a_ring_that_wraps_several_times_loses_no_step(runner: GpuRunner) -> None:
    prompts = random_prompts(3, 20, seed=9)
    runner.reset()
    longest = 512 - 21
    tokens = run(runner, batch_plans(prompts, longest - 1, GREEDY, 64), len(prompts))
    assert [len(one) for one in tokens] == [longest] * 3
    runner.reset()
    assert run(runner, batch_plans(prompts, longest - 1, GREEDY, 64), len(prompts)) == tokens


def test_a_steady_decode_step_allocates_nothing_on_the_device(runner: GpuRunner) -> None:
    prompts, num_warm, num_steady = random_prompts(8, 40, seed=13), 20, 100
    prefill, join, _ = batch_plans(prompts, 1 + num_warm + num_steady, SAMPLED, 64)
    assert runner.info.graph_batch_sizes, "the steps replay graphs"
    runner.reset()
    run(runner, [prefill, join, plan(3, [], num_warm)], len(prompts))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    tokens = run(runner, [plan(3 + num_warm, [], num_steady)], len(prompts))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert [len(one) for one in tokens] == [num_steady] * len(prompts)


def test_prefills_in_quick_succession_each_find_their_own_columns(runner: GpuRunner) -> None:
    prompts = random_prompts(30, 40, seed=11)
    runner.reset()
    together = run(runner, batch_plans(prompts, 2, GREEDY, 64)[:1], len(prompts))
    runner.reset()
    whole = batch_plans(prompts, 2, GREEDY, 64)[0]
    one_by_one = [
        plan(
            slot + 1, [whole.new_sequences[slot]], prefill_slots=[slot], prefill_starts=[0],
            prefill_counts=[len(prompts[slot])], prefill_samples=[1],
        )
        for slot in range(len(prompts))
    ]  # fmt: skip
    assert run(runner, one_by_one, len(prompts)) == together


def test_too_little_memory_is_refused_with_the_flag_to_change(directory: Path) -> None:
    config = dataclasses.replace(SETTINGS, model=str(directory), num_blocks=None, gpu_memory_utilization=0.01)
    with pytest.raises(UnfitSettings, match="--gpu-memory-utilization"):
        build_gpu_runner(config, ALONE)
