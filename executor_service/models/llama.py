"""Llama (arXiv:2407.21783), and everything that is published under its architecture, such as SmolLM2."""

from typing import Any

from executor_service.models.causal_lm import CausalLM
from executor_service.models.config import ConfigReader, ModelConfig, read_model_config


class LlamaForCausalLM(CausalLM):
    """Biases only where config.json has them."""

    @staticmethod
    def read_config(fields: dict[str, Any]) -> ModelConfig:
        """See CausalLM."""
        reader = ConfigReader(fields)
        bias = reader.flag("attention_bias")
        return read_model_config(
            fields, qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias"), qk_norm=False
        )
