"""From settings to a runner on the CPU: which kernels, how many threads, how large a KV cache."""

import dataclasses
import logging
import os

import torch
from torch import Tensor

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.layers.cpu import CpuOps, PanelOps
from executor_service.runner.build import LoadedModel, dtype_of, load
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.runner.cpu_steps import CpuSteps, EagerSteps, EngineSteps
from executor_service.runner.kv_cache import allocate_on_cpu, available_memory_bytes, count_blocks
from executor_service.runner.runner import RunnerInfo
from executor_service.weights.errors import UnfitSettings
from kernels.cpu.build import BuildError, library_directory
from kernels.cpu.levels import usable_levels
from kernels.cpu.library import DTYPE_FORMATS, Format, Library, load_library
from kernels.sampling import WHOLE_VOCABULARY, VocabularyShard

log = logging.getLogger(__name__)

_MAX_NUM_SEQS, _MAX_TOKENS_PER_STEP = 64, 512  # where the settings leave them open


@dataclasses.dataclass(frozen=True)
class BuiltSteps:
    """What computes, and what it was built from."""

    steps: CpuSteps
    kv_caches: list[Tensor]  # one a layer, [num_blocks, num_kv_heads, 2, block_size, head_dim]
    info: RunnerInfo
    shard: VocabularyShard  # what the logits are of


def build_cpu_runner(config: ExecutorConfig, group: RankGroup) -> CpuRunner:
    """See build_cpu_steps."""
    built = build_cpu_steps(config, group)
    return CpuRunner(built.info, built.steps, built.kv_caches, built.shard)


def build_cpu_steps(config: ExecutorConfig, group: RankGroup) -> BuiltSteps:
    """Load this rank's part of the model and make its KV cache in main memory.

    Sets the number of threads of torch, for the whole process.
    Raises: ModelError, where the model, the settings and the machine do not fit.
    """
    cores = _choose_cores(config, group.placement.local_rank, group.placement.local_size)
    library = _choose_library(config, group.placement.size)
    # PyTorch's threads spin for a while after each operation, on the cores that the library's threads need next.
    torch.set_num_threads(len(cores) if library is None else 1)
    ops = CpuOps(group.tensor_parallel()) if library is None else PanelOps(library, _weight_format(config))
    loaded = load(config, group, ops, _MAX_NUM_SEQS, _MAX_TOKENS_PER_STEP)
    shape, num_blocks = loaded.cache_shape, config.num_blocks
    if num_blocks is None:
        memory_bytes = int(available_memory_bytes() * config.memory_utilization / group.placement.local_size)
        num_blocks = group.least(
            count_blocks(shape, memory_bytes, loaded.max_num_seqs, loaded.max_model_len, "--memory-utilization")
        )
    kv_caches = allocate_on_cpu(shape, num_blocks)
    shard = WHOLE_VOCABULARY
    if group.placement.size > 1:
        shard = VocabularyShard(loaded.model.vocab_span.start, group.tensor_parallel().all_gather)
    return BuiltSteps(
        steps=_make_steps(loaded, library, kv_caches, cores),
        kv_caches=kv_caches,
        info=loaded.info(num_blocks, f"CPU, {len(cores)} threads"),
        shard=shard,
    )


def _choose_cores(config: ExecutorConfig, local_rank: int, local_size: int) -> list[int]:
    """A core for each thread; with fewer cores than threads they are given out anew."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // local_size)
    num_threads = share if config.num_threads is None else config.num_threads
    return [cores[(local_rank * share + thread) % len(cores)] for thread in range(num_threads)]


def _choose_library(config: ExecutorConfig, num_ranks: int) -> Library | None:
    """None: PyTorch computes. Raises: UnfitSettings, where the settings ask for more than the machine can do."""
    is_needed = config.weights != "auto" or config.cpu_kernels not in ("auto", "torch")
    if num_ranks > 1 or config.cpu_kernels == "torch":
        if is_needed:
            raise UnfitSettings("--weights and --cpu-kernels need the library in C, which computes on one rank only")
        return None
    levels = [level for level in usable_levels() if config.cpu_kernels in ("auto", level.name)]
    if not levels:
        raise UnfitSettings(f"this processor cannot run --cpu-kernels {config.cpu_kernels}")
    try:
        library = load_library(levels[0], library_directory(os.environ))
    except (BuildError, OSError) as error:
        if is_needed:
            raise UnfitSettings(f"the library in C, which the settings need, cannot be built: {error}") from error
        log.warning("no library in C, so PyTorch computes, at less than half the speed: %s", error)
        return None
    log.info("the library in C computes, built for %s", library.level)
    return library


def _weight_format(config: ExecutorConfig) -> Format:
    return Format.INT8 if config.weights == "int8" else DTYPE_FORMATS[dtype_of(config)]


def _make_steps(loaded: LoadedModel, library: Library | None, kv_caches: list[Tensor], cores: list[int]) -> CpuSteps:
    if library is None:
        return EagerSteps(loaded.model, kv_caches, loaded.config.block_size)
    max_tokens = max(loaded.max_tokens_per_step, loaded.max_num_seqs)
    try:
        return EngineSteps(library, loaded.model, kv_caches, max_tokens, cores)
    except ValueError as error:
        raise UnfitSettings(f"the library in C cannot run this model, use --cpu-kernels torch: {error}") from error
