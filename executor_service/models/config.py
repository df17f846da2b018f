"""What config.json says, checked. It is untrusted: a wrong value is refused here, with a sentence, and not later."""

import dataclasses
import math
from typing import Any

from executor_service.layers.rotary import RopeConfig
from executor_service.weights.errors import InvalidConfig, UnsupportedModel


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # each head of queries and keys is normalized before it is rotated


class ConfigReader:
    """Typed access to the fields of config.json. Every method raises InvalidConfig where a value is of no use."""

    def __init__(self, fields: dict[str, Any], name: str = "config.json") -> None:
        """name: what the fields belong to, for messages."""
        self._fields = fields
        self._name = name

    def flag(self, field: str) -> bool:
        """A boolean; missing or null is False."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise InvalidConfig(f"{self._name} has {field} {value!r}, not true or false")
        return bool(value)

    def count(self, field: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer from `least`; missing or null is the default."""
        value = self._fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidConfig(f"{self._name} has {field} {value!r}, not an integer from {least}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive finite number; missing or null is the default."""
        value = self._fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InvalidConfig(f"{self._name} has {field} {value!r}, not a positive number")
        return float(value)

    def text(self, field: str, default: str) -> str:
        """A string; missing or null is the default."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, str):
            raise InvalidConfig(f"{self._name} has {field} {value!r}, not a string")
        return default if value is None else value

    def section(self, field: str) -> dict[str, Any]:
        """An object; missing or null is an empty one."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise InvalidConfig(f"{self._name} has {field} {value!r}, not an object")
        return value or {}


def architecture_of(fields: dict[str, Any]) -> str:
    """The first of `architectures`. Raises: InvalidConfig, where there is none."""
    names = fields.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InvalidConfig(f"config.json has architectures {names!r}, not a list of names")
    return names[0]


def read_model_config(
    fields: dict[str, Any], *, qkv_bias: bool, output_bias: bool, mlp_bias: bool, qk_norm: bool
) -> ModelConfig:
    """Raises: InvalidConfig; UnsupportedModel, where the model needs something that is not implemented."""
    reader = ConfigReader(fields)
    _refuse_unsupported(fields, reader)
    hidden_size = reader.count("hidden_size")
    num_heads = reader.count("num_attention_heads")
    num_kv_heads = reader.count("num_key_value_heads", default=num_heads)
    head_dim = reader.count("head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise InvalidConfig(f"config.json has {num_heads} attention heads for {num_kv_heads} key-value heads")
    if head_dim % 2:
        raise InvalidConfig(f"config.json has head_dim {head_dim}, which is odd and cannot be rotated")
    max_position_embeddings = reader.count("max_position_embeddings")
    return ModelConfig(
        architecture=architecture_of(fields),
        vocab_size=reader.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.count("intermediate_size"),
        num_layers=reader.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        rope=_read_rope(reader, max_position_embeddings),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _refuse_unsupported(fields: dict[str, Any], reader: ConfigReader) -> None:
    if fields.get("quantization_config") is not None:
        method = reader.section("quantization_config").get("quant_method", "some method")
        raise UnsupportedModel(f"the model is quantized with {method}, and only float weights are supported")
    if reader.text("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"the model's hidden_act is {fields['hidden_act']}, and only silu is supported")
    layer_types = fields.get("layer_types")
    if isinstance(layer_types, list):
        slides = any(kind != "full_attention" for kind in layer_types)
    else:  # what transformers derives where layer_types is not given
        slides = (
            reader.flag("use_sliding_window")
            and fields.get("sliding_window") is not None
            and reader.count("num_hidden_layers") > reader.count("max_window_layers", default=28, least=0)
        )
    if slides:
        raise UnsupportedModel("the model uses sliding-window attention, and only full attention is supported")


def _read_rope(reader: ConfigReader, max_position_embeddings: int) -> RopeConfig:
    """transformers 5 writes all of it to rope_parameters; before, rope_scaling stood beside rope_theta."""
    section = "rope_parameters" if reader.section("rope_parameters") else "rope_scaling"
    rope = ConfigReader(reader.section(section), f"config.json's {section}")
    theta = rope.number("rope_theta", default=reader.number("rope_theta", default=10000.0))
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if rope.number("partial_rotary_factor", default=reader.number("partial_rotary_factor", default=1.0)) != 1.0:
        raise UnsupportedModel("the model rotates only part of each head, which is not supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=rope.number("factor"))
    if kind == "llama3":
        config = RopeConfig(
            theta,
            kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.count(
                "original_max_position_embeddings", default=max_position_embeddings
            ),
        )
        if config.low_freq_factor >= config.high_freq_factor:
            raise InvalidConfig(f"config.json's {section} has a low_freq_factor that is not below high_freq_factor")
        return config
    raise UnsupportedModel(f"the model's rope type is {kind}, and only default, linear and llama3 are supported")
