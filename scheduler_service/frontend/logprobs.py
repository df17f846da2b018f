"""Log-probabilities as the core sends them, in columns of bytes, to the messages that a client reads."""

from collections.abc import Callable, Iterable

import numpy as np

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc

TextAlone = Callable[[int], str]  # the text of one token alone


def add_token_logprobs(message: pb.TokenDelta, entries: Iterable[ipc.TokenLogprobs], text_alone: TextAlone) -> None:
    """Add one to the delta's for each of `entries`."""
    for entry in entries:
        token_ids = np.frombuffer(entry.token_ids, dtype="<i4").tolist()
        logprobs = np.frombuffer(entry.logprobs, dtype="<f4").tolist()
        _fill(message.logprobs.add(), token_ids, logprobs, entry.rank, text_alone)


def add_prompt_logprobs(message: pb.Prompt, columns: ipc.PromptLogprobs, text_alone: TextAlone) -> None:
    """Add one for each token of the prompt, an empty one for the first. May take seconds for a long prompt."""
    token_ids = np.frombuffer(columns.token_ids, dtype="<i4").reshape(-1, columns.width).tolist()
    logprobs = np.frombuffer(columns.logprobs, dtype="<f4").reshape(-1, columns.width).tolist()
    ranks = np.frombuffer(columns.ranks, dtype="<i4").tolist()
    message.logprobs.add()
    for row_ids, row_logprobs, rank in zip(token_ids, logprobs, ranks, strict=True):
        _fill(message.logprobs.add(), row_ids, row_logprobs, rank, text_alone)


def _fill(
    message: pb.TokenLogprobs, token_ids: list[int], logprobs: list[float], rank: int, text_alone: TextAlone
) -> None:
    """The first entry is of the token that stands there, the others of the likeliest ones."""
    message.logprob = logprobs[0]
    message.rank = rank
    for token_id, logprob in zip(token_ids[1:], logprobs[1:], strict=True):
        message.top.add(token_id=token_id, logprob=logprob, text=text_alone(token_id))
