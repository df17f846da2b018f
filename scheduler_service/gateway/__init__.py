"""A second servicer for the SMG gateway, which puts OpenAI's HTTP API in front of one or several servers like this.

It speaks vllm.grpc.engine.VllmEngine, whose stubs come from the package smg-grpc-proto (the extra `gateway`). Files:
service (RPCs) → requests (their messages to ours) → the front end's Generator → responses (ours to theirs); about
(model and load), tokenizer_bundle, kv_events.
"""

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from scheduler_service.gateway.service import VllmEngine

log = logging.getLogger(__name__)


def vllm_engine(
    core: CoreClient, generator: Generator, tokenizer: ModelTokenizer, model_directory: Path
) -> "VllmEngine | None":
    """The servicer, or None, with a line in the log, where its stubs are not installed."""
    if importlib.util.find_spec("smg_grpc_proto") is None:
        log.info("vllm.grpc.engine.VllmEngine is not served: smg-grpc-proto is not installed (the extra `gateway`)")
        return None
    from scheduler_service.gateway.service import VllmEngine

    return VllmEngine(core, generator, tokenizer, model_directory)
