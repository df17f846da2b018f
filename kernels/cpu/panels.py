"""Linear layers whose weights are in panels (see layout.h), in memory of huge pages that is read from end to end."""

import mmap

import torch
from torch import Tensor

from kernels.cpu.library import DTYPE_FORMATS, PANEL, Format, Library, LinearStruct, address

_HUGE_PAGE = 2 << 20
_CHUNK_BYTES = 64 << 20


class Arena:
    """Memory for weights: pieces of large mappings, one after the other, as they are read. Nothing is given back."""

    def __init__(self) -> None:
        """Empty; pages cost memory when they are written."""
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, at a multiple of 64 bytes."""
        size = -(-num_bytes // 64) * 64
        if size > len(self._left):
            self._left = _map_huge_pages(max(size, _CHUNK_BYTES))
        piece, self._left = self._left[:num_bytes], self._left[size:]
        return piece


def _map_huge_pages(num_bytes: int) -> Tensor:
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + num_bytes]


class PanelLinear:
    """A packed linear layer; as a callable it is one of DeviceOps, computed by the calling thread."""

    def __init__(
        self, library: Library, weight: Tensor, bias: Tensor | None, weight_format: Format, arena: Arena
    ) -> None:
        """weight: [out_features, in_features] and bias: [out_features], float32 or bfloat16; neither is kept."""
        self._functions = library.functions
        out_features, in_features = weight.shape
        num_bytes = self._functions.duet_panel_bytes(in_features, out_features, weight_format)
        self._panels = arena.take(num_bytes)
        padded = -(-out_features // PANEL) * PANEL
        is_int8 = weight_format is Format.INT8
        self._scales = torch.empty(padded) if is_int8 else None
        self._corrections = torch.empty(padded, dtype=torch.int32) if is_int8 else None
        self._bias = None if bias is None else bias.float().contiguous()
        self.struct = LinearStruct(
            in_features=in_features,
            out_features=out_features,
            format=weight_format,
            panels=address(self._panels),
            scales=address(self._scales),
            corrections=address(self._corrections),
            bias=address(self._bias),
        )
        self._functions.duet_pack(self.struct, address(weight.contiguous()), DTYPE_FORMATS[weight.dtype])

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in_features] -> [n, out_features] of the same dtype."""
        rows = x.float().contiguous()
        outputs = torch.empty(len(rows), self.struct.out_features)
        self._functions.duet_linear(self.struct, address(rows), len(rows), address(outputs))
        return outputs.to(x.dtype)

    def unpack(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs, [n] int64, as the library knows them: [n, in_features] float32."""
        rows = torch.empty(len(outputs), self.struct.in_features)
        self._functions.duet_unpack(self.struct, address(outputs), len(outputs), address(rows))
        return rows
