"""What the host knows of the few slots whose logits are changed or reported when they sample."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from executor_service.plan import Column, Mask, NewSequence
from kernels.logits import drop_tokens, keep_masked, keep_tokens, penalize


class TokenCounts:
    """The distinct tokens that a sequence holds, and how often each of them was generated."""

    def __init__(self, sequence: NewSequence) -> None:
        """Of all known tokens: those that were generated before a preemption count."""
        token_ids, places = np.unique(sequence.token_ids, return_inverse=True)
        self._num_distinct = len(token_ids)
        capacity = self._num_distinct + sequence.max_total_tokens - len(sequence.token_ids)
        self._token_ids = np.zeros(capacity, dtype=np.int64)
        self._token_ids[: self._num_distinct] = token_ids
        self._counts = np.zeros(capacity, dtype=np.float32)
        np.add.at(self._counts, places[sequence.num_prompt_tokens :], 1)
        self._places = dict(zip(token_ids.tolist(), range(self._num_distinct), strict=True))

    def append(self, token_id: int) -> None:
        """Count a generated token."""
        place = self._places.setdefault(token_id, self._num_distinct)
        self._num_distinct = len(self._places)
        self._token_ids[place] = token_id
        self._counts[place] += 1

    @property
    def token_ids(self) -> Tensor:
        """[num_distinct] int64."""
        return torch.from_numpy(self._token_ids[: self._num_distinct])

    @property
    def counts(self) -> Tensor:
        """[num_distinct] float32, of token_ids."""
        return torch.from_numpy(self._counts[: self._num_distinct])


class SpecialSlot:
    """What is done to one sequence's logits, and what is reported of them: see SamplingParams in executor.proto."""

    def __init__(self, sequence: NewSequence) -> None:
        """Nothing has been sampled since the sequence took the slot."""
        sampling = sequence.sampling
        self._sampling = sampling
        self._num_tokens = len(sequence.token_ids)
        self._allowed = _indices(sampling.allowed_token_ids)
        self._banned = _indices(sampling.banned_token_ids)
        self._ends = _indices(np.concatenate((sequence.stop_token_ids, sampling.end_token_ids)))
        self._biased = _indices(sampling.bias_token_ids)
        self._bias = torch.from_numpy(sampling.bias_values.astype(np.float32))
        self._counts = TokenCounts(sequence) if sampling.has_penalties else None
        self._always_changes = dataclasses.replace(sampling, min_total_tokens=0).changes_logits

    @property
    def num_logprobs(self) -> int:
        """Tokens whose log-probabilities are reported with each sampled one, that one included; 0: none."""
        return self._sampling.num_logprobs

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is sampled from other logits than the model's own, even without a mask."""
        return self._always_changes or self._is_short

    @property
    def is_special(self) -> bool:
        """Whether anything is left to do; once there is not, there never is."""
        return self.num_logprobs > 0 or self.changes_logits

    def append(self, token_id: int) -> None:
        """Note what was sampled."""
        self._num_tokens += 1
        if self._counts:
            self._counts.append(token_id)

    def process(self, logits: Tensor, mask: Mask | None) -> None:
        """Change the logits of the next token, in place, as `kernels.reference.process_logits` defines.

        logits: [vocab_size] float32, finite.
        """
        sampling = self._sampling
        if mask is not None:
            keep_masked(logits, mask)
        if len(self._allowed):
            keep_tokens(logits, self._allowed)
        drop_tokens(logits, self._banned)
        if self._is_short:
            drop_tokens(logits, self._ends)
        logits[self._biased] += self._bias
        if self._counts:
            penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
            penalize(logits, self._counts.token_ids, self._counts.counts, *penalties)

    @property
    def _is_short(self) -> bool:
        return self._num_tokens < self._sampling.min_total_tokens


def _indices(token_ids: Column) -> Tensor:
    return torch.from_numpy(token_ids.astype(np.int64))
