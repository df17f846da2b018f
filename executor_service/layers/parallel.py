"""Linear layers and embeddings, cut over the ranks of a tensor-parallel group as in Megatron-LM (arXiv:1909.08053).

Each constructor reads its rank's part of the weights. Column-parallel layers produce a rank's own outputs, and
row-parallel layers take them and sum over ranks, so that a block of two needs one all-reduce.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from executor_service.layers.device import DeviceOps
from executor_service.weights.checkpoint import Checkpoint, Shard


def _alone(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """This rank's place in its group, and the group's collectives; the default is a group of one."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _alone  # sum over ranks, same shape
    all_gather: Callable[[Tensor], Tensor] = _alone  # [n, size of a rank] -> [n, sum of sizes], in rank order

    def shard(self, dim: int) -> Shard:
        """This rank's equal part along `dim`."""
        return Shard(dim, self.rank, self.size)


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer is built from."""

    weights: Checkpoint
    ops: DeviceOps
    parallel: TensorParallel


class MergedColumnParallelLinear:
    """Several column-parallel layers over the same input, packed into one.

    `linear`: [n, in] -> [n, sum of parts / ranks], for the device to run behind a norm: see DeviceOps.norm_linear.
    """

    def __init__(
        self, context: LayerContext, prefix: str, parts: Mapping[str, int], in_features: int, *, bias: bool
    ) -> None:
        """parts: name under `prefix` -> out_features, in the order of the packed outputs."""
        names = [f"{prefix}.{part}" for part in parts]
        sizes = list(parts.values())
        take, shard = context.weights.take, context.parallel.shard(0)
        weight = torch.cat(
            [take(f"{name}.weight", (size, in_features), shard) for name, size in zip(names, sizes, strict=True)]
        )
        packed_bias = None
        if bias:
            packed_bias = torch.cat([take(f"{name}.bias", (n,), shard) for name, n in zip(names, sizes, strict=True)])
        self.linear = context.ops.linear(weight, packed_bias)


class QKVParallelLinear:
    """Query, key and value projections, cut along heads. The bias stands apart: attention adds it with its norms.

    `linear`: [n, hidden] -> [n, (heads + 2 * kv_heads) * head_dim / ranks]; `bias`: as long as its outputs, or None.
    """

    def __init__(
        self,
        context: LayerContext,
        prefix: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
    ) -> None:
        """prefix: where q_proj, k_proj and v_proj are in the checkpoint; head counts are those of the whole model."""
        sizes = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        take, shard = context.weights.take, context.parallel.shard(0)
        weights = [take(f"{prefix}.{name}.weight", (size, hidden_size), shard) for name, size in sizes.items()]
        self.linear = context.ops.linear(torch.cat(weights), None)
        self.bias: Tensor | None = None
        if bias:
            self.bias = torch.cat([take(f"{prefix}.{name}.bias", (size,), shard) for name, size in sizes.items()])


class RowParallelLinear:
    """A linear layer cut along its inputs; [n, in / ranks] -> [n, out], summed over ranks."""

    def __init__(self, context: LayerContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        """name: the layer's full name in the checkpoint."""
        parallel = context.parallel
        weight = context.weights.take(f"{name}.weight", (out_features, in_features), parallel.shard(1))
        full_bias = context.weights.take(f"{name}.bias", (out_features,)) if bias else None
        # The bias must enter the sum over ranks once.
        self._linear = context.ops.linear(weight, full_bias if parallel.rank == 0 else None)
        self._all_reduce = parallel.all_reduce

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in_features / ranks]."""
        return self._all_reduce(self._linear(x))


class VocabParallelEmbedding:
    """Token embeddings, cut along the vocabulary; [n] integers -> [n, hidden_size]."""

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int) -> None:
        """name: the layer's full name in the checkpoint."""
        self._parallel = context.parallel
        weight = context.weights.take(f"{name}.weight", (vocab_size, hidden_size), self._parallel.shard(0))
        self.weight = weight  # [vocab_size / ranks, hidden_size]

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids: [n] integers, below vocab_size."""
        if self._parallel.size == 1:
            return self.weight.index_select(0, input_ids)
        num_rows = len(self.weight)
        rows = input_ids - self._parallel.rank * num_rows
        is_elsewhere = (rows < 0) | (rows >= num_rows)
        embedded = self.weight.index_select(0, rows.clamp(0, num_rows - 1))
        return self._parallel.all_reduce(embedded.masked_fill_(is_elsewhere[:, None], 0))


class ParallelLMHead:
    """The projection to the vocabulary, cut along it.

    `linear`: [n, hidden_size] -> [n, vocab_size / ranks]; `gather` makes the whole rows of it.
    """

    def __init__(self, context: LayerContext, weight: Tensor) -> None:
        """weight: this rank's [vocab_size / ranks, hidden_size]."""
        self.linear = context.ops.linear(weight, None)
        self.gather = context.parallel.all_gather
