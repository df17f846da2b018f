"""A runner on a GPU, in the order that leaves the KV cache all the memory that nothing else will need."""

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.layers.cuda import CudaOps
from executor_service.layers.cuda_attention import TritonAttention
from executor_service.layers.cuda_attention_libraries import (
    FLASH_ATTN_BLOCK_SIZE,
    FlashAttention,
    TorchAttention,
    has_flash_attn,
)
from executor_service.runner.build import LoadedModel, load
from executor_service.runner.gpu.buffers import DeviceBuffers
from executor_service.runner.gpu.gpu_runner import GpuRunner
from executor_service.runner.gpu.graphs import StepGraphs
from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.rings import StepRings
from executor_service.runner.gpu.special_rows import SpecialRows, SpecialSlots
from executor_service.runner.gpu.step_program import PrefillShape, StepProgram
from executor_service.runner.kv_cache import KVCacheShape, count_blocks
from executor_service.weights.errors import UnfitSettings
from kernels.gpu.decode_attention import make_workspace
from kernels.gpu.sampler_shard import Shard

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_TOKENS_PER_STEP = 8192
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_HEAD_SIZES = (64, 128)
_BACKENDS = {
    "auto": TritonAttention,  # docs/decisions/0008
    "flash-attn": FlashAttention,
    "triton": TritonAttention,
    "torch": TorchAttention,
}
_MARGIN_BYTES = 512 << 20  # for what the driver keeps of each graph

log = logging.getLogger(__name__)


