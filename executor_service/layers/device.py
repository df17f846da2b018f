"""What a model needs from a device; one implementation per device, chosen where the model is loaded."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from executor_service.layers.attention import AttentionBackend

Linear = Callable[[Tensor], Tensor]  # [num_tokens, in_features] -> [num_tokens, out_features]


class DeviceOps(Protocol):
    """The operations of a decoder layer; kernels/reference.py says what each computes."""

    @property
    def device(self) -> torch.device:
        """Where weights and caches live."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare x @ weight.T + bias for this device; weight: [out_features, in_features]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize x: [num_tokens, ..., size] over its last dimension; weight: [..., size]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to residual in place, and normalize the sum; both [num_tokens, hidden_size]."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x: [num_tokens, heads, head_dim]; cos and sin: [num_tokens, 1, head_dim], sin's first half negated."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[num_tokens, 2 * size] -> [num_tokens, size]: silu of the first half times the second."""
        ...

    def attention(self, *, num_kv_heads: int, block_size: int, dtype: torch.dtype) -> AttentionBackend:
        """Attention over a cache of `num_kv_heads` heads in blocks of `block_size` tokens."""
        ...
