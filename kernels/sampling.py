"""Choosing tokens on the CPU: what `reference.sample` defines, from a few hundred candidates instead of a full sort.

Every filter keeps an upper set of a row's scaled logits, and the noise has a largest value. So the likeliest
candidates decide a row whenever a filter cut below the last of them nothing, or nobody outside can overtake the
winner. A row for which neither holds is decided by all of its tokens.

The vocabulary may be cut into shards, one a rank. Then the candidates are the likeliest of those that the ranks
exchange, and all that follows, above all whether there is another exchange, depends on what all of them know.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

_NUM_CANDIDATES = 256
_LARGEST_NOISE = -math.log(-math.log1p(-(2.0**-24)))


@dataclasses.dataclass(frozen=True)
class SamplingColumns:
    """How each row's token is chosen; executor.proto says what each value means."""

    temperature: Tensor  # [num_rows] float32
    top_k: Tensor  # [num_rows] int64
    top_p: Tensor  # [num_rows] float32
    min_p: Tensor  # [num_rows] float32
    seed: Tensor  # [num_rows] int64, the bits of an unsigned one
    choice_index: Tensor  # [num_rows] int64

    def select(self, rows: Tensor) -> "SamplingColumns":
        """The columns at `rows` ([num_selected] int64 indices, or a mask of all rows)."""
        return SamplingColumns(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def _alone(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose logits a rank holds, and how the ranks exchange what they know of a row.

    Shards follow each other in rank order and may differ in size; one may be empty. A rank without others leaves
    `gather` out, which spares it the exchanges.
    """

    first_token_id: int = 0
    gather: Callable[[Tensor], Tensor] = _alone  # [n, k] on every rank -> [n, k * ranks], in rank order; every dtype

    @property
    def is_whole(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.gather is _alone


WHOLE_VOCABULARY = VocabularyShard()


def sample(
    logits: Tensor, columns: SamplingColumns, positions: Tensor, shard: VocabularyShard = WHOLE_VOCABULARY
) -> Tensor:
    """Choose one token a row; a row's token does not depend on the other rows.

    logits: [num_rows, size of the shard] float32, contiguous; -inf is the logit of tokens that are never chosen, and
    each row has one that is finite.
    positions: [num_rows] int64, tokens before the one to be chosen.
    Where there are several ranks, all of them call with the same columns and positions and get the same tokens.
    Returns [num_rows] int64. Source of the definition: `kernels.reference.sample`.
    """
    logits = _widen(logits, _NUM_CANDIDATES)
    random_rows = columns.temperature > 0
    if not bool(random_rows.any()):
        return _argmax(logits, shard)
    if bool(random_rows.all()):
        return _sample_rows(logits, columns, positions, shard)
    token_ids = _argmax(logits, shard)
    token_ids[random_rows] = _sample_rows(
        logits[random_rows], columns.select(random_rows), positions[random_rows], shard
    )
    return token_ids


def gather_rows(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """The whole rows, on every rank: [num_rows, size of the shard] -> [num_rows, vocab_size]."""
    if shard.is_whole:
        return logits
    sizes = shard.gather(torch.tensor([[logits.shape[1]]]))[0].tolist()
    parts = shard.gather(_widen(logits, max(sizes))).unflatten(1, (len(sizes), -1)).unbind(1)
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


def _widen(logits: Tensor, size: int) -> Tensor:
    """Rows of at least `size`; what is added to them never wins."""
    missing = size - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing > 0 else logits


def _argmax(logits: Tensor, shard: VocabularyShard) -> Tensor:
    # numpy's argmax takes the first of equals, as torch's does, and is vectorised: 13 times faster.
    token_ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    if shard.is_whole:
        return token_ids
    values = logits.gather(1, token_ids[:, None])[:, 0]
    return _winner(values, token_ids + shard.first_token_id, shard)


def _winner(values: Tensor, token_ids: Tensor, shard: VocabularyShard) -> Tensor:
    """The token of the largest value over ranks, the lowest id of equals: [num_rows].

    values, token_ids: [num_rows], the best of this rank.
    """
    values, token_ids = _exchange(values[:, None], token_ids[:, None], shard)
    return token_ids.gather(1, values.argmax(-1, keepdim=True))[:, 0]


def _exchange(values: Tensor, token_ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The values and token ids of all ranks: [num_rows, k] of each -> [num_rows, k * ranks]."""
    # One collective instead of two: float32 holds ids below 2**24.
    pairs = torch.stack((values, token_ids.to(values.dtype)), -1).flatten(1)
    values, token_ids = shard.gather(pairs).unflatten(1, (-1, 2)).unbind(-1)
    return values, token_ids.long()


def _sample_rows(
    logits: Tensor,
    columns: SamplingColumns,
    positions: Tensor,
    shard: VocabularyShard,
    num_candidates: int = _NUM_CANDIDATES,
) -> Tensor:
    """Choose one token a row, all temperatures above 0; -inf is the logit of no token.

    A row has at least num_candidates logits on every rank, or equally many on all, the last of them -inf.
    """
    values, token_ids = _likeliest(logits, num_candidates, shard)
    largest, temperature = values[:, :1], columns.temperature[:, None]
    scaled = (values - largest) / temperature
    nucleus_of_all = bool(((columns.top_p < 1) & (columns.top_k == 0)).any())
    mass = _mass((logits - largest) / temperature, shard) if nucleus_of_all else torch.ones_like(positions).double()
    kept, is_certain = _filter(scaled, mass, columns)
    row_states = _row_states(columns, positions)
    chosen, best = _best(scaled, token_ids, kept, row_states)

    bound = scaled[:, -1].double()  # of every token outside the candidates; -inf: none of them matters
    is_open = (~is_certain & (bound > -math.inf)) | (kept[:, -1] & (best <= bound + _LARGEST_NOISE))
    if not bool(is_open.any()):
        return chosen
    is_unfiltered = (columns.top_k == 0) & (columns.top_p >= 1) & (columns.min_p <= 0)
    rows = (is_open & is_unfiltered).nonzero().flatten()
    for row in rows.tolist():
        one = slice(row, row + 1)
        all_scaled = (logits[one] - largest[one]) / temperature[one]
        lead = (best - bound)[row].item()
        chosen[one], best[one] = _contender(all_scaled, chosen[one], lead, row_states[one], shard.first_token_id)
    if len(rows) and not shard.is_whole:
        chosen[rows] = _winner(best[rows], chosen[rows], shard)
    is_filtered = is_open & ~is_unfiltered
    if bool(is_filtered.any()):
        more = num_candidates * 16
        largest_shard = int(shard.gather(torch.tensor([[logits.shape[1]]])).max())
        chosen[is_filtered] = _sample_rows(
            _widen(logits[is_filtered], min(more, largest_shard + 1)),
            columns.select(is_filtered),
            positions[is_filtered],
            shard,
            more,
        )
    return chosen


def _likeliest(logits: Tensor, num_candidates: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The largest logits of the whole rows, descending, and their tokens: [num_rows, at most num_candidates] each.

    The last one is -inf where there are no others.
    """
    values, token_ids = logits.topk(min(num_candidates, logits.shape[1]))
    if shard.is_whole:
        return values, token_ids
    values, token_ids = _exchange(values, token_ids + shard.first_token_id, shard)
    values, order = values.topk(min(num_candidates, values.shape[1]))
    return values, token_ids.gather(1, order)


def _contender(
    scaled: Tensor, leader: Tensor, lead: float, row_states: Tensor, first_token_id: int
) -> tuple[Tensor, Tensor]:
    """This rank's best token of one unfiltered row if it overtakes the leader or is it, else any; and its score: [1].

    scaled: [1, size of the shard] float32; leader: [1] int64, the best candidate, with a score `lead` above the scaled
    logit of every other token that is no candidate: only noise of at least `lead` overtakes it.
    """
    last = scaled.shape[1] - 1
    token_ids = torch.arange(first_token_id, first_token_id + last + 1, dtype=torch.int32)
    noise_bits = _noise_bits(row_states, token_ids)
    least = int(math.exp(-math.exp(-lead)) * 2**23) - 2  # 2: the rounding of exp and of this expression
    leader_or_any = (leader - first_token_id).clamp(0, last)
    contenders = torch.cat([(noise_bits >= least).nonzero().flatten(), leader_or_any])[None]
    scaled = scaled.gather(1, contenders)
    return _best(scaled, contenders + first_token_id, torch.ones_like(scaled, dtype=torch.bool), row_states)


def _mass(scaled: Tensor, shard: VocabularyShard) -> Tensor:
    """Of the whole rows: [num_rows] float64; scaled: [num_rows, size of the shard] float32."""
    return shard.gather(scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)).sum(-1)


def _filter(scaled: Tensor, mass: Tensor, columns: SamplingColumns) -> tuple[Tensor, Tensor]:
    """Apply top_k, top_p and min_p to the likeliest tokens of each row.

    scaled: [num_rows, num_candidates] float32, descending; mass: [num_rows] float64, of the whole row (used where
    top_k is 0).
    Returns which candidates are kept, and for which rows that is certain whatever lies outside: [num_rows].
    """
    num_candidates = scaled.shape[1]
    top_k, top_p = columns.top_k[:, None], columns.top_p[:, None].double()
    last = (top_k.clamp(1, num_candidates)) - 1
    by_top_k = (top_k == 0) | (scaled >= scaled.gather(1, last))
    weights = scaled.exp()
    weights_kept = weights.double() * by_top_k
    cumulative = weights_kept.cumsum(-1)
    rest = torch.where(top_k == 0, mass[:, None], cumulative[:, -1:])
    likelier = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))  # mass before each candidate
    nucleus_last = (by_top_k & (likelier < top_p * rest)).sum(-1, keepdim=True) - 1
    by_top_p = (top_p >= 1) | (scaled >= scaled.gather(1, nucleus_last.clamp(min=0)))
    kept = by_top_k & by_top_p & (weights >= columns.min_p[:, None])
    rest_is_known = (columns.top_k == 0) | ~by_top_k[:, -1]
    return kept, rest_is_known | (columns.top_p >= 1)


def _best(scaled: Tensor, token_ids: Tensor, kept: Tensor, row_states: Tensor) -> tuple[Tensor, Tensor]:
    """The kept token with the best score, the lowest id of equals, and that score: [num_rows] each."""
    uniform = (_noise_bits(row_states[:, None], token_ids.int()) * 2 + 1).double() * 2.0**-24
    scores = scaled.double() - uniform.log_().neg_().log_()
    scores.masked_fill_(~kept, -math.inf)
    best = scores.amax(-1, keepdim=True)
    return token_ids.masked_fill(scores < best, torch.iinfo(torch.int64).max).amin(-1), best[:, 0]


def _row_states(columns: SamplingColumns, positions: Tensor) -> Tensor:
    """MurmurHash3's state after every word of the key but the token id: [num_rows] int32."""
    state = torch.zeros_like(positions, dtype=torch.int32)
    for word in (columns.seed, columns.seed >> 32, columns.choice_index, positions):
        state = _mix(state, word.int())  # takes the low 32 bits
    return state


def _noise_bits(row_states: Tensor, token_ids: Tensor) -> Tensor:
    """The 23 bits that `reference.gumbel_noise` grows with; int32 tensors that broadcast."""
    state = _mix(row_states, token_ids) ^ 20
    state ^= (state >> 16) & 0xFFFF
    state *= _signed(0x85EBCA6B)
    state ^= (state >> 13) & 0x7FFFF
    state *= _signed(0xC2B2AE35)
    state ^= (state >> 16) & 0xFFFF
    return (state >> 9) & 0x7FFFFF


def _mix(state: Tensor, word: Tensor) -> Tensor:
    word = _rotate(word * _signed(0xCC9E2D51), 15) * _signed(0x1B873593)
    return _rotate(state ^ word, 13) * 5 + _signed(0xE6546B64)


def _rotate(value: Tensor, bits: int) -> Tensor:
    return (value << bits) | ((value >> (32 - bits)) & ((1 << bits) - 1))


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant
