"""Prints the shapes of everything that goes through the model in a few plans: `python -m docs.learn.shapes [MODEL]`."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from docs.learn.plans import Executor, model_directory
from executor_service.layers.attention import Attend, DecodeMetadata, PrefillMetadata
from executor_service.layers.cpu import CpuAttention
from executor_service.models import CausalLM
from executor_service.models.causal_lm import Hidden


def main(argv: Sequence[str]) -> None:
    """Run four plans, told by what they hold."""
    executor = Executor(model_directory(argv), cpu_kernels="torch")  # whose layers can be looked at from Python
    long, short = executor.sequence(0, "The capital of France is the city of"), executor.sequence(1, "One, two,")
    chunked = executor.sequence(2, "The capital of Italy is the city of")
    patches = _observed()
    try:
        print("plan 1: two prompts")
        executor.prefill(long, short)
        print("plan 2: both decode")
        executor.run(join_slots=[0, 1], iterations=1)
        print("plan 3: the first 5 tokens of a third prompt, while both decode")
        chunk = {"prefill_slots": [2], "prefill_starts": [0], "prefill_counts": [5], "prefill_samples": [0]}
        executor.run(chunked, iterations=1, **chunk)
        print("plan 4: the rest of it, while both decode")
        rest = {"prefill_starts": [5], "prefill_counts": [chunked.num_prompt_tokens - 5], "prefill_samples": [1]}
        executor.run(iterations=1, **(chunk | rest))
    finally:
        for owner, name, original in patches:
            setattr(owner, name, original)


def _observed() -> list[tuple[type, str, Any]]:
    """Have attention and model say what they are given; returns what was replaced."""
    patched = [(CpuAttention, "begin_prefill"), (CpuAttention, "begin_decode"), (CausalLM, "forward"),
               (CausalLM, "compute_logits")]  # fmt: skip
    originals = [(owner, name, getattr(owner, name)) for owner, name in patched]
    begin_prefill, begin_decode, forward, compute_logits = (original for _, _, original in originals)

    def seen_begin_prefill(attention: CpuAttention, metadata: PrefillMetadata) -> Attend:
        print(f"  prefill  positions {metadata.positions.tolist()}")
        print(f"           query_starts {list(metadata.query_starts)}, context_lens {list(metadata.context_lens)}")
        return begin_prefill(attention, metadata)

    def seen_begin_decode(attention: CpuAttention, metadata: DecodeMetadata) -> Attend:
        print(f"  decode   positions {metadata.positions.tolist()}, context_lens {(metadata.positions + 1).tolist()}")
        return begin_decode(attention, metadata)

    def seen_forward(model: CausalLM, input_ids: Tensor, kv_caches: list[Tensor], attend: Attend) -> Hidden:
        hidden = forward(model, input_ids, kv_caches, attend)
        print(f"           input_ids {list(input_ids.shape)} -> hidden {list(hidden.x.shape)}")
        return hidden

    def seen_compute_logits(model: CausalLM, hidden: Hidden) -> Tensor:
        logits = compute_logits(model, hidden)
        print(f"           logits {list(logits.shape)}")
        return logits

    for (owner, name), seen in zip(
        patched, (seen_begin_prefill, seen_begin_decode, seen_forward, seen_compute_logits), strict=True
    ):
        setattr(owner, name, seen)
    return originals


if __name__ == "__main__":
    main(sys.argv[1:])
