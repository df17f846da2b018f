"""What computes a step on the CPU: the library in C, or eager PyTorch where that cannot be."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from executor_service.layers.attention import AttentionBackend, DecodeMetadata
from executor_service.layers.cpu import CpuAttention
from executor_service.models import CausalLM
from executor_service.models.causal_lm import LayerParts
from executor_service.runner.step_inputs import DecodeInputs, PrefillInputs
from kernels.cpu.engine import Batch, DecoderWeights, Engine, LayerWeights
from kernels.cpu.library import Library
from kernels.cpu.panels import PanelLinear

# rows of a step's tokens, [n] int64 -> their logits of this rank's part of the vocabulary, [n, num_ids] float32
ComputeLogits = Callable[[Tensor], Tensor]


class CpuSteps(Protocol):
    """A model with its KV cache. Both methods also store the keys and values of the step's tokens."""

    def prefill(self, inputs: PrefillInputs) -> ComputeLogits:
        """Run all layers; what is returned can be called until the next step, any number of times."""
        ...

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """The logits of every token: [batch, num_ids] float32."""
        ...


class EagerSteps:
    """See CpuSteps; PyTorch, on any number of ranks."""

    def __init__(self, model: CausalLM, kv_caches: list[Tensor], block_size: int) -> None:
        """kv_caches: one a layer, [num_blocks, num_kv_heads, 2, block_size, head_dim]."""
        self._model = model
        self._kv_caches = kv_caches
        self._attention: AttentionBackend = CpuAttention(model.attention_config(block_size))

    def prefill(self, inputs: PrefillInputs) -> ComputeLogits:
        """See CpuSteps."""
        attend = self._attention.begin_prefill(inputs.metadata)
        hidden = self._model.forward(inputs.input_ids, self._kv_caches, attend)
        return lambda rows: self._model.compute_logits(hidden.select(rows)).float()

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """See CpuSteps."""
        attend = self._attention.begin_decode(inputs.metadata)
        return self._model.compute_logits(self._model.forward(inputs.input_ids, self._kv_caches, attend)).float()


class EngineSteps:
    """See CpuSteps; the library in C, on one rank."""

    def __init__(
        self,
        library: Library,
        model: CausalLM,
        kv_caches: list[Tensor],
        max_tokens: int,
        cores: Sequence[int],
    ) -> None:
        """model: made with PanelOps; nothing but its weights is used, and a tied embedding is not kept."""
        parts, config = model.parts(), model.config
        weights = DecoderWeights(
            num_heads=config.num_heads,
            norm_eps=config.rms_norm_eps,
            inv_freq=model.attention_config(kv_caches[0].shape[3]).inv_freq,
            layers=[_layer_weights(*pair) for pair in zip(parts.layers, kv_caches, strict=True)],
            embedding=None if config.tie_word_embeddings else parts.embedding,
            norm=parts.norm,
            lm_head=_panels(parts.lm_head),
        )
        self._engine = Engine(library, weights, max_tokens, cores)

    def prefill(self, inputs: PrefillInputs) -> ComputeLogits:
        """See CpuSteps."""
        metadata = inputs.metadata
        query_starts = torch.tensor(metadata.query_starts, dtype=torch.int32)
        hidden = self._engine.forward(Batch(inputs.input_ids, metadata.positions, query_starts, metadata.block_tables))
        return lambda rows: self._engine.logits(hidden.index_select(0, rows))

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """See CpuSteps."""
        metadata: DecodeMetadata = inputs.metadata
        query_starts = torch.arange(len(inputs.input_ids) + 1, dtype=torch.int32)
        batch = Batch(inputs.input_ids, metadata.positions, query_starts, metadata.block_tables)
        return self._engine.decode_step(batch)


def _layer_weights(layer: LayerParts, kv_cache: Tensor) -> LayerWeights:
    return LayerWeights(
        input_norm=layer.input_norm,
        qkv=_panels(layer.qkv),
        qkv_bias=layer.heads.bias,
        qk_norm=layer.heads.qk_norm,
        attention_out=_panels(layer.attention_out),
        post_attention_norm=layer.post_attention_norm,
        gate_up=_panels(layer.gate_up),
        down=_panels(layer.down),
        kv_cache=kv_cache,
    )


def _panels(linear: object) -> PanelLinear:
    assert isinstance(linear, PanelLinear), "the model was made with other operations"
    return linear
