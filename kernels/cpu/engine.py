"""A decoder on the CPU, a step at a time: engine.h and step.c, with tensors in and out."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu.library import (
    DTYPE_FORMATS,
    PANEL,
    BatchStruct,
    LayerStruct,
    Library,
    LinearStruct,
    ModelStruct,
    address,
)
from kernels.cpu.panels import PanelLinear


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """A layer's weights and cache; norms and biases of any float dtype."""

    input_norm: Tensor  # [hidden_size]
    qkv: PanelLinear  # without its bias
    qkv_bias: Tensor | None  # [(heads + 2 * kv_heads) * head_dim]
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    attention_out: PanelLinear
    post_attention_norm: Tensor  # [hidden_size]
    gate_up: PanelLinear
    down: PanelLinear
    kv_cache: Tensor  # [num_blocks, kv_heads, 2, block_size, head_dim]


@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder."""

    num_heads: int
    norm_eps: float
    inv_freq: Tensor  # [head_dim / 2] float32
    layers: Sequence[LayerWeights]
    embedding: Tensor | None  # [vocab_size, hidden_size] of the caches' dtype; None: the weight of lm_head
    norm: Tensor  # [hidden_size]
    lm_head: PanelLinear


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of a step, one sequence after the other; each sequence's tokens are the tail of its context."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    query_starts: Tensor  # [num_sequences + 1] int32
    block_tables: Tensor  # [num_sequences, max_blocks] int32


class Engine:
    """Threads of its own and the memory between operations. One thread at a time may call."""

    def __init__(self, library: Library, weights: DecoderWeights, max_tokens: int, cores: Sequence[int]) -> None:
        """max_tokens: most of a batch; cores: those to compute on, the first of them by the caller's thread.

        Raises: MemoryError, also where the system has no threads left; ValueError, for sizes that it cannot compute.
        """
        self._engine: int | None = None
        if weights.layers[0].down.struct.in_features % PANEL:
            raise ValueError(f"the size of the feed-forward layers is no multiple of {PANEL}")
        self._functions = library.functions
        self._kept: list[object] = [weights]  # what the library holds pointers to
        self._model = self._describe(weights)
        self._hidden_size, self._vocab_size = self._model.hidden_size, self._model.lm_head.out_features
        core_column = torch.tensor(cores, dtype=torch.int32)
        self._engine = self._functions.duet_engine_create(self._model, max_tokens, len(cores), address(core_column))
        if not self._engine:
            raise MemoryError("no memory or no threads left for the model's buffers")

    def close(self) -> None:
        """End the threads and free the buffers; nothing may be called afterwards."""
        engine, self._engine = self._engine, None
        if engine:
            self._functions.duet_engine_destroy(engine)

    def __del__(self) -> None:
        self.close()

    def forward(self, batch: Batch) -> Tensor:
        """Run all layers, and store keys and values: [num_tokens, hidden_size] float32, before the last norm."""
        hidden = torch.empty(len(batch.token_ids), self._hidden_size)
        self._functions.duet_forward(self._engine, _describe_batch(batch), address(hidden))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden_size], out of `forward`; returns [n, vocab_size] float32."""
        logits = torch.empty(len(hidden), self._vocab_size)
        self._functions.duet_logits(self._engine, address(hidden), len(hidden), address(logits))
        return logits

    def decode_step(self, batch: Batch) -> Tensor:
        """Both in one: [num_tokens, vocab_size] float32."""
        logits = torch.empty(len(batch.token_ids), self._vocab_size)
        self._functions.duet_decode_step(self._engine, _describe_batch(batch), address(logits))
        return logits

    def _describe(self, weights: DecoderWeights) -> ModelStruct:
        layers = (LayerStruct * len(weights.layers))(*map(self._describe_layer, weights.layers))
        kv_cache = weights.layers[0].kv_cache
        return ModelStruct(
            num_layers=len(weights.layers),
            hidden_size=weights.lm_head.struct.in_features,
            num_heads=weights.num_heads,
            num_kv_heads=kv_cache.shape[1],
            head_dim=kv_cache.shape[4],
            block_size=kv_cache.shape[3],
            cache_format=DTYPE_FORMATS[kv_cache.dtype],
            norm_eps=weights.norm_eps,
            inv_freq=self._floats(weights.inv_freq),
            layers=layers,
            embedding=address(weights.embedding),
            norm=self._floats(weights.norm),
            lm_head=weights.lm_head.struct,
        )

    def _describe_layer(self, layer: LayerWeights) -> LayerStruct:
        qkv = _copy(layer.qkv.struct)
        qkv.bias = self._floats(layer.qkv_bias)
        gate_up = _copy(layer.gate_up.struct)
        gate_up.is_gate_up = 1
        return LayerStruct(
            qkv=qkv,
            attention_out=layer.attention_out.struct,
            gate_up=gate_up,
            down=layer.down.struct,
            input_norm=self._floats(layer.input_norm),
            post_attention_norm=self._floats(layer.post_attention_norm),
            qk_norm=self._floats(layer.qk_norm),
            kv_cache=address(layer.kv_cache),
        )

    def _floats(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the engine."""
        if tensor is None:
            return None
        copy = tensor.float().contiguous()
        self._kept.append(copy)
        return address(copy)


def _copy(struct: LinearStruct) -> LinearStruct:
    return LinearStruct.from_buffer_copy(struct)


def _describe_batch(batch: Batch) -> BatchStruct:
    return BatchStruct(
        num_tokens=len(batch.token_ids),
        num_sequences=len(batch.block_tables),
        token_ids=address(batch.token_ids),
        positions=address(batch.positions),
        query_starts=address(batch.query_starts),
        block_tables=address(batch.block_tables),
        block_table_stride=batch.block_tables.shape[1],
    )
