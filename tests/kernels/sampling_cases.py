"""Rows to choose tokens for, and what the oracle chooses."""

import torch
from hypothesis import strategies as st

from kernels import reference
from kernels.sampling import SamplingColumns


def columns(rows: list[dict]) -> SamplingColumns:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice_index": 0}
    rows = [defaults | row for row in rows]
    floats = ("temperature", "top_p", "min_p")
    return SamplingColumns(**{
        name: torch.tensor([row[name] for row in rows], dtype=torch.float32 if name in floats else torch.int64)
        for name in defaults
    })  # fmt: skip


def by_reference(logits: torch.Tensor, of: SamplingColumns, positions: torch.Tensor) -> torch.Tensor:
    return reference.sample(
        logits, of.temperature, of.top_k, of.top_p, of.min_p, of.seed, of.choice_index, positions
    )  # fmt: skip


row_params = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 1e-30, 0.01, 0.3, 0.7, 1.0, 2.5, 100.0]),
    "top_k": st.sampled_from([0, 0, 1, 2, 7, 255, 256, 257, 300, 100_000]),
    "top_p": st.sampled_from([1e-9, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999999, 1.0, 1.0]),
    "min_p": st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.5, 1.0]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "choice_index": st.integers(0, 3),
})  # fmt: skip


shapes = st.sampled_from(["equal", "few values", "two values", "peaked", "huge", "limits", "normal"])


def make_logits(shape: str, num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((num_rows, vocab_size), generator=generator)
    match shape:
        case "equal":
            return torch.zeros_like(logits)
        case "few values":  # ties everywhere, at every threshold
            return (logits * 2).round()
        case "two values":
            return (logits > 2).float() * 3
        case "peaked":
            return logits * 8
        case "huge":
            return logits * 1e37
        case "limits":  # their differences overflow
            return logits.round().sign() * torch.finfo(torch.float32).max
        case _:
            return logits


def rule_out(logits: torch.Tensor, num_left: int, seed: int) -> torch.Tensor:
    """The logits with -inf for all tokens of a row but `num_left` random ones, or nearly so many."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(logits.shape[1], (len(logits), num_left), generator=generator)
    possible = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, left, True)
    return logits.masked_fill(~possible, -torch.inf)
