"""What the model check's requests get: stand-ins for the model, its sampler, and grammars.

The next token is a hash of the request and of all tokens before it. Which tokens a constraint lets follow is a hash of
the request and of those that it generated; a mask has room for more bits than there are tokens, and they hold the rest
of that hash, so that a mask tells for exactly which tokens of which request it was computed.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from executor_service.runner.runner import CONTINUES, LENGTH, STOPPED

EMPTY_PREFIX = 0
CONSTRAINED_TOP_K = 3  # how a request of the model check says that it is constrained; no other has it
NUM_BITS = 31
MAX_CHOICES = 2  # of a request


def name_of(seed: int, choice_index: int) -> int:
    """What the fakes know a choice by: no two requests have one seed."""
    return MAX_CHOICES * seed + choice_index


def mask_for(name: int, generated: tuple[int, ...], vocab_size: int) -> int:
    """The only right mask after these tokens of a choice; 0 where its text is complete."""
    owner = name if generated else name // MAX_CHOICES  # the choices of a request begin under one mask
    value = hash((owner, generated, 11))
    if value % 11 == 0:
        return 0
    allowed = 1 + (value >> 3) % ((1 << vocab_size) - 1)
    return allowed | (value >> 16) % (1 << NUM_BITS - vocab_size) << vocab_size


def as_column(mask: int) -> NDArray[np.int32]:
    """As the grammar worker tells it.  # [1] int32"""
    return np.array([mask], dtype=np.int32)


def choose(value: int, mask: int | None, vocab_size: int) -> int:
    """A token as `value` wants it, of those that the mask allows."""
    tokens = [token for token in range(vocab_size) if mask is None or mask >> token & 1]
    return tokens[value % len(tokens)]


def extend_hash(prefix: int, token: int) -> int:
    """The hash of a prefix and the token after it."""
    return hash((prefix, token))


def next_value(prefix: int, name: int) -> int:
    """What `choose` makes the next token of: the deterministic stand-in for model and sampler."""
    return hash((prefix, name, 7))


def finish_reason(token: int, num_tokens: int, stop_token_ids: set[int], max_total_tokens: int) -> int:
    """Whether a sequence that holds `num_tokens` tokens, `token` the last, goes on."""
    if token in stop_token_ids:
        return STOPPED
    return LENGTH if num_tokens == max_total_tokens else CONTINUES


@dataclasses.dataclass
class Sequence:
    """What stands in a slot."""

    name: int  # of its choice: see name_of
    seating: int  # counts the sequences that this executor was given
    is_constrained: bool
    num_prompt_tokens: int
    tokens: list[int]
    hashes: list[int]  # [len(tokens)] of the prefix that ends with each token
    num_known: int  # tokens it came with
    max_total_tokens: int
    stop_token_ids: set[int]
    blocks: list[int]
    rows: list[int]  # [len(blocks) * block_size] where each position's KV entry lies
    num_planned: int  # positions that plans have covered
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0
    done: bool = False
    damaged: bool = False  # it read a damaged row

    def append(self, token: int) -> None:
        """Hold another token."""
        prefix = self.hashes[-1] if self.hashes else EMPTY_PREFIX
        self.tokens.append(token)
        self.hashes.append(extend_hash(prefix, token))
