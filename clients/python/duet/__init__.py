"""Client of Duet: stream tokens from a running server, or start one and generate in a few lines.

llm = LLM("/path/to/model")
outputs = llm.generate(["The sea is"], SamplingParams(temperature=0.6, max_tokens=128))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duet.client import AsyncClient, Client
    from duet.errors import (
        DeadlineExceeded,
        DuetError,
        DuplicateRequest,
        InternalError,
        InvalidRequest,
        NotAdmitted,
        QueueFull,
        StartFailed,
        StreamCut,
        Superseded,
        Unavailable,
        UnknownRequest,
    )
    from duet.llm import LLM
    from duet.output import Choice, Event, Logprob, Output
    from duet.params import SamplingParams, StructuredOutputsParams
    from duet.request import Prompt
    from duet.retry import Retry

__all__ = [
    "LLM",
    "AsyncClient",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "DuetError",
    "DuplicateRequest",
    "Event",
    "InternalError",
    "InvalidRequest",
    "Logprob",
    "NotAdmitted",
    "Output",
    "Prompt",
    "QueueFull",
    "Retry",
    "SamplingParams",
    "StartFailed",
    "StreamCut",
    "StructuredOutputsParams",
    "Superseded",
    "Unavailable",
    "UnknownRequest",
]

_MODULES = ("params", "errors", "request", "output", "retry", "client", "llm")


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is, so that `duet --help` need not wait for gRPC."""
    if name in _MODULES:
        return importlib.import_module(f"duet.{name}")
    if name in __all__:
        modules = (importlib.import_module(f"duet.{module}") for module in _MODULES)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module 'duet' has no attribute {name!r}")
