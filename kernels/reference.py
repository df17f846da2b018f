"""What each kernel computes, in plain torch: slow, obvious, the oracle of every test.

All arithmetic is in float32 and only the result is rounded to the input's dtype.
kv_cache: [num_blocks, kv_heads, 2, block_size, head_dim], keys at 0 and values at 1.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [n, ..., size]; weight: [..., size]. Source: arXiv:1910.07467."""
    values = x.float()
    mean_square = (values * values).mean(dim=-1, keepdim=True)
    return (values / torch.sqrt(mean_square + eps) * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [n, size]; returns the norm of their sum, and the sum."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x: [n, heads, head_dim] by positions: [n] times inv_freq: [head_dim / 2].

    Source: arXiv:2104.09864, pairs as in the Hugging Face checkpoints.
    """
    angles = (positions[:, None].float() * inv_freq)[:, None]
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [n, 2 * size] -> [n, size]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v: [n, kv_heads, head_dim]; slot_mapping: [n] int64, block * block_size + offset."""
    block_size = kv_cache.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        kv_cache[block, :, 0, offset] = k[token]
        kv_cache[block, :, 1, offset] = v[token]


def paged_decode_attention(q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor) -> Tensor:
    """q: [batch, heads, head_dim], the newest token of each sequence; returns its shape.

    block_tables: [batch, max_blocks]; context_lens: [batch], the newest token included.
    """
    rows = [
        _attend(q[i : i + 1], *_context(kv_cache, block_tables[i], int(length)))
        for i, length in enumerate(context_lens)
    ]
    return torch.cat(rows)


def paged_prefill_attention(
    q: Tensor, kv_cache: Tensor, query_starts: tuple[int, ...], context_lens: tuple[int, ...], block_tables: Tensor
) -> Tensor:
    """q: [n, heads, head_dim], sequence i's rows from query_starts[i] to query_starts[i + 1], the tail of its context.

    block_tables: [num_seqs, max_blocks]. Returns q's shape.
    """
    chunks = [
        _attend(q[query_starts[i] : query_starts[i + 1]], *_context(kv_cache, block_tables[i], length))
        for i, length in enumerate(context_lens)
    ]
    return torch.cat(chunks)


def _context(kv_cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence: [length, kv_heads, head_dim] each."""
    block_size = kv_cache.shape[3]
    places = [divmod(position, block_size) for position in range(length)]
    entries = torch.stack([kv_cache[int(block_table[index]), :, :, offset] for index, offset in places])
    return entries[:, :, 0], entries[:, :, 1]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, the last query at the last key.

    q: [n, heads, head_dim]; k, v: [m, kv_heads, head_dim], m >= n.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) / q.shape[2] ** 0.5
    is_future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    weights = torch.softmax(scores.masked_fill(is_future, float("-inf")), dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def murmur3_32(words: tuple[Tensor, ...]) -> Tensor:
    """MurmurHash3_x86_32, with seed 0, of little-endian 32-bit words: int64 tensors that broadcast, values < 2**32.

    Only 32-bit multiplications, rotations and exclusive ors, so that any device computes the same bits.
    Source: Austin Appleby, MurmurHash3.cpp in SMHasher (public domain).
    """
    mask = 0xFFFFFFFF
    state = torch.zeros_like(words[0])
    for word in words:
        word = word * 0xCC9E2D51 & mask
        word = (word << 15 | word >> 17) & mask
        state = state ^ (word * 0x1B873593 & mask)
        state = (state << 13 | state >> 19) & mask
        state = state * 5 + 0xE6546B64 & mask
    state = state ^ 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16


def gumbel_noise(seed: Tensor, choice_index: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of tokens at a position: a function of nothing but its arguments, int64 tensors that broadcast.

    seed holds the bits of an unsigned 64-bit integer. With h the hash of the words (low half of the seed, high half,
    choice index, position, token id), u = (2 * (h >> 9) + 1) / 2**24 lies strictly between 0 and 1 and is exact in
    float32; the noise is -log(-log(u)), float64, at most about 16.64.
    """
    words = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, choice_index, position, token_ids)
    uniform = ((murmur3_32(words) >> 9) * 2 + 1).double() / 2**24
    return -torch.log(-torch.log(uniform))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice_index: Tensor,
    positions: Tensor,
) -> Tensor:
    """Choose one token a row. logits: [num_rows, vocab_size] float32; the rest: [num_rows].

    A token whose logit is -inf is never chosen; every row has one that is finite.

    positions counts the tokens before the one to be chosen. Returns [num_rows] int64.

    Temperature 0 takes the largest logit. Otherwise, on scaled logits s = (logit - largest) / temperature:
    top_k (0: off) keeps the k likeliest tokens; top_p (1: off) keeps, of those, the smallest set of likeliest tokens
    whose share of their mass reaches top_p, one at least; min_p (0: off) keeps, of those, the tokens at least min_p
    times as likely as the likeliest of all. The token with the largest s + noise wins (Gumbel-max: exactly a draw
    from the softmax of what is kept). The lowest id wins where scores are equal.

    Tokens of equal s share their fate: all that tie with the last one kept are kept, so that no filter depends on the
    order of a sort. s and the weights exp(s) are float32; masses and scores are float64. The order of the filters is
    that of Hugging Face's generate; vLLM applies min_p first, which differs only in the mass that top_p counts.
    """
    token_ids = []
    for row in range(len(logits)):
        if not temperature[row] > 0:
            token_ids.append(logits[row].argmax())
            continue
        scaled = (logits[row] - logits[row].max()) / temperature[row]
        kept = torch.ones_like(scaled, dtype=torch.bool)
        if top_k[row] > 0:
            kept &= scaled >= scaled.sort(descending=True).values[: int(top_k[row])][-1]
        if top_p[row] < 1:
            descending = scaled[kept].sort(descending=True).values
            mass = descending.exp().double().cumsum(0)
            is_reached = mass >= top_p[row].double() * mass[-1]
            kept &= scaled >= descending[is_reached][0]
        kept &= scaled.exp() >= min_p[row]
        noise = gumbel_noise(seed[row], choice_index[row], positions[row], torch.arange(len(scaled)))
        token_ids.append((scaled.double() + noise).masked_fill(~kept, -torch.inf).argmax())
    return torch.stack(token_ids)


