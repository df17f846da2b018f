"""An NVIDIA GPU as a device."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_service.layers.device import Linear
from executor_service.layers.parallel import TensorParallel
from kernels.gpu import skinny_linear
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.linear_choice import CUBLAS, Choice, choose
from kernels.gpu.norm import add_rms_norm, rms_norm


@dataclasses.dataclass(frozen=True)
class CudaLinear:
    """cuBLAS, and our own kernel for the few rows at which a launch costs more than its arithmetic."""

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]
    capability: tuple[int, int]  # of the device

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in_features]."""
        return self.run(x, self.choice("linear", x))

    def run(self, x: Tensor, choice: Choice) -> Tensor:
        """x: [n, in_features]."""
        if choice.config is None:
            return F.linear(x, self.weight, self.bias)
        return skinny_linear.linear(x, self.weight, self.bias, choice.config)

    def choice(self, kind: str, rows: Tensor) -> Choice:
        """How to run it behind what `kind` says, for as many rows; our own kernel is made for bfloat16."""
        if rows.dtype != torch.bfloat16:
            return CUBLAS
        return choose(self.capability, kind, *self.weight.shape, len(rows))


class CudaOps:
    """See DeviceOps."""

    def __init__(self, device: torch.device, parallel: TensorParallel | None = None) -> None:
        """parallel: None for one rank."""
        self.device = device
        self._parallel = parallel or TensorParallel()
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See DeviceOps."""
        return CudaLinear(weight, bias, self._capability)

    def norm_linear(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        assert isinstance(linear, CudaLinear)
        choice = linear.choice("norm_linear", residual)
        if choice.fuses_norm and self._parallel.size == 1:  # several ranks have the norm in their all-reduce
            return skinny_linear.add_norm_linear(x, residual, weight, eps, linear.weight, linear.bias, choice.config)
        return linear.run(self._norm(x, residual, weight, eps), choice), residual

    def norm_gate_up(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        assert isinstance(linear, CudaLinear)
        choice = linear.choice("norm_gate_up", residual)
        if choice.fuses_norm and self._parallel.size == 1:  # several ranks have the norm in their all-reduce
            return skinny_linear.add_norm_gate_up(x, residual, weight, eps, linear.weight, linear.bias, choice.config)
        normed = self._norm(x, residual, weight, eps)
        if choice.config is None:
            return silu_and_mul(linear.run(normed, choice)), residual
        return skinny_linear.gate_up(normed, linear.weight, linear.bias, choice.config), residual

    def _norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x is None:
            return rms_norm(residual, weight, eps)
        if self._parallel.all_reduce_norm is not None:
            normed = self._parallel.all_reduce_norm(x, residual, weight, eps)
            if normed is not None:
                return normed
        return add_rms_norm(self._parallel.all_reduce(x), residual, weight, eps)
