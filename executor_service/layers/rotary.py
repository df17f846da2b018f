"""Rotary position embedding (arXiv:2104.09864): frequencies by scaling type, and the factors of a step."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Base and scaling; the fields of a scaling type other than `type` are not read."""

    theta: float
    type: str = "default"  # default, linear or llama3
    factor: float = 1.0  # linear, llama3: how far the context was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3: context before the stretch


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions: [head_dim / 2] float32."""
    inv_freq = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if config.type == "linear":
        return inv_freq / config.factor
    if config.type == "llama3":
        return _llama3(inv_freq, config)
    return inv_freq


def _llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, and those between blended; source: Llama 3.1's release."""
    waves_in_context = config.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (waves_in_context - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * inv_freq / config.factor + kept * inv_freq


def rotation_factors(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, and sines whose first half is negated, as kernels.cpu.eager.rope takes them: [n, 1, head_dim] each.

    positions: [n]; inv_freq: [head_dim / 2] float32.
    """
    angles = (positions[:, None].float() * inv_freq)[:, None]  # [n, 1, head_dim / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
