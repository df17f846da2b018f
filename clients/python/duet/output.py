"""What comes back: the events of a stream, and the outputs that they make together."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from protos.duet.inference.v1 import inference_pb2 as pb

# One event of a stream: first Started, then Prompt where it was asked for, TokenDelta, last Finished; with n > 1 the
# deltas of all choices are mixed, each choice has a Finished, and the last of them ends the stream.
Event = pb.Started | pb.Prompt | pb.TokenDelta | pb.Finished

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}
_NS = 1e-9


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token at one position, as in vLLM."""

    logprob: float
    rank: int  # 1 for the likeliest token
    decoded_token: str | None  # None: a token that is none of the alternatives


@dataclasses.dataclass(frozen=True)
class Choice:
    """One finished continuation."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str  # stop, length or cancelled
    stop_token_id: int | None  # that ended it
    stop_string: str | None  # that ended it
    logprobs: list[dict[int, Logprob]] | None  # of each token: itself first, then the likeliest; None: not asked for
    output_tokens: int
    cached_tokens: int  # tokens of the prompt found in the prefix cache
    preemptions: int
    recoveries: int  # executors and scheduler cores lost and outlived
    queue_time_s: float
    time_to_first_token_s: float | None  # None: there was no token

    @property
    def cumulative_logprob(self) -> float | None:
        """The logarithm of the whole continuation's probability."""
        if self.logprobs is None:
            return None
        return sum(entry[token_id].logprob for token_id, entry in zip(self.token_ids, self.logprobs, strict=True))


@dataclasses.dataclass(frozen=True)
class Output(Choice):
    """A finished request: its first choice, and what belongs to all of them."""

    request_id: str
    seed: int
    prompt_tokens: int
    prompt: str  # its text; empty unless echo was asked for
    prompt_token_ids: list[int]  # empty unless echo or prompt_logprobs was asked for
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # of each token, None for the first
    choices: list[Choice]  # all n, in order of their indices

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Output":
        """Put the events of one whole stream together."""
        started, *rest = events
        assert isinstance(started, pb.Started)
        prompt = next((event for event in rest if isinstance(event, pb.Prompt)), pb.Prompt())
        ends = sorted((event for event in rest if isinstance(event, pb.Finished)), key=lambda event: event.index)
        deltas: dict[int, list[pb.TokenDelta]] = {finished.index: [] for finished in ends}
        for event in rest:
            if isinstance(event, pb.TokenDelta):
                deltas[event.index].append(event)
        choices = [_choice(deltas[finished.index], finished) for finished in ends]
        return cls(
            **vars(choices[0]),
            request_id=started.request_id,
            seed=started.seed,
            prompt_tokens=ends[0].usage.prompt_tokens,
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids),
            prompt_logprobs=_prompt_logprobs(prompt),
            choices=choices,
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON; `choices` only where there are several."""
        fields = dataclasses.asdict(self)
        if len(self.choices) == 1:
            del fields["choices"]
        return fields


def _choice(deltas: list[pb.TokenDelta], finished: pb.Finished) -> Choice:
    usage = finished.usage
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    entries = [entry for delta in deltas for entry in delta.logprobs]
    return Choice(
        index=finished.index,
        text="".join(delta.text for delta in deltas),
        token_ids=token_ids,
        finish_reason=_FINISH_REASONS[finished.reason],
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        stop_string=finished.stop_string if finished.HasField("stop_string") else None,
        logprobs=[_logprobs(*pair) for pair in zip(token_ids, entries, strict=True)] if entries else None,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        preemptions=usage.preemptions,
        recoveries=usage.recoveries,
        queue_time_s=usage.queue_time_ns * _NS,
        time_to_first_token_s=usage.time_to_first_token_ns * _NS if usage.time_to_first_token_ns else None,
    )


def _prompt_logprobs(prompt: pb.Prompt) -> list[dict[int, Logprob] | None] | None:
    if not prompt.logprobs:
        return None
    _, *others = (_logprobs(*pair) for pair in zip(prompt.token_ids, prompt.logprobs, strict=True))
    return [None, *others]


def _logprobs(token_id: int, entry: pb.TokenLogprobs) -> dict[int, Logprob]:
    text = next((other.text for other in entry.top if other.token_id == token_id), None)
    found = {token_id: Logprob(entry.logprob, entry.rank, text)}
    for rank, other in enumerate(entry.top, start=1):
        found.setdefault(other.token_id, Logprob(other.logprob, rank, other.text))
    return found
