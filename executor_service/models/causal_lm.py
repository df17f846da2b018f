"""The decoder that Llama, Qwen2 and Qwen3 share; a model's own file says which of its parts are switched on."""

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor

from executor_service.layers.attention import Attend, AttentionConfig, HeadParameters
from executor_service.layers.device import DeviceOps, Linear
from executor_service.layers.parallel import (
    Embedding,
    LayerContext,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallel,
)
from executor_service.layers.partition import split_heads
from executor_service.layers.rotary import inverse_frequencies
from executor_service.models.config import ModelConfig
from executor_service.weights.checkpoint import Checkpoint, Span


@dataclasses.dataclass(frozen=True)
class LayerParts:
    """A layer's weights, for a device that runs whole steps instead of `forward`; linear layers are the device's."""

    input_norm: Tensor  # [hidden_size]
    qkv: Linear
    heads: HeadParameters
    attention_out: Linear
    post_attention_norm: Tensor  # [hidden_size]
    gate_up: Linear
    down: Linear


@dataclasses.dataclass(frozen=True)
class DecoderParts:
    """The same of a whole model."""

    embedding: Tensor  # [vocab_size, hidden_size]
    layers: list[LayerParts]
    norm: Tensor  # [hidden_size]
    lm_head: Linear


class _Attention:
    """Grouped-query attention of one layer."""

    def __init__(self, context: LayerContext, prefix: str, config: ModelConfig) -> None:
        self._ops = context.ops
        self._eps = config.rms_norm_eps
        split = split_heads(config.num_heads, config.num_kv_heads, context.parallel.rank, context.parallel.size)
        self.qkv = QKVParallelLinear(
            context,
            prefix,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            split,
            bias=config.qkv_bias,
        )
        qk_norm: Tensor | None = None
        if config.qk_norm:
            q_norm, k_norm = (
                context.weights.take(f"{prefix}.{name}.weight", (config.head_dim,)) for name in ("q_norm", "k_norm")
            )
            qk_norm = torch.stack([q_norm] * split.query.length + [k_norm] * split.key_value.length)
        self.parameters = HeadParameters(self.qkv.bias, qk_norm)
        self.output = RowParallelLinear(
            context,
            f"{prefix}.o_proj",
            config.num_heads * config.head_dim,
            config.hidden_size,
            split.query.times(config.head_dim),
            bias=config.output_bias,
        )

    def __call__(
        self, x: Tensor | None, residual: Tensor, norm: Tensor, kv_cache: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """See _DecoderLayer; norm: [hidden_size], of what stands before."""
        qkv, residual = self._ops.norm_linear(self.qkv.linear, x, residual, norm, self._eps)
        return self.output.linear(attend(qkv, self.parameters, kv_cache)), residual


class _DecoderLayer:
    """Attention and feed-forward, each behind a norm of what has been summed up before it."""

    def __init__(self, context: LayerContext, prefix: str, config: ModelConfig) -> None:
        self._ops = context.ops
        self._eps = config.rms_norm_eps
        self._input_norm = _take_norm(context, f"{prefix}.input_layernorm", config)
        self._attention = _Attention(context, f"{prefix}.self_attn", config)
        self._post_attention_norm = _take_norm(context, f"{prefix}.post_attention_layernorm", config)
        self._gate_up = MergedColumnParallelLinear(
            context,
            f"{prefix}.mlp",
            {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
            config.hidden_size,
            bias=config.mlp_bias,
        )
        self._down = RowParallelLinear(
            context,
            f"{prefix}.mlp.down_proj",
            config.intermediate_size,
            config.hidden_size,
            context.parallel.span(config.intermediate_size),
            bias=config.mlp_bias,
        )

    def __call__(self, x: Tensor | None, residual: Tensor, kv_cache: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Take and return (x, residual), [n, hidden_size] each, which sum up to the hidden state over all ranks' x.

        x None: zero.
        """
        x, residual = self._attention(x, residual, self._input_norm, kv_cache, attend)
        x, residual = self._ops.norm_gate_up(self._gate_up.linear, x, residual, self._post_attention_norm, self._eps)
        return self._down.linear(x), residual

    def parts(self) -> LayerParts:
        """See LayerParts."""
        return LayerParts(
            input_norm=self._input_norm,
            qkv=self._attention.qkv.linear,
            heads=self._attention.parameters,
            attention_out=self._attention.output.linear,
            post_attention_norm=self._post_attention_norm,
            gate_up=self._gate_up.linear,
            down=self._down.linear,
        )


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What the last layer leaves; the sum of residual and of all ranks' x is still to be normalized."""

    x: Tensor  # [n, hidden_size]
    residual: Tensor  # [n, hidden_size]

    def select(self, rows: Tensor) -> "Hidden":
        """rows: [num_selected] integers."""
        return Hidden(self.x.index_select(0, rows), self.residual.index_select(0, rows))


class CausalLM(abc.ABC):
    """A decoder with its weights. Subclasses are named as in `architectures` of config.json."""

    @staticmethod
    @abc.abstractmethod
    def read_config(fields: dict[str, Any]) -> ModelConfig:
        """Check the fields of config.json. Raises: InvalidConfig, UnsupportedModel."""

    def __init__(
        self, config: ModelConfig, weights: Checkpoint, dtype: torch.dtype, ops: DeviceOps, parallel: TensorParallel
    ) -> None:
        """Read this rank's weights. Raises: InvalidCheckpoint."""
        context = LayerContext(weights, ops, parallel)
        self.config = config
        self.vocab_span = parallel.vocab_span(config.vocab_size)
        self._ops = ops
        self._embedding = Embedding(context, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._layers = [_DecoderLayer(context, f"model.layers.{i}", config) for i in range(config.num_layers)]
        self._norm = _take_norm(context, "model.norm", config)
        self._lm_head = ops.linear(self._take_head(weights), None)
        self._heads = split_heads(config.num_heads, config.num_kv_heads, parallel.rank, parallel.size)
        self._dtype = dtype

    def _take_head(self, weights: Checkpoint) -> Tensor:
        """The rows of this rank's token ids: [num_ids, hidden_size]."""
        if self.config.tie_word_embeddings:
            return self._embedding.head_weight
        span = self.vocab_span
        shape = self.config.vocab_size, self.config.hidden_size
        return weights.take("lm_head.weight", shape, Span(span.start, span.stop, span.stop - span.start))

    def parts(self) -> DecoderParts:
        """See DecoderParts."""
        return DecoderParts(
            self._embedding.weight, [layer.parts() for layer in self._layers], self._norm, self._lm_head
        )

    def attention_config(self, block_size: int) -> AttentionConfig:
        """What a device's attention needs to know of this rank's part of the model."""
        return AttentionConfig(
            num_heads=self._heads.query.length,
            num_kv_heads=self._heads.key_value.length,
            head_dim=self.config.head_dim,
            block_size=block_size,
            dtype=self._dtype,
            norm_eps=self.config.rms_norm_eps,
            inv_freq=inverse_frequencies(self.config.rope, self.config.head_dim).to(self._ops.device),
        )

    def forward(self, input_ids: Tensor, kv_caches: list[Tensor], attend: Attend) -> Hidden:
        """Run all layers.

        input_ids: [n] integers; kv_caches: one a layer, [num_blocks, kv_heads, 2, block_size, head_dim].
        """
        x, residual = None, self._embedding(input_ids)
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            x, residual = layer(x, residual, kv_cache, attend)
        assert x is not None, "a model has a layer"
        return Hidden(x, residual)

    def compute_logits(self, hidden: Hidden) -> Tensor:
        """Of this rank's token ids, those of vocab_span: [n, num_ids] in the model's dtype."""
        eps = self.config.rms_norm_eps
        logits, _ = self._ops.norm_linear(self._lm_head, hidden.x, hidden.residual, self._norm, eps)
        return logits


def _take_norm(context: LayerContext, name: str, config: ModelConfig) -> Tensor:
    return context.weights.take(f"{name}.weight", (config.hidden_size,))
