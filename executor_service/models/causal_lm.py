"""The decoder that Llama, Qwen2 and Qwen3 share; a model's own file says which of its parts are switched on."""

import abc
from typing import Any

import torch
from torch import Tensor

from executor_service.layers.attention import Attend
from executor_service.layers.device import DeviceOps
from executor_service.layers.parallel import (
    LayerContext,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from executor_service.layers.rotary import RotaryEmbedding
from executor_service.models.config import ModelConfig
from executor_service.weights.checkpoint import Checkpoint
from executor_service.weights.errors import UnsupportedModel


class _Attention:
    """Grouped-query attention of one layer."""

    def __init__(self, context: LayerContext, prefix: str, config: ModelConfig) -> None:
        self._ops = context.ops
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._num_heads = config.num_heads // context.parallel.size
        self._num_kv_heads = config.num_kv_heads // context.parallel.size
        self._qkv = QKVParallelLinear(
            context,
            prefix,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.qkv_bias,
        )
        self._qk_norm: Tensor | None = None  # [heads + kv_heads, head_dim]: queries and keys are normalized at once
        if config.qk_norm:
            q_norm, k_norm = (
                context.weights.take(f"{prefix}.{name}.weight", (config.head_dim,)).to(context.ops.device)
                for name in ("q_norm", "k_norm")
            )
            self._qk_norm = torch.stack([q_norm] * self._num_heads + [k_norm] * self._num_kv_heads)
        self._output = RowParallelLinear(
            context,
            f"{prefix}.o_proj",
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.output_bias,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attend: Attend) -> Tensor:
        """x: [n, hidden_size] -> the same shape."""
        num_rotated = self._num_heads + self._num_kv_heads
        qkv = self._qkv(x).view(x.shape[0], num_rotated + self._num_kv_heads, self._head_dim)
        qk = qkv[:, :num_rotated]
        if self._qk_norm is not None:
            qk = self._ops.rms_norm(qk, self._qk_norm, self._eps)
        qk = self._ops.rope(qk, cos, sin)
        attended = attend(qk[:, : self._num_heads], qk[:, self._num_heads :], qkv[:, num_rotated:], kv_cache)
        return self._output(attended.reshape(x.shape[0], -1))


class _DecoderLayer:
    """Attention and feed-forward; the norm before the layer is its caller's, as it ends the layer before."""

    def __init__(self, context: LayerContext, prefix: str, config: ModelConfig) -> None:
        self._ops = context.ops
        self._eps = config.rms_norm_eps
        self._attention = _Attention(context, f"{prefix}.self_attn", config)
        self._norm = _take_norm(context, f"{prefix}.post_attention_layernorm", config)
        self._gate_up = MergedColumnParallelLinear(
            context,
            f"{prefix}.mlp",
            {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
            config.hidden_size,
            bias=config.mlp_bias,
        )
        self._down = RowParallelLinear(
            context, f"{prefix}.mlp.down_proj", config.intermediate_size, config.hidden_size, bias=config.mlp_bias
        )

    def __call__(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, attend: Attend
    ) -> Tensor:
        """x: [n, hidden_size], normalized; returns what is to be added to residual, which is updated in place."""
        x = self._attention(x, cos, sin, kv_cache, attend)
        x = self._ops.add_rms_norm(x, residual, self._norm, self._eps)
        return self._down(self._ops.silu_and_mul(self._gate_up(x)))


class CausalLM(abc.ABC):
    """A decoder with its weights. Subclasses are named as in `architectures` of config.json."""

    @staticmethod
    @abc.abstractmethod
    def read_config(fields: dict[str, Any]) -> ModelConfig:
        """Check the fields of config.json. Raises: InvalidConfig, UnsupportedModel."""

    def __init__(
        self, config: ModelConfig, weights: Checkpoint, dtype: torch.dtype, ops: DeviceOps, parallel: TensorParallel
    ) -> None:
        """Read this rank's weights. Raises: InvalidCheckpoint, UnsupportedModel."""
        sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
        if any(size % parallel.size for size in sizes):
            raise UnsupportedModel(f"{config.architecture} with sizes {sizes} cannot be cut into {parallel.size} ranks")
        context = LayerContext(weights, ops, parallel)
        self.config = config
        self._ops = ops
        self._embedding = VocabParallelEmbedding(context, "model.embed_tokens", config.vocab_size, config.hidden_size)
        prefixes = [f"model.layers.{i}" for i in range(config.num_layers)]
        self._layers: list[_DecoderLayer] = []
        self._norms: list[Tensor] = []  # each layer's input norm, and the final one
        for prefix in prefixes:
            self._norms.append(_take_norm(context, f"{prefix}.input_layernorm", config))
            self._layers.append(_DecoderLayer(context, prefix, config))
        self._norms.append(_take_norm(context, "model.norm", config))
        head = self._embedding.weight
        if not config.tie_word_embeddings:
            head = weights.take("lm_head.weight", (config.vocab_size, config.hidden_size), parallel.shard(0))
        self._lm_head = ParallelLMHead(context, head)
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, dtype, ops.device)

    def forward(self, input_ids: Tensor, positions: Tensor, kv_caches: list[Tensor], attend: Attend) -> Tensor:
        """Run all layers.

        input_ids, positions: [n] int64; kv_caches: one a layer, [num_blocks, kv_heads, 2, block_size, head_dim].
        Returns the last hidden states, normalized: [n, hidden_size] in the model's dtype.
        """
        eps = self.config.rms_norm_eps
        cos, sin = self._rotary(positions)
        residual = self._embedding(input_ids)
        x = self._ops.rms_norm(residual, self._norms[0], eps)
        for layer, next_norm, kv_cache in zip(self._layers, self._norms[1:], kv_caches, strict=True):
            x = layer(x, residual, cos, sin, kv_cache, attend)
            x = self._ops.add_rms_norm(x, residual, next_norm, eps)
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size] float32."""
        return self._lm_head(hidden)


def _take_norm(context: LayerContext, name: str, config: ModelConfig) -> Tensor:
    return context.weights.take(f"{name}.weight", (config.hidden_size,)).to(context.ops.device)
