"""Qwen3, dense (arXiv:2505.09388)."""

from typing import Any

from executor_service.models.causal_lm import CausalLM
from executor_service.models.config import ConfigReader, ModelConfig, read_model_config


class Qwen3ForCausalLM(CausalLM):
    """Each head of queries and keys is normalized; head_dim stands on its own."""

    @staticmethod
    def read_config(fields: dict[str, Any]) -> ModelConfig:
        """See CausalLM."""
        bias = ConfigReader(fields).flag("attention_bias")
        return read_model_config(
            # head_dim does not follow from the other sizes: where it is not given, it is 128.
            {"head_dim": 128, **fields},
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=False,
            qk_norm=True,
        )
