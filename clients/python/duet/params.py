"""What a caller may ask for, in vLLM's names where vLLM has one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """A language to which the continuation belongs; exactly one field is set."""

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # in the syntax of Rust's regex crate, without look-around
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # a context-free grammar as Lark reads it; its first rule is `start`
    json_object: bool | None = None  # True: any JSON object


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, when generation ends, what is reported. The server checks the ranges."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # 0, or vLLM's -1, keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the server
    max_tokens: int | None = 64  # nano-vLLM's default; None: as many as fit
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    n: int = 1  # continuations of each prompt
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these tokens
    allowed_token_ids: Sequence[int] | None = None  # the only ones that may be generated; None: all
    banned_token_ids: Sequence[int] | None = None  # never generated
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None  # strings that end generation
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # alternatives to report of each token, 0 for its own logarithm alone; None: nothing
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    skip_special_tokens: bool = True  # in the text
    truncate_prompt_tokens: int | None = None  # keep this many at the end of the prompt
    structured_outputs: StructuredOutputsParams | None = None


class Options(TypedDict, total=False):
    """Further arguments of a request; what they mean, left out too, is said in inference.proto."""

    request_id: str
    model: str
    priority: int
    cache_salt: str
    echo: bool
    detach_seconds: float  # with it, a stream that breaks is resumed: see Client
