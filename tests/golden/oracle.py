"""What transformers generates greedily in fp32, and how sure it is of each token.

The session's fixture `oracle` is one for the default model. It always generates as many tokens as it is asked for:
compare with `ignore_eos`, or cut the reference after its first stop token.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

NEAR_TIE = 1e-3  # logits; batches of other shapes moved a gap by less than 1e-4
SHORT = 64  # tokens of a prompt that shares a batch with whatever is as short
LEAST = 64  # tokens that an answer holds, so that who asks for fewer shares it


@dataclasses.dataclass(frozen=True)
class Reference:
    """A greedy continuation; every list holds one entry per generated token."""

    prompt: list[int]
    tokens: list[int]
    runners_up: list[int]  # the token of the second best logit
    gaps: list[float]  # best logit less second best

    def first(self, num_tokens: int) -> "Reference":
        """The same, cut short."""
        return Reference(self.prompt, self.tokens[:num_tokens], self.runners_up[:num_tokens], self.gaps[:num_tokens])


@dataclasses.dataclass(frozen=True)
class NearTie:
    """A place where another token than the reference's was forgiven."""

    position: int  # among the generated tokens
    reference: int  # token id
    ours: int  # token id
    gap: float  # logits


class Continues(Protocol):
    """Whatever continues token ids greedily, each answer made alone."""

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Reference: ...


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Greedy `generate` of the model in the directory `model`, each answer kept in the directory `answers`."""

    model: Path
    answers: Path

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Reference:
        """Continue the token ids `prompt` by exactly `num_tokens` tokens, stop tokens being like any other."""
        return self.generate_all([prompt], num_tokens)[0]

    def generate_all(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Reference]:
        """The same for several prompts, in their order; like ones share a batch, which takes a fifth of the time."""
        at_least = max(num_tokens, LEAST)
        for batch in _batches([list(prompt) for prompt in prompts if not self._path(prompt, at_least).is_file()]):
            for reference in self._generate(batch, at_least):
                path = self._path(reference.prompt, at_least)
                path.write_text(json.dumps(dataclasses.asdict(reference)))
        answers = [json.loads(self._path(prompt, at_least).read_text()) for prompt in prompts]
        return [Reference(**answer).first(num_tokens) for answer in answers]

    def _path(self, prompt: Sequence[int], num_tokens: int) -> Path:
        key = json.dumps([str(self.model), list(prompt), num_tokens])
        return self.answers / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    @cached_property
    def _loaded(self) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        loaded.generation_config = GenerationConfig()  # the model's own would end at its stop token
        return loaded.eval()

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> list[Reference]:
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]  # on the left, masked out: positions are counted after it
        made = self._loaded.generate(
            torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            max_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(made.logits, dim=1).topk(2)  # [len(prompts), num_tokens, 2]
        tokens = made.sequences[:, width:]
        assert torch.equal(tokens, best.indices[..., 0])
        assert tokens.shape[1] == num_tokens
        gaps = best.values[..., 0] - best.values[..., 1]
        columns = zip(prompts, tokens.tolist(), best.indices[..., 1].tolist(), gaps.tolist(), strict=True)
        return [Reference(*column) for column in columns]


def _batches(prompts: list[list[int]]) -> list[list[list[int]]]:
    """Prompts of about the same length together, so that there is little padding to compute."""
    batches: list[list[list[int]]] = []
    for prompt in sorted(prompts, key=len):
        if batches and len(prompt) <= max(SHORT, 2 * len(batches[-1][0])):
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def assert_same_tokens(ours: Sequence[int], reference: Reference, oracle: Continues, name: str = "") -> list[NearTie]:
    """Fail unless `ours` is the reference's continuation; returns, and prints, the places that were forgiven.

    Forgiven is only the reference's second best token where its logit is within `NEAR_TIE` of the best. What follows
    such a place is compared with what the oracle makes of our own tokens up to there.
    """
    ties: list[NearTie] = []
    tokens, runners_up, gaps = list(reference.tokens), list(reference.runners_up), list(reference.gaps)
    assert len(ours) == len(tokens), f"{name}: {len(ours)} tokens, not {len(tokens)}"
    for position, token in enumerate(ours):
        if token == tokens[position]:
            continue
        tie = NearTie(position, tokens[position], token, gaps[position])
        if tie.gap > NEAR_TIE or token != runners_up[position]:
            raise AssertionError(f"{name}: another token, and no near tie: {tie}, runner-up {runners_up[position]}")
        ties.append(tie)
        print(f"forgiven near tie: {name} {tie}")
        done = position + 1
        if done < len(ours):
            rest = oracle.generate([*reference.prompt, *ours[:done]], len(ours) - done)
            tokens[done:], runners_up[done:], gaps[done:] = rest.tokens, rest.runners_up, rest.gaps
    return ties
