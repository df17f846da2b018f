"""Streams of a disturbed server, compared with what each prompt gives alone on an undisturbed one."""

import dataclasses
import random
from collections.abc import Sequence

from duet import Client, Output, SamplingParams
from tests.golden.oracle import Continues, NearTie, Reference, assert_same_tokens

PROMPT_TOKENS = (4, 12)  # drawn evenly; short, since each loss of an executor or a core computes them all again
TOKEN_IDS = (3, 380)  # ordinary ones in the tiny model's vocabulary, too


@dataclasses.dataclass(frozen=True)
class Ended:
    """A stream that came to its end."""

    prompt: int  # index
    token_ids: list[int]
    text: str


@dataclasses.dataclass
class Compared:
    """What came of the comparison."""

    differences: list[str]
    near_ties: list[NearTie]
    num_other_texts: int = 0  # of streams without a near tie


class Undisturbed:
    """Greedy runs of one prompt at a time, with how sure the model is of each token."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[Reference, str]:
        """Exactly `num_tokens` tokens, and their text."""
        output = self._generate(prompt, num_tokens)
        assert output.logprobs is not None
        pairs = [sorted(entry.items(), key=lambda item: -item[1].logprob)[:2] for entry in output.logprobs]
        reference = Reference(
            prompt=list(prompt),
            tokens=output.token_ids,
            runners_up=[
                next(token for token in entry if token != chosen)
                for entry, chosen in zip((dict(pair) for pair in pairs), output.token_ids, strict=True)
            ],
            gaps=[best.logprob - second.logprob for (_, best), (_, second) in pairs],  # as between their logits
        )
        return reference, output.text

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Reference:
        """The same without the text."""
        return self.run(prompt, num_tokens)[0]

    def _generate(self, prompt: Sequence[int], num_tokens: int) -> Output:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)
        return self._client.generate(list(prompt), params)


def draw_prompts(count: int, num_tokens: tuple[int, int], seed: int) -> list[tuple[list[int], int]]:
    """Random prompts, each with the number of tokens to generate, drawn evenly from `num_tokens`."""
    rng = random.Random(seed)
    return [
        ([rng.randint(*TOKEN_IDS) for _ in range(rng.randint(*PROMPT_TOKENS))], rng.randint(*num_tokens))
        for _ in range(count)
    ]


def compare(streams: Sequence[Ended], references: Sequence[tuple[Reference, str]], model: Continues) -> Compared:
    """Each stream with its prompt's reference and text; near ties are forgiven as in tests/golden."""
    compared = Compared([], [])
    for number, stream in enumerate(streams):
        reference, text = references[stream.prompt]
        name = f"stream {number} of prompt {stream.prompt}"
        try:
            ties = assert_same_tokens(stream.token_ids, reference, model, name)
        except AssertionError as error:
            compared.differences.append(str(error))
            continue
        compared.near_ties += ties
        compared.num_other_texts += not ties and stream.text != text
    return compared