def build_gpu_runner(config: ExecutorConfig, group: RankGroup) -> GpuRunner:
    """Load, try the worst step, size the cache, capture. Uses a stream of its own in the calling thread from then on.

    All ranks of the group run the same collectives here, in the same order, so that a rank which raises must end.
    Raises: ModelError, where the model, the settings and the machine do not fit.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_stream(torch.cuda.Stream(device))
    _check(config)
    start = time.monotonic()
    try:
        ops = CudaOps(device, group.tensor_parallel())
        loaded = load(config, group, ops, DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_TOKENS_PER_STEP)
    except torch.cuda.OutOfMemoryError as error:
        raise UnfitSettings(f"the weights do not fit {_name(device)}: choose a smaller model") from error
    if loaded.model.config.head_dim not in _HEAD_SIZES:
        sizes = f"heads of {loaded.model.config.head_dim}, and only {_HEAD_SIZES} run on a GPU"
        raise UnfitSettings(f"the model has {sizes}: use --device cpu")
    log.info("weights on %s after %.1f s", _name(device), time.monotonic() - start)
    try:
        runner = _build(loaded, device)
    except torch.cuda.OutOfMemoryError as error:
        blocks = "--num-blocks" if config.num_blocks is not None else "--gpu-memory-utilization"
        raise UnfitSettings(
            f"{_name(device)} has too little memory: lower {blocks}, --max-tokens-per-step or --max-num-seqs"
        ) from error
    log.info("ready after %.1f s", time.monotonic() - start)
    return runner


def _check(config: ExecutorConfig) -> None:
    if config.block_size not in _BLOCK_SIZES:
        raise UnfitSettings(f"--block-size {config.block_size} on a GPU: it must be one of {_BLOCK_SIZES}")
    if config.attention_backend == "flash-attn":
        if not has_flash_attn():
            raise UnfitSettings("--attention-backend flash-attn, but the package flash-attn cannot be imported")
        if config.block_size != FLASH_ATTN_BLOCK_SIZE:
            raise UnfitSettings(f"--attention-backend flash-attn needs --block-size {FLASH_ATTN_BLOCK_SIZE}")
        if config.dtype != "bfloat16":
            raise UnfitSettings("--attention-backend flash-attn needs --dtype bfloat16")


def _build(loaded: LoadedModel, device: torch.device) -> GpuRunner:
    config, shape, num_blocks = loaded.config, loaded.cache_shape, loaded.config.num_blocks
    shard = _make_shard(loaded)
    if num_blocks is None:
        memory_bytes = _free_bytes_in_the_worst_step(loaded, device, shard)
        num_blocks = loaded.group.least(
            count_blocks(shape, memory_bytes, loaded.max_num_seqs, loaded.max_model_len, "--gpu-memory-utilization")
        )
    buffers, rings, program = _make_program(loaded, num_blocks, device, shard)
    _run_worst_steps(loaded, program)  # once more where blocks were counted: kernels are compiled now, not at a request
    graphs = StepGraphs(program, loaded.max_num_seqs, loaded.max_tokens_per_step, loaded.max_model_len)
    if _captures(config):
        graphs.capture(SpecialRows.nobody(device))
    torch.cuda.current_stream().synchronize()
    buffers.cursor.zero_()  # until here steps ran without rows
    rings.results.zero_()
    log.info(
        "KV cache: %d blocks of %d tokens, %.1f GiB: %.1f sequences of %d tokens at once",
        num_blocks,
        config.block_size,
        num_blocks * shape.block_bytes / 2**30,
        num_blocks * config.block_size / loaded.max_model_len,
        loaded.max_model_len,
    )
    info = loaded.info(num_blocks, _name(device), tuple(graphs.decode_sizes) if _captures(config) else ())
    return GpuRunner(info, graphs, buffers, rings)


def _captures(config: ExecutorConfig) -> bool:
    return not config.enforce_eager and config.attention_backend != "torch"


def _make_shard(loaded: LoadedModel) -> Shard | None:
    """Where the ranks choose tokens together; None where this rank has all logits, or must be given them."""
    model, num_ranks = loaded.model, loaded.group.placement.size
    vocab_size, span = model.config.vocab_size, model.vocab_span.length
    memory = loaded.group.peer_memory(Shard.num_words(num_ranks, span, loaded.max_num_seqs))
    return None if memory is None else Shard.make(vocab_size, span, loaded.max_num_seqs, memory)


def _gather_logits(loaded: LoadedModel) -> Callable[[Tensor], Tensor]:
    """[n, ids of this rank] -> [n, vocab_size]."""
    span, vocab_size = loaded.model.vocab_span.length, loaded.model.config.vocab_size
    all_gather = loaded.group.tensor_parallel().all_gather
    return lambda logits: all_gather(F.pad(logits, (0, span - logits.shape[1])))[:, :vocab_size]


def _make_program(
    loaded: LoadedModel, num_blocks: int, device: torch.device, shard: Shard | None
) -> tuple[DeviceBuffers, StepRings, StepProgram]:
    config, limits = loaded.config, loaded.limits(num_blocks)
    buffers = DeviceBuffers(limits, -(-loaded.max_model_len // config.block_size), device)
    rings = StepRings(loaded.max_num_seqs)
    attention = loaded.model.attention_config(config.block_size)
    workspace = make_workspace(attention.num_heads, attention.num_kv_heads, attention.head_dim, device)
    kind = _BACKENDS[config.attention_backend]
    backend = kind(attention, buffers.block_tables, loaded.max_model_len, workspace)
    kv_caches = _allocate(loaded.cache_shape, num_blocks, device)
    arguments = loaded.model, kv_caches, backend, buffers, rings, config.block_size
    if loaded.group.placement.size > 1:
        return buffers, rings, StepProgram(*arguments, shard=shard, gather_logits=_gather_logits(loaded))
    return buffers, rings, StepProgram(*arguments)


def _allocate(shape: KVCacheShape, num_blocks: int, device: torch.device) -> list[torch.Tensor]:
    """Zeroed caches, one a layer: [num_blocks, num_kv_heads, 2, block_size, head_dim]."""
    size = (num_blocks, shape.num_kv_heads, 2, shape.block_size, shape.head_dim)
    return [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]


def _run_worst_steps(loaded: LoadedModel, program: StepProgram) -> None:
    """The largest prefills and the largest decode step, without and with special rows, of no sequence."""
    tokens, max_seqs, device = loaded.max_tokens_per_step, loaded.max_num_seqs, torch.device("cuda")
    seqs = min(max_seqs, tokens)
    nobody = SpecialRows.nobody(device)
    for has_cached in (False, True):
        shape = PrefillShape(tokens, seqs, seqs, tokens, has_cached)
        program.prefill(shape)
    program.prefill_and_report(shape, PromptRows.nobody(tokens, max_seqs, device))
    program.sample_special(seqs, nobody, is_decode=False)
    for samples in (True, False):
        program.decode(max_seqs, loaded.max_model_len, samples=samples)
    program.sample_special(max_seqs, nobody, is_decode=True)
    torch.cuda.current_stream().synchronize()


def _free_bytes_in_the_worst_step(loaded: LoadedModel, device: torch.device, shard: Shard | None) -> int:
    """Bytes that the settings leave to the KV cache, while the largest steps have all the memory they need.

    What the steps needed stays reserved by PyTorch's allocator, which hands it out again. What sequences may ask for
    beside it, above all counts of their tokens, is allocated when they do, and left free here.
    """
    _, _, program = _make_program(loaded, 1, device, shard)
    graphs_bytes = 0
    if _captures(loaded.config):
        free_before, _ = torch.cuda.mem_get_info(device)
        trial = StepGraphs(program, loaded.max_num_seqs, loaded.max_tokens_per_step, loaded.max_model_len)
        trial.capture_largest()
        torch.cuda.current_stream().synchronize()
        graphs_bytes = free_before - torch.cuda.mem_get_info(device)[0]
        del trial
        torch.cuda.empty_cache()
    _run_worst_steps(loaded, program)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    kept_bytes = total_bytes - free_bytes + graphs_bytes + _MARGIN_BYTES
    kept_bytes += SpecialSlots.most_bytes(loaded.max_num_seqs, loaded.model.config.vocab_size)
    return int(total_bytes * loaded.config.gpu_memory_utilization) - kept_bytes


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
