"""What the core is told of a checked request."""

import random
import uuid
from collections.abc import Sequence

import numpy as np

from protos.duet.inference.v1.inference_pb2 import GenerateRequest
from scheduler_service import ipc
from scheduler_service.frontend.prompt import within_vocabulary

_INT32_MAX = (1 << 31) - 1


def build_submit(
    request: GenerateRequest,
    token_ids: Sequence[int],
    *,
    streams: list[int],
    eos_token_ids: Sequence[int],
    vocab_size: int,
    arrival: float,
    deadline: float | None,
    constraint: str | None,
    tenant: str,
) -> ipc.Submit:
    """Missing id and seed are drawn here. Times are time.monotonic() seconds; `constraint` is a grammar."""
    stop = request.stop
    end_token_ids = sorted({*within_vocabulary(eos_token_ids, vocab_size)})
    eos = () if stop.ignore_eos else end_token_ids
    return ipc.Submit(
        streams=streams,
        request_id=request.request_id if request.HasField("request_id") else uuid.uuid4().hex,
        token_ids=np.array(token_ids, dtype="<i4").tobytes(),
        sampling=_sampling(request),
        stop_token_ids=sorted({*stop.stop_token_ids, *eos}),
        end_token_ids=end_token_ids,
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        priority=request.priority,
        cache_salt=request.cache_salt,
        arrival=arrival,
        deadline=deadline,
        constraint=constraint,
        tenant=tenant,
        detach_s=request.detach_seconds if request.HasField("detach_seconds") else None,
        resumes=request.HasField("resume_offset") or len(request.resume_offsets) > 0,
    )


def _sampling(request: GenerateRequest) -> ipc.Sampling:
    sampling, output = request.sampling, request.output
    return ipc.Sampling(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=min(sampling.top_k, _INT32_MAX),
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else random.getrandbits(64),
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=sorted({*sampling.allowed_token_ids}),
        banned_token_ids=sorted({*sampling.banned_token_ids}),
        min_tokens=request.stop.min_tokens,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
    )
