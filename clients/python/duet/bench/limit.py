"""The least time that a load can take on a device: bytes and operations that no engine can avoid.

The weights are read once a step, every token's KV entries once for each token that is generated after them, at the
device's reading bandwidth; the layers' multiplications for every prompt token take place at its rate of bf16 products.
The LM head of prompts, attention's own products, activations and samplers are left out, and nothing overlaps.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from duet.bench.scenarios import Request
from duet.errors import InvalidRequest

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device does at best, measured on it (benchmarks/gpu/ceilings.py)."""

    device: str
    read_bytes_per_s: float
    flops_per_s: float

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read them from a JSON object that has these fields among others. Raises: OSError, InvalidRequest."""
        stored = _load(file)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in stored]:
            raise InvalidRequest(f"{file} lacks {', '.join(missing)}")
        return cls(**{name: stored[name] for name in names})


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a model's tokens cost."""

    layer_params: int  # of the matrices of all layers
    weight_bytes: int  # read for a step: layers, norms and LM head
    kv_bytes: int  # of one token, all layers

    @classmethod
    def load(cls, directory: Path, dtype: str | None = None) -> Self:
        """Of a Hugging Face directory of a dense decoder, in the config's number format where none is given.

        Raises: OSError, InvalidRequest.
        """
        return cls.of(_load(directory / "config.json"), dtype)

    @classmethod
    def of(cls, config: dict[str, Any], dtype: str | None = None) -> Self:
        """The same of the parsed config.json."""
        if "num_experts" in config or "num_local_experts" in config:
            raise InvalidRequest("the limit of a mixture of experts is not known")
        hidden, layers, heads = (
            config[f"{name}"] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        layer_params = layers * (attention + 3 * hidden * config["intermediate_size"])
        norms = (2 * layers + 1) * hidden + (2 * layers * head_dim if config.get("model_type") == "qwen3" else 0)
        size = _BYTES[dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16"]
        return cls(
            layer_params=layer_params,
            weight_bytes=size * (layer_params + norms + hidden * config["vocab_size"]),
            kv_bytes=size * layers * 2 * kv_heads * head_dim,
        )


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least time of a load, and what follows from it."""

    device: str
    seconds: float
    tokens_per_s: float
    step_s: float | None  # a decode step of all streams, on average; None where they do not run together
    kv_s: float
    weights_s: float
    prefill_s: float


def limit_of(requests: Sequence[Request], model: ModelCost, ceilings: Ceilings) -> Limit:
    """The limit of a load; where requests arrive later, at least until the last of them could be done alone."""
    steps = max(request.output_len for request in requests)
    kv_s = _kv_tokens(requests) * model.kv_bytes / ceilings.read_bytes_per_s
    weights_s = steps * model.weight_bytes / ceilings.read_bytes_per_s
    prefixes = {request.group: request.prefix_len for request in requests}
    prompt_tokens = sum(prefixes.values()) + sum(len(request.prompt) - request.prefix_len for request in requests)
    prefill_s = 2 * model.layer_params * prompt_tokens / ceilings.flops_per_s
    seconds = kv_s + weights_s + prefill_s
    last = max(requests, key=lambda request: request.start_s)
    if last.start_s:
        seconds = max(seconds, last.start_s + last.output_len * model.weight_bytes / ceilings.read_bytes_per_s)
    together = all((request.output_len, request.start_s) == (steps, 0.0) for request in requests)
    return Limit(
        device=ceilings.device,
        seconds=seconds,
        tokens_per_s=sum(request.output_len for request in requests) / seconds,
        step_s=(kv_s + weights_s) / steps if together else None,
        kv_s=kv_s,
        weights_s=weights_s,
        prefill_s=prefill_s,
    )


def _kv_tokens(requests: Sequence[Request]) -> int:
    """Tokens whose KV entries are read, summed over all steps; a shared prefix is read once a step for its group."""
    own = sum(
        request.output_len * (len(request.prompt) - request.prefix_len)
        + request.output_len * (request.output_len - 1) // 2
        for request in requests
    )
    shared: dict[int, int] = {}
    for request in requests:
        shared[request.group] = max(shared.get(request.group, 0), request.output_len * request.prefix_len)
    return own + sum(shared.values())


def _load(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}") from None
