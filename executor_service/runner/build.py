"""From settings to a runner: which device, and what both kinds of runner need to know of a model."""

import dataclasses
from pathlib import Path

import torch

from executor_service import weights
from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.layers.device import DeviceOps
from executor_service.models import CausalLM, load_model
from executor_service.plan import Limits
from executor_service.runner.kv_cache import KVCacheShape
from executor_service.runner.runner import Runner, RunnerInfo
from executor_service.weights.errors import UnfitSettings
from servicekit.digest import model_digest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(config: ExecutorConfig) -> torch.dtype:
    """Of weights and KV cache."""
    return _DTYPES[config.dtype]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A rank's part of a model on its device, and the sizes that the settings give it."""

    config: ExecutorConfig
    group: RankGroup
    model: CausalLM
    dtype: torch.dtype
    max_model_len: int  # tokens
    max_num_seqs: int
    max_tokens_per_step: int

    @property
    def cache_shape(self) -> KVCacheShape:
        """What a KV block holds on this rank."""
        model, attention = self.model.config, self.model.attention_config(self.config.block_size)
        return KVCacheShape(
            model.num_layers, attention.num_kv_heads, self.config.block_size, model.head_dim, self.dtype
        )

    def limits(self, num_blocks: int) -> Limits:
        """What plans are checked against."""
        return Limits(
            num_slots=self.max_num_seqs,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            vocab_size=self.model.config.vocab_size,
            max_model_len=self.max_model_len,
            max_tokens_per_step=self.max_tokens_per_step,
        )

    def info(self, num_blocks: int, device: str, graph_batch_sizes: tuple[int, ...] = ()) -> RunnerInfo:
        """What the core needs to know; rank 0 alone tells it the digest of the weights. Raises: InvalidCheckpoint."""
        directory, placement = Path(self.config.model), self.group.placement
        return RunnerInfo(
            architecture=self.model.config.architecture,
            model_digest=model_digest(directory),
            weights_digest=weights.digest(directory) if placement.rank == 0 else "",
            dtype=self.config.dtype,
            device=device,
            limits=self.limits(num_blocks),
            graph_batch_sizes=graph_batch_sizes,
            tensor_parallel_size=placement.size,
        )


def load(
    config: ExecutorConfig, group: RankGroup, ops: DeviceOps, max_num_seqs: int, max_tokens_per_step: int
) -> LoadedModel:
    """Load the model; the last two are what holds where the settings leave them open. Raises: ModelError."""
    dtype = dtype_of(config)
    group.require_same("settings", dataclasses.replace(config, model=model_digest(Path(config.model)), listen=""))
    parallel = dataclasses.replace(group.tensor_parallel(), shards_embedding=config.shard_embedding)
    model = load_model(Path(config.model), dtype=dtype, device_ops=ops, parallel=parallel)
    limit = model.config.max_position_embeddings
    max_model_len = limit if config.max_model_len is None else config.max_model_len
    if max_model_len > limit:
        raise UnfitSettings(f"--max-model-len {max_model_len} is more than the {limit} positions of the model")
    return LoadedModel(
        config=config,
        group=group,
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs or max_num_seqs,
        max_tokens_per_step=config.max_tokens_per_step or max_tokens_per_step,
    )


def build_runner(config: ExecutorConfig, placement: Placement | None = None) -> Runner:
    """Load a rank's part of the model (None: all of it) and make its KV cache, on the device that the settings name.

    Blocks until all ranks do. Raises: ModelError, where the model, the settings and the machine do not fit.
    """
    placement = placement or Placement()
    if placement.size != config.tensor_parallel_size:
        raise UnfitSettings(f"--tensor-parallel-size {config.tensor_parallel_size}, but {placement.size} ranks")
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        from executor_service.runner.cpu_build import build_cpu_runner

        return build_cpu_runner(config, RankGroup(placement, torch.device("cpu")))
    if config.weights != "auto":
        raise UnfitSettings(f"--weights {config.weights} is for the CPU")
    num_gpus = torch.cuda.device_count()
    if placement.local_size > num_gpus:
        raise UnfitSettings(f"{placement.local_size} ranks need as many GPUs, and PyTorch finds {num_gpus}")
    from executor_service.runner.gpu.build import build_gpu_runner  # needs triton, which a CPU does without

    device = torch.device("cuda", placement.local_rank)
    torch.cuda.set_device(device)
    return build_gpu_runner(config, RankGroup(placement, device))
