"""Loads for `duet bench`: which prompts begin when, and how many tokens each asks for."""

import dataclasses
import itertools
import random

MAX_TOKEN_ID = 10_000  # as in the seeds' benchmark; every model of interest has a larger vocabulary

Span = tuple[int, int]  # least and most, both included


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued to exactly `output_len` tokens."""

    prompt: list[int]  # token ids
    output_len: int
    temperature: float = 0.0
    start_s: float = 0.0  # after the load's beginning
    group: int = 0
    prefix_len: int = 0  # tokens that this prompt has in common with its group


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How requests are drawn. Lengths and arrival times are the same in every run, so that runs compare."""

    streams: int = 1  # requests in all
    input_len: Span = (128, 128)  # tokens of each prompt, a shared prefix not counted
    output_len: Span = (128, 128)
    temperature: float = 0.6
    rate: float | None = None  # Poisson arrivals a second; None: all at once
    prefix_len: int = 0  # tokens shared within a group
    groups: int = 1

    def requests(self, run: str, vocab_size: int = MAX_TOKEN_ID + 1) -> list[Request]:
        """The requests in order of arrival.

        Another `run` gives prompts of the same lengths that share no beginning with these: nothing is found in a
        prefix cache but what the scenario shares. The defaults of `seeds` draw what the seeds' benchmark draws.
        """
        rng, new = random.Random(0), random.Random(run)
        numbers = range(self.streams)
        prompts = [_draw(rng, rng.randint(*self.input_len), vocab_size) for _ in numbers]
        output_lens = [rng.randint(*self.output_len) for _ in numbers]
        starts = [0.0] * self.streams
        if self.rate:
            starts = list(itertools.accumulate((rng.expovariate(self.rate) for _ in numbers[1:]), initial=0.0))
        prefixes = [_draw(rng, self.prefix_len, vocab_size) for _ in range(self.groups)]
        for beginning in prefixes if self.prefix_len else prompts:
            beginning[:2] = _draw(new, min(2, len(beginning)), vocab_size)
        return [
            Request(
                prompt=prefixes[number % self.groups] + prompts[number],
                output_len=output_lens[number],
                temperature=self.temperature,
                start_s=starts[number],
                group=number % self.groups,
                prefix_len=self.prefix_len,
            )
            for number in numbers
        ]

    def __str__(self) -> str:
        arrival = f"{self.rate:g} a second" if self.rate else "at once"
        shared = f"{self.prefix_len} shared in {self.groups} groups + " if self.prefix_len else ""
        spans = ["-".join(map(str, sorted({*span}))) for span in (self.input_len, self.output_len)]
        return (
            f"{self.streams} requests {arrival}, {shared}{spans[0]} tokens in, {spans[1]} out, "
            f"temperature {self.temperature:g}"
        )


SCENARIOS = {
    "fixed": Scenario(temperature=0.0),
    "single": Scenario(output_len=(512, 512)),
    "seeds": Scenario(256, (100, 1024), (100, 1024)),
    "poisson": Scenario(256, (512, 512), rate=32.0),
    "shared-prefix": Scenario(256, prefix_len=1024, groups=8),
    "long-prompt": Scenario(8, (8000, 8000)),
}


def _draw(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(count)]
