"""What the device does in a step, as launches on the current stream. No host value but a shape enters it."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from executor_service.layers.cuda_attention import CudaAttention, DecodeStep, PrefillStep
from executor_service.models import CausalLM
from executor_service.models.causal_lm import Hidden
from executor_service.runner.gpu.buffers import DeviceBuffers
from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.rings import StepRings
from executor_service.runner.gpu.special_rows import SpecialRows
from executor_service.runner.gpu.special_sampler import SpecialSampler, Vocabulary
from kernels.gpu import slot_state, step_rings
from kernels.gpu.sampler import Workspace, sample
from kernels.gpu.sampler_shard import Shard


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Sizes of a prefill; what a graph captures is padded to its own."""

    num_tokens: int
    num_seqs: int
    num_samples: int  # rows that are sampled from, at least 1
    longest_chunk: int  # tokens
    has_cached: bool  # whether any chunk's context begins before the chunk


def _all(logits: Tensor) -> Tensor:
    return logits


class StepProgram:
    """Reads and writes the buffers; launches the same work whether it is captured or not."""

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[Tensor],
        attention: CudaAttention,
        buffers: DeviceBuffers,
        rings: StepRings,
        block_size: int,
        shard: Shard | None = None,
        gather_logits: Callable[[Tensor], Tensor] = _all,
    ) -> None:
        """kv_caches: one a layer, [num_blocks, num_kv_heads, 2, block_size, head_dim].

        shard: where the model computes the logits of a part of the vocabulary, and the ranks choose tokens together;
        gather_logits turns what it computes into the logits of all tokens, for all steps without a shard and for those
        with special rows.
        """
        self._model = model
        self._kv_caches = kv_caches
        self._attention = attention
        self._buffers = buffers
        self._rings = rings
        self._block_size = block_size
        self._gather_logits = gather_logits
        max_rows, vocab_size = len(buffers.rows), model.config.vocab_size
        dtype, device = kv_caches[0].dtype, buffers.rows.device
        self._sampler = Workspace.empty(max_rows, vocab_size, dtype, device, shard=shard)
        whole = Workspace.empty(max_rows, vocab_size, dtype, device) if shard else self._sampler
        vocabulary = Vocabulary(vocab_size, model.vocab_span.stop - model.vocab_span.start, gather_logits)
        self._special = SpecialSampler(max_rows, vocabulary, whole, buffers.state)

    @torch.inference_mode()
    def decode(self, batch: int, longest_context: int, *, samples: bool = True) -> None:
        """One token for each of the first `batch` rows; longest_context: tokens, an upper bound.

        samples: otherwise the step ends with `sample_special`.
        """
        buffers = self._buffers
        inputs = step_rings.decode_inputs(
            self._rings.plans,
            self._rings.layout,
            buffers.cursor,
            buffers.state,
            buffers.block_tables,
            buffers.rows,
            buffers.clock,
            batch,
            self._block_size,
            self._attention.split,
        )
        attend = self._attention.begin_decode(DecodeStep(inputs, longest_context))
        hidden = self._model.forward(inputs.input_ids, self._kv_caches, attend)
        logits = self._model.compute_logits(hidden)
        if samples:
            self._sample(logits, inputs.row_slots, inputs.context_lens, is_decode=True)
        else:
            self._special.keep(logits, inputs.row_slots, inputs.context_lens)

    @torch.inference_mode()
    def prefill(self, shape: PrefillShape, *, samples: bool = True) -> None:
        """The chunks that `buffers.prefill` holds, and the first token of those that end there.

        samples: otherwise the step ends with `sample_special`.
        """
        self._end_prefill(shape, self._forward_prefill(shape), samples=samples)

    @torch.inference_mode()
    def prefill_and_report(self, shape: PrefillShape, prompts: PromptRows) -> Tensor:
        """A prefill that ends with `sample_special`; returns what SpecialSampler.report_prompts does."""
        hidden = self._forward_prefill(shape)
        entries = self._special.report_prompts(prompts, lambda rows: self._model.compute_logits(hidden.select(rows)))
        self._end_prefill(shape, hidden, samples=False)
        return entries

    @torch.inference_mode()
    def sample_special(self, num_rows: int, special: SpecialRows, *, is_decode: bool) -> Tensor | None:
        """The end of a step of num_rows that has sampled nothing yet; returns Chosen.entries."""
        chosen = self._special.sample(num_rows, special)
        row_slots = self._special.row_slots[:num_rows]
        self._advance(chosen.token_ids, chosen.logprobs, row_slots, is_decode=is_decode)
        return chosen.entries

    def _forward_prefill(self, shape: PrefillShape) -> Hidden:
        buffers, n = self._buffers, shape.num_tokens
        positions = torch.zeros(n, dtype=torch.int32, device=buffers.rows.device)
        slot_mapping = torch.full_like(positions, -1)
        chunks = buffers.prefill.chunks[:, : shape.num_seqs]
        slot_state.prefill_inputs(
            chunks[:4],
            buffers.state,
            buffers.block_tables,
            buffers.clock,
            positions,
            slot_mapping,
            self._block_size,
            shape.longest_chunk,
        )
        step = PrefillStep(
            positions=positions,
            slot_mapping=slot_mapping,
            query_starts=buffers.prefill.query_starts[: shape.num_seqs + 1],
            context_lens=chunks[4],
            seq_slots=chunks[0],
            longest_chunk=shape.longest_chunk,
            has_cached=shape.has_cached,
        )
        attend = self._attention.begin_prefill(step)
        return self._model.forward(buffers.prefill.input_ids[:n], self._kv_caches, attend)

    def _end_prefill(self, shape: PrefillShape, hidden: Hidden, *, samples: bool) -> None:
        rows, sample_slots, sample_lens = self._buffers.prefill.samples[:, : shape.num_samples]
        logits = self._model.compute_logits(hidden.select(rows))
        if samples:
            self._sample(logits, sample_slots, sample_lens, is_decode=False)
        else:
            self._special.keep(logits, sample_slots, sample_lens)

    def _sample(self, logits: Tensor, row_slots: Tensor, context_lens: Tensor, *, is_decode: bool) -> None:
        if self._sampler.shard is None:
            logits = self._gather_logits(logits)
        token_ids, logprobs = sample(logits, row_slots, self._buffers.state, context_lens, self._sampler)
        self._advance(token_ids, logprobs, row_slots, is_decode=is_decode)

    def _advance(self, token_ids: Tensor, logprobs: Tensor, row_slots: Tensor, *, is_decode: bool) -> None:
        buffers = self._buffers
        step_rings.advance(
            token_ids,
            logprobs,
            row_slots,
            buffers.state,
            buffers.stop_token_ids,
            buffers.cursor,
            buffers.clock,
            self._rings.results,
            self._rings.layout,
            decode=is_decode,
        )
