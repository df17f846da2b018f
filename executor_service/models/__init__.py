"""Models by the architecture that config.json names. Every module here that defines one is found by itself."""

import importlib
import pkgutil
from pathlib import Path

import torch

from executor_service.layers.device import DeviceOps
from executor_service.layers.parallel import TensorParallel
from executor_service.models.causal_lm import CausalLM
from executor_service.models.config import ModelConfig, architecture_of
from executor_service.weights.checkpoint import Checkpoint
from executor_service.weights.errors import ModelError, UnsupportedModel
from executor_service.weights.files import read_config

__all__ = ["CausalLM", "ModelConfig", "ModelError", "load_model", "registry"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

registry: dict[str, type[CausalLM]] = {model.__name__: model for model in CausalLM.__subclasses__()}


def load_model(
    directory: Path, *, dtype: torch.dtype, device_ops: DeviceOps, parallel: TensorParallel | None = None
) -> CausalLM:
    """Load a Hugging Face directory, as one rank of `parallel` (None: the only one); dtype: float32 or bfloat16.

    Raises: ModelError, where the model is not supported, or its files are missing, damaged or contradict each other.
    """
    fields = read_config(directory)
    architecture = architecture_of(fields)
    if architecture not in registry:
        raise UnsupportedModel(f"{directory} holds a {architecture}, and only {', '.join(registry)} are supported")
    model_class = registry[architecture]
    config = model_class.read_config(fields)
    with Checkpoint(directory, dtype, device_ops.device) as weights:
        model = model_class(config, weights, dtype, device_ops, parallel or TensorParallel())
        weights.finish(ignored=frozenset({"lm_head.weight"} if config.tie_word_embeddings else ()))
    return model
