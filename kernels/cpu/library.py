"""The library in C as Python sees it: duet.h and layout.h, declared for ctypes. Calls release the GIL."""

import ctypes
import dataclasses
import enum
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import build
from kernels.cpu.levels import Level

PANEL = 16  # outputs of a panel


class Format(enum.IntEnum):
    """See `enum format`."""

    FLOAT = 0
    BF16 = 1
    INT8 = 2


DTYPE_FORMATS = {torch.float32: Format.FLOAT, torch.bfloat16: Format.BF16}

_pointer, _int32, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class LinearStruct(ctypes.Structure):
    """See `struct linear`."""

    _fields_ = (
        ("in_features", _int64),
        ("out_features", _int64),
        ("format", _int32),
        ("is_gate_up", _int32),
        ("panels", _pointer),
        ("scales", _pointer),
        ("corrections", _pointer),
        ("bias", _pointer),
    )


class LayerStruct(ctypes.Structure):
    """See `struct layer`."""

    _fields_ = (
        ("qkv", LinearStruct),
        ("attention_out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("input_norm", _pointer),
        ("post_attention_norm", _pointer),
        ("qk_norm", _pointer),
        ("kv_cache", _pointer),
    )


class ModelStruct(ctypes.Structure):
    """See `struct model`."""

    _fields_ = (
        ("num_layers", _int32),
        ("hidden_size", _int32),
        ("num_heads", _int32),
        ("num_kv_heads", _int32),
        ("head_dim", _int32),
        ("block_size", _int32),
        ("cache_format", _int32),
        ("norm_eps", _float),
        ("inv_freq", _pointer),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("embedding", _pointer),
        ("norm", _pointer),
        ("lm_head", LinearStruct),
    )


class BatchStruct(ctypes.Structure):
    """See `struct batch`."""

    _fields_ = (
        ("num_tokens", _int64),
        ("num_sequences", _int64),
        ("token_ids", _pointer),
        ("positions", _pointer),
        ("query_starts", _pointer),
        ("block_tables", _pointer),
        ("block_table_stride", _int64),
    )


class SequenceStruct(ctypes.Structure):
    """See `struct duet_sequence`."""

    _fields_ = (
        ("num_heads", _int64),
        ("num_kv_heads", _int64),
        ("head_dim", _int64),
        ("block_size", _int64),
        ("cache_format", _int32),
        ("kv_cache", _pointer),
        ("block_table", _pointer),
        ("first_position", _int64),
        ("num_tokens", _int64),
    )


@dataclasses.dataclass(frozen=True)
class Library:
    """A loaded build; `functions` has every function of duet.h."""

    level: str
    functions: ctypes.CDLL


_SIGNATURES = {
    "duet_engine_create": (_pointer, (ctypes.POINTER(ModelStruct), _int64, _int64, _pointer)),
    "duet_engine_destroy": (None, (_pointer,)),
    "duet_forward": (None, (_pointer, ctypes.POINTER(BatchStruct), _pointer)),
    "duet_logits": (None, (_pointer, _pointer, _int64, _pointer)),
    "duet_decode_step": (None, (_pointer, ctypes.POINTER(BatchStruct), _pointer)),
    "duet_panel_bytes": (_int64, (_int64, _int64, _int32)),
    "duet_pack": (None, (ctypes.POINTER(LinearStruct), _pointer, _int32)),
    "duet_linear": (None, (ctypes.POINTER(LinearStruct), _pointer, _int64, _pointer)),
    "duet_gate_up": (None, (ctypes.POINTER(LinearStruct), _pointer, _int64, _pointer)),
    "duet_rms_norm": (None, (_pointer, _pointer, _int64, _int64, _float, _pointer)),
    "duet_rotate": (None, (_pointer, _pointer, _pointer, _int64, _int64, _int64)),
    "duet_attention": (None, (ctypes.POINTER(SequenceStruct), _pointer, _int64, _pointer)),
    "duet_unpack": (None, (ctypes.POINTER(LinearStruct), _pointer, _int64, _pointer)),
}


def load_library(level: Level, directory: Path) -> Library:
    """Load the build for a level that this machine can run, building it unless it is there. Raises: BuildError."""
    functions = ctypes.CDLL(str(build(level, directory)))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return Library(level.name, functions)


def address(tensor: Tensor | None) -> int | None:
    """Of the first element, for a pointer argument or field; the tensor must be contiguous, and outlive its use."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the library reads memory from end to end"
    return tensor.data_ptr()