def process_logits(
    logits: Tensor,
    token_ids: Tensor,
    num_prompt_tokens: int,
    *,
    mask: Tensor | None = None,
    allowed_token_ids: Collection[int] = (),
    banned_token_ids: Collection[int] = (),
    end_token_ids: Collection[int] = (),
    min_total_tokens: int = 0,
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> Tensor:
    """What the next token of one sequence is sampled from: [vocab_size] float32, -inf for tokens out of the question.

    logits: [vocab_size] float32, finite, the model's own; token_ids: [num_tokens] int64, what the sequence holds, the
    prompt first; mask: [vocab_size] bool, which tokens a grammar allows; allowed_token_ids: none means all;
    end_token_ids: all that are out of the question while the sequence holds fewer than min_total_tokens tokens.

    Every product, quotient, sum and difference is rounded to float32. Sources: the penalties are those of vLLM's
    apply_penalties (vllm/model_executor/layers/utils.py); the repetition penalty, arXiv:1909.05858, counts the
    prompt, and the other two what was generated.
    """
    possible = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.clone()
    if allowed_token_ids:
        is_allowed = torch.zeros_like(possible)
        is_allowed[list(allowed_token_ids)] = True
        possible &= is_allowed
    possible[list(banned_token_ids)] = False
    if len(token_ids) < min_total_tokens:
        possible[list(end_token_ids)] = False
    logits = logits.masked_fill(~possible, -torch.inf)
    for token_id, bias in (logit_bias or {}).items():
        logits[token_id] += bias
    is_seen = torch.bincount(token_ids, minlength=len(logits)) > 0
    penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = torch.where(is_seen, penalized, logits)
    counts = torch.bincount(token_ids[num_prompt_tokens:], minlength=len(logits))
    logits = logits - frequency_penalty * counts
    return logits - presence_penalty * (counts > 0)


def log_probabilities(logits: Tensor, token_ids: Tensor, num_likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the probabilities of one token a row, and of the likeliest ones.

    logits: [num_rows, vocab_size] float32, the model's own; token_ids: [num_rows] int64.
    Returns the tokens, [num_rows, 1 + num_likeliest] int64: the row's own, then the likeliest, the lowest id first
    among equals; their logarithms, the same in float32; and for each row the number of tokens that are likelier than
    its own, plus 1: [num_rows] int64. Source: vLLM's `raw_logprobs`, where a rank counts equals too.
    """
    likeliest = logits.argsort(dim=-1, descending=True, stable=True)[:, :num_likeliest]
    reported = torch.cat((token_ids[:, None], likeliest), dim=1)
    own = logits.gather(1, token_ids[:, None])
    return reported, logits.log_softmax(dim=-1).gather(1, reported), (logits > own).sum(dim=-1) + 1
