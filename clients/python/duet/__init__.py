"""Client of Duet: stream tokens from a running server, or start one and generate in a few lines.

llm = LLM("/path/to/model")
outputs = llm.generate(["The sea is"], SamplingParams(temperature=0.6, max_tokens=128))
"""

from duet.client import AsyncClient, Client
from duet.errors import (
    DeadlineExceeded,
    DuetError,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    QueueFull,
    StartFailed,
    StreamCut,
    Unavailable,
    UnknownRequest,
)
from duet.llm import LLM
from duet.request import Event, Output, Prompt, SamplingParams

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "DuetError",
    "DuplicateRequest",
    "Event",
    "InternalError",
    "InvalidRequest",
    "Output",
    "Prompt",
    "QueueFull",
    "SamplingParams",
    "StartFailed",
    "StreamCut",
    "Unavailable",
    "UnknownRequest",
]
