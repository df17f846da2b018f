"""Qwen2 and Qwen2.5 (arXiv:2407.10671)."""

from typing import Any

from executor_service.models.causal_lm import CausalLM
from executor_service.models.config import ModelConfig, read_model_config


class Qwen2ForCausalLM(CausalLM):
    """Queries, keys and values have biases, nothing else has."""

    @staticmethod
    def read_config(fields: dict[str, Any]) -> ModelConfig:
        """See CausalLM."""
        return read_model_config(fields, qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=False)
