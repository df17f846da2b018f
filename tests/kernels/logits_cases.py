"""Sequences and what changes their logits, to draw from."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

VOCAB_SIZE = 70  # no multiple of 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A sequence before its next token, the arguments of reference.process_logits, and the model's logits."""

    token_ids: list[int]
    num_prompt_tokens: int
    rules: dict[str, Any]
    seed: int

    @property
    def logits(self) -> Tensor:
        """[VOCAB_SIZE] float32."""
        return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(self.seed)) * 5


token_ids = st.integers(0, VOCAB_SIZE - 1)
masks = st.none() | st.lists(st.booleans(), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE).filter(any).map(torch.tensor)
rules = st.fixed_dictionaries({
    "mask": masks,
    "allowed_token_ids": st.lists(token_ids, max_size=10),
    "banned_token_ids": st.lists(token_ids, max_size=10),
    "end_token_ids": st.lists(token_ids, max_size=3),
    "min_total_tokens": st.integers(0, 40),
    "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=10),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 1.25, 100.0]) | st.floats(0.5, 2, width=32),
    "frequency_penalty": st.sampled_from([0.0, 0.0, 2.0]) | st.floats(-2, 2, width=32),
    "presence_penalty": st.sampled_from([0.0, 0.0, 2.0]) | st.floats(-2, 2, width=32),
})  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.lists(token_ids, min_size=1, max_size=30))
    return Case(tokens, draw(st.integers(1, len(tokens))), draw(rules), draw(st.integers(0, 2**32)))
