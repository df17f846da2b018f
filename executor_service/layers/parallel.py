"""Linear layers and embeddings, cut over the ranks of a tensor-parallel group as in Megatron-LM (arXiv:1909.08053).

Each constructor reads its rank's part of the weights. Column-parallel layers produce a rank's own outputs, and
row-parallel layers turn them into a rank's share of a sum over ranks, so that a block of two needs one all-reduce; the
device does it together with the norm that follows: see DeviceOps.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from executor_service.layers.device import DeviceOps
from executor_service.layers.partition import HeadSplit, even_span
from executor_service.weights.checkpoint import Checkpoint, Span

_VOCAB_MULTIPLE = 4096  # so that the sampler's tiles are those of one device, whatever the number of ranks


def _alone(x: Tensor) -> Tensor:
    return x


# (x, residual, weight, eps): residual += the sum of x over ranks; its RMS norm is returned, or None, and nothing has
# changed, where the kernel does not take x. x, residual: [n, size]; weight: [size].
AllReduceNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor | None]


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """This rank's place in its group, and the group's collectives; the default is a group of one."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _alone  # sum over ranks, same shape; the argument may be overwritten
    all_reduce_norm: AllReduceNorm | None = None  # of a device that has a kernel for both
    all_gather: Callable[[Tensor], Tensor] = _alone  # [n, k], the same k on all ranks -> [n, k * ranks], in rank order
    shards_embedding: bool = False  # the embedding is cut too: less memory, one more all-reduce a step

    def span(self, size: int) -> Span:
        """This rank's part of a dimension."""
        return even_span(size, self.rank, self.size)

    def vocab_span(self, vocab_size: int) -> Span:
        """The token ids whose logits this rank computes."""
        return even_span(vocab_size, self.rank, self.size, _VOCAB_MULTIPLE)


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer is built from."""

    weights: Checkpoint
    ops: DeviceOps
    parallel: TensorParallel


class MergedColumnParallelLinear:
    """Several column-parallel layers over the same input, packed into one.

    `linear`: [n, in] -> [n, sum of the rank's parts], for the device to run behind a norm: see DeviceOps.norm_linear.
    """

    def __init__(
        self, context: LayerContext, prefix: str, parts: Mapping[str, int], in_features: int, *, bias: bool
    ) -> None:
        """parts: name under `prefix` -> out_features, in the order of the packed outputs."""
        self.linear = context.ops.linear(
            *_take_packed(
                context,
                {f"{prefix}.{name}": (size, context.parallel.span(size)) for name, size in parts.items()},
                in_features,
                bias=bias,
            )
        )


class QKVParallelLinear:
    """Query, key and value projections, cut along heads. The bias stands apart: attention adds it with its norms.

    `linear`: [n, hidden] -> [n, (heads + 2 * kv_heads) * head_dim] of this rank; `bias`: as long as its outputs, or
    None.
    """

    def __init__(
        self,
        context: LayerContext,
        prefix: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        split: HeadSplit,
        *,
        bias: bool,
    ) -> None:
        """prefix: where q_proj, k_proj and v_proj are in the checkpoint; head counts are those of the whole model."""
        query = num_heads * head_dim, split.query.times(head_dim)
        key_value = num_kv_heads * head_dim, split.key_value.times(head_dim)
        parts = {f"{prefix}.q_proj": query, f"{prefix}.k_proj": key_value, f"{prefix}.v_proj": key_value}
        weight, self.bias = _take_packed(context, parts, hidden_size, bias=bias)
        self.linear = context.ops.linear(weight, None)


def _take_packed(
    context: LayerContext, parts: Mapping[str, tuple[int, Span]], in_features: int, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The weights of several layers, one below the other, and their biases; parts: name -> out_features, the rank's."""
    take = context.weights.take
    weights = [take(f"{name}.weight", (size, in_features), span) for name, (size, span) in parts.items()]
    biases = [take(f"{name}.bias", (size,), span) for name, (size, span) in parts.items()] if bias else None
    return torch.cat(weights), torch.cat(biases) if biases else None


class RowParallelLinear:
    """A linear layer cut along its inputs; [n, inputs of this rank] -> [n, out], a share of the sum over ranks."""

    def __init__(
        self, context: LayerContext, name: str, in_features: int, out_features: int, span: Span, *, bias: bool
    ) -> None:
        """name: the layer's full name in the checkpoint; span: of the inputs."""
        weight = context.weights.take(f"{name}.weight", (out_features, in_features), span, dim=1)
        full_bias = context.weights.take(f"{name}.bias", (out_features,)) if bias else None
        # The bias must enter the sum over ranks once.
        self.linear = context.ops.linear(weight, full_bias if context.parallel.rank == 0 else None)


class Embedding:
    """Token embeddings, on every rank or cut along the vocabulary; [n] integers -> [n, hidden_size].

    `weight`: [vocab_size, hidden_size], or this rank's part of it.
    """

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int) -> None:
        """name: the layer's full name in the checkpoint."""
        parallel = context.parallel
        self._all_reduce = parallel.all_reduce
        self._is_cut = parallel.shards_embedding and parallel.size > 1
        self._span = parallel.vocab_span(vocab_size)
        span = self._span if self._is_cut else None
        self.weight = context.weights.take(f"{name}.weight", (vocab_size, hidden_size), span)

    @property
    def head_weight(self) -> Tensor:
        """The rows of the token ids whose logits this rank computes: [num_ids, hidden_size]."""
        num_ids = self._span.stop - self._span.start
        return self.weight.narrow(0, 0 if self._is_cut else self._span.start, num_ids)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids: [n] integers, below vocab_size."""
        if not self._is_cut:
            return self.weight.index_select(0, input_ids)
        rows = input_ids - self._span.start
        is_elsewhere = (rows < 0) | (rows >= self._span.length)
        embedded = self.weight.index_select(0, rows.clamp(0, self._span.length - 1))
        return self._all_reduce(embedded.masked_fill_(is_elsewhere[:, None], 0))
