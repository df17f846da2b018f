"""Changing and reporting logits on the CPU: what `reference.process_logits` and `reference.log_probabilities` define.

The changes are made in place to one row at a time: few rows have any, and most changes touch few tokens of a row.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def keep_masked(logits: Tensor, mask: NDArray[np.int32]) -> None:
    """Leave the tokens whose bit is set. logits: [vocab_size]; mask: [ceil(vocab_size / 32)], lowest bits first."""
    bits = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    torch.where(torch.from_numpy(bits.view(np.bool_)), logits, torch.tensor(-math.inf), out=logits)


def keep_tokens(logits: Tensor, token_ids: Tensor) -> None:
    """Leave only the tokens given. logits: [vocab_size]; token_ids: [any] int64."""
    kept = logits[token_ids]
    logits.fill_(-math.inf)
    logits[token_ids] = kept


def drop_tokens(logits: Tensor, token_ids: Tensor) -> None:
    """Leave all but the tokens given. logits: [vocab_size]; token_ids: [any] int64."""
    logits[token_ids] = -math.inf


def penalize(
    logits: Tensor, token_ids: Tensor, counts: Tensor, repetition: float, frequency: float, presence: float
) -> None:
    """Apply the repetition, frequency and presence penalties, in this order.

    logits: [vocab_size] float32; token_ids: [num_distinct] int64, distinct tokens of prompt and output;
    counts: [num_distinct] float32, how often each was generated.
    """
    values = logits[token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[token_ids] = values


def log_probabilities(logits: Tensor, token_ids: Tensor, num_likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of one token a row and of the likeliest ones, and the token's rank.

    logits: [num_rows, vocab_size] float32; token_ids: [num_rows] int64; num_likeliest is at most the vocabulary.
    Returns tokens ([num_rows, 1 + num_likeliest] int64), their log-probabilities (the same, float32) and ranks
    ([num_rows] int64). Source of the definition: `kernels.reference.log_probabilities`.
    """
    own = logits.gather(1, token_ids[:, None])
    reported = torch.cat((token_ids[:, None], _likeliest(logits, num_likeliest)), dim=1)
    largest = logits.amax(dim=-1, keepdim=True)
    # Row by row, since one fits the cache and all of them do not.
    masses = torch.stack([(row - top).exp_().sum() for row, top in zip(logits, largest, strict=True)])
    logprobs = logits.gather(1, reported) - largest - masses[:, None].log()
    ranks = np.count_nonzero((logits > own).numpy(), axis=1) + 1  # three times as fast as torch's sum
    return reported, logprobs, torch.from_numpy(ranks)


def _likeliest(logits: Tensor, num_likeliest: int) -> Tensor:
    """The tokens of the largest logits, descending, the lowest id first among equals: [num_rows, num_likeliest]."""
    values, token_ids = logits.topk(min(num_likeliest + 1, logits.shape[1]))  # one more: it may equal the last one
    last = values[:, num_likeliest - 1 : num_likeliest]
    is_open = (values[:, num_likeliest:] == last).flatten()
    values, token_ids = values[:, :num_likeliest], token_ids[:, :num_likeliest]
    for row in is_open.nonzero().flatten().tolist():
        larger = token_ids[row][values[row] > last[row]]
        equal = np.flatnonzero(logits[row].numpy() == last[row].item())[: num_likeliest - len(larger)]
        token_ids[row] = torch.cat((larger, torch.from_numpy(equal)))
    token_ids = token_ids.sort(dim=-1).values
    order = logits.gather(1, token_ids).argsort(dim=-1, descending=True, stable=True)
    return token_ids.gather(1, order)
