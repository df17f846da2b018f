"""Why a model cannot be served; each message is one sentence that says what and why.

ModelError
├── InvalidConfig       config.json is missing, broken or contradicts itself
├── InvalidCheckpoint   a file of weights is missing or damaged, or its tensors are not what config.json promises
├── UnsupportedModel    sound, but of a kind that is not implemented
└── UnfitSettings       the settings, the model and the machine do not fit each other
"""


class ModelError(Exception):
    """Base of all: the directory cannot be served as it is, and another try would fail the same way."""


class InvalidConfig(ModelError):
    """config.json is missing, broken or contradicts itself."""


class InvalidCheckpoint(ModelError):
    """The weights are not what config.json promises."""


class UnsupportedModel(ModelError):
    """The model needs something that is not implemented."""


class UnfitSettings(ModelError):
    """The settings, the model and the machine do not fit each other; the message names the flag to change."""
