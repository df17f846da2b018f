"""Weights on disk: what is there, whether it is sound, and reading it."""

from executor_service.weights.errors import InvalidCheckpoint, InvalidConfig, ModelError, UnsupportedModel
from executor_service.weights.files import digest

__all__ = ["InvalidCheckpoint", "InvalidConfig", "ModelError", "UnsupportedModel", "digest"]
