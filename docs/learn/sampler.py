"""Draws from one row of logits, then swaps the executor's sampler: `python -m docs.learn.sampler [MODEL]`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer
from torch import Tensor

from docs.learn.plans import GREEDY, Executor, model_directory
from executor_service.plan import Sampling
from executor_service.runner import cpu_runner
from kernels.sampling import WHOLE_VOCABULARY, SamplingColumns, VocabularyShard, sample

Sampler = Callable[[Tensor, SamplingColumns, Tensor, VocabularyShard], Tensor]

PROMPT = "The opposite of hot is"
NUM_DRAWS = 200
SETTINGS = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "top_k 3": {"top_k": 3},
    "min_p 0.08": {"min_p": 0.08},
}


def second_likeliest(logits: Tensor, columns: SamplingColumns, positions: Tensor, shard: VocabularyShard) -> Tensor:
    """The token that greedy decoding would not take. logits: [num_rows, vocab_size]; returns [num_rows] int64."""
    return logits.topk(2).indices[:, 1]


def main(argv: Sequence[str]) -> None:
    """Print a table of what is drawn, and two continuations."""
    executor = Executor(model_directory(argv))
    rows: list[Tensor] = []

    def remember(logits: Tensor, columns: SamplingColumns, positions: Tensor, shard: VocabularyShard) -> Tensor:
        rows.append(logits)
        return sample(logits, columns, positions, shard)

    with _sampler(remember):
        executor.prefill(executor.sequence(0, PROMPT))
    _print_draws(rows[0], executor.tokenizer)
    for slot, (name, sampler) in enumerate({"likeliest": sample, "second likeliest": second_likeliest}.items(), 1):
        with _sampler(sampler):
            print(f"{name}: {_continuation(executor, slot)!r}")


def _print_draws(logits: Tensor, tokenizer: Tokenizer) -> None:
    """logits: [1, vocab_size] float32."""
    probabilities = logits[0].softmax(-1)
    likeliest = probabilities.topk(5).indices.tolist()
    print(f"{PROMPT!r}: the likeliest tokens, and how often {NUM_DRAWS} draws took each")
    print(f"{'':18}" + "".join(f"{tokenizer.decode([token_id])!r:>10}" for token_id in likeliest) + "    others")
    shares = [f"{probabilities[token_id]:10.1%}" for token_id in likeliest]
    print(f"{'softmax':18}" + "".join(shares) + f"{1 - probabilities[likeliest].sum():10.1%}")
    for name, changes in SETTINGS.items():
        drawn = _draw(logits, **changes)
        counts = [int((drawn == token_id).sum()) for token_id in likeliest]
        print(f"{name:18}" + "".join(f"{count:10}" for count in (*counts, NUM_DRAWS - sum(counts))))


def _draw(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """NUM_DRAWS tokens from one row of logits, as if at as many positions, whose noise differs: [NUM_DRAWS] int64."""
    wanted = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": 1, "choice_index": 0}
    floats = {"temperature", "top_p", "min_p"}
    columns = SamplingColumns(**{
        name: torch.full((NUM_DRAWS,), value, dtype=torch.float32 if name in floats else torch.int64)
        for name, value in wanted.items()
    })  # fmt: skip
    positions = torch.arange(NUM_DRAWS)
    return sample(logits.expand(NUM_DRAWS, -1).contiguous(), columns, positions, WHOLE_VOCABULARY)


def _continuation(executor: Executor, slot: int, sampling: Sampling = GREEDY) -> str:
    """Twelve tokens after the prompt, by the sampler in force."""
    outputs = executor.prefill(executor.sequence(slot, PROMPT, sampling))
    for step in range(11):
        outputs += executor.run(join_slots=[slot] if step == 0 else [], iterations=1)
    executor.run(release_slots=[slot])
    return executor.tokenizer.decode([int(output.token_ids[0]) for output in outputs])


@contextmanager
def _sampler(sampler: Sampler) -> Iterator[None]:
    """Have the CPU's runner choose tokens with `sampler`."""
    original = cpu_runner.sample
    cpu_runner.sample = sampler
    try:
        yield
    finally:
        cpu_runner.sample = original


if __name__ == "__main__":
    main(sys.argv[1:])
