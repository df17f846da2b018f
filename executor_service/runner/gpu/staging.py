"""Pinned host memory that the device reads while the host goes on: a few arrays in turn."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pinned(*size: int) -> Tensor:
    """Zeros of int32 in memory that the device addresses too, where there is one."""
    return torch.zeros(size, dtype=torch.int32, pin_memory=torch.cuda.is_available())


def to_device(values: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy that arrives in the order of the current stream, without a wait: for what not every step needs."""
    dtype = torch.int32 if values.dtype == np.int32 else torch.int64
    # PyTorch hands pinned memory out again only when copies from and to it have ended.
    staged = torch.empty(values.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    staged.numpy()[...] = values
    return staged.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory, which is there when the current stream has come this far."""
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
    return copied.copy_(values, non_blocking=True)


class StagingBuffers:
    """Arrays of int32, each handed out again only when the device has read what it was filled with last."""

    def __init__(self, size: int, count: int = 4) -> None:
        self._arrays = [
            torch.zeros(size, dtype=torch.int32, pin_memory=torch.cuda.is_available()) for _ in range(count)
        ]
        self._read = [torch.cuda.Event() for _ in range(count)]  # on the current stream, behind what reads the array
        self._next = 0

    def take(self) -> Tensor:
        """An array that nobody reads: [size]. Blocks until there is one."""
        self._read[self._next].synchronize()
        return self._arrays[self._next]

    def launched(self) -> None:
        """Note that everything that reads the array taken last was launched on the current stream."""
        self._read[self._next].record()
        self._next = (self._next + 1) % len(self._arrays)
