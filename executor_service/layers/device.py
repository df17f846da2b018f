"""What a model needs from a device; one implementation per device, chosen where the model is loaded.

The operations are as coarse as the coarsest device fuses them.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# A linear layer as a device has prepared it: [num_tokens, in_features] -> [num_tokens, out_features].
Linear = Callable[[Tensor], Tensor]


class DeviceOps(Protocol):
    """The operations of a decoder layer; kernels/reference.py says what each computes."""

    @property
    def device(self) -> torch.device:
        """Where weights and caches live."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare x @ weight.T + bias for this device; weight: [out_features, in_features]."""
        ...

    def norm_linear(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The linear layer of the norm of residual + the sum of x over ranks, and that sum.

        x: [num_tokens, hidden_size], this rank's share, None for zero; weight: [hidden_size], of the norm. Both x and
        residual may be overwritten.
        """
        ...

    def norm_gate_up(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As norm_linear, of a layer whose outputs are gate, then up: the silu of gate times up is returned."""
        ...
