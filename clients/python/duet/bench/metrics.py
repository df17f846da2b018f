"""Figures of a run out of the times at which its messages came."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """The messages of one stream; times are time.perf_counter() seconds, the same clock in every process."""

    sent: float
    times: list[float]  # of the messages that hold tokens
    num_tokens: list[int]  # in each of them
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # of the prompt, as the server tells; None: it does not
    lag_s: float = 0.0  # from when the request was due to when it was sent: what the client adds
    counted_by: str = "token ids"  # what `num_tokens` rests on


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of a scenario. Rates are of all streams together; None stands where nothing can be said."""

    requests: int
    prompt_tokens: int
    cached_tokens: int | None  # prompt tokens found in the prefix cache
    output_tokens: int
    elapsed_s: float  # from the first request to the last token
    tokens_per_s: float  # generated tokens over `elapsed_s`
    total_tokens_per_s: float  # with those of the prompts
    requests_per_s: float
    decode_tokens_per_s: float | None  # after the last stream's first message
    step_s: float | None  # for a token of every stream, while all of them run
    ttft_p50_s: float  # from a request to its first message with tokens
    ttft_p90_s: float
    ttft_p99_s: float
    gap_p50_s: float | None  # between two messages of a stream
    gap_p99_s: float | None
    gap_max_s: float | None
    tpot_p50_s: float | None  # a stream's time for each token after its first message
    tpot_p99_s: float | None
    lag_max_s: float  # how late the client sent a request


def measure(arrivals: Sequence[Arrivals]) -> Measurement:
    """The figures of one run."""
    end = max(stream.times[-1] for stream in arrivals)
    elapsed_s = end - min(stream.sent for stream in arrivals)
    output_tokens = sum(sum(stream.num_tokens) for stream in arrivals)
    prompt_tokens = sum(stream.prompt_tokens for stream in arrivals)
    cached = [stream.cached_tokens for stream in arrivals if stream.cached_tokens is not None]
    all_started = max(stream.times[0] for stream in arrivals)
    first_finished = min(stream.times[-1] for stream in arrivals)
    decoded = _tokens_between(arrivals, all_started, end)
    stepped = _tokens_between(arrivals, all_started, first_finished)
    ttft = sorted(first_token_times(arrivals))
    gaps = sorted(message_gaps(arrivals))
    tpot = sorted(
        (stream.times[-1] - stream.times[0]) / later for stream in arrivals if (later := sum(stream.num_tokens[1:]))
    )
    return Measurement(
        requests=len(arrivals),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(cached) if len(cached) == len(arrivals) else None,
        output_tokens=output_tokens,
        elapsed_s=elapsed_s,
        tokens_per_s=output_tokens / elapsed_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / elapsed_s,
        requests_per_s=len(arrivals) / elapsed_s,
        decode_tokens_per_s=decoded / (end - all_started) if decoded else None,
        step_s=(first_finished - all_started) * len(arrivals) / stepped if stepped else None,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p90_s=percentile(ttft, 90),
        ttft_p99_s=percentile(ttft, 99),
        gap_p50_s=percentile(gaps, 50) if gaps else None,
        gap_p99_s=percentile(gaps, 99) if gaps else None,
        gap_max_s=gaps[-1] if gaps else None,
        tpot_p50_s=percentile(tpot, 50) if tpot else None,
        tpot_p99_s=percentile(tpot, 99) if tpot else None,
        lag_max_s=max(stream.lag_s for stream in arrivals),
    )


def first_token_times(arrivals: Iterable[Arrivals]) -> list[float]:
    """Seconds from each request to its first message."""
    return [stream.times[0] - stream.sent for stream in arrivals]


def message_gaps(arrivals: Iterable[Arrivals]) -> list[float]:
    """Seconds between two messages of a stream, for all streams."""
    return [later - sooner for stream in arrivals for sooner, later in itertools.pairwise(stream.times)]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ascending values lie, interpolated between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(results: Sequence[Measurement]) -> dict[str, float | None]:
    """The median of each figure over several runs."""
    medians: dict[str, float | None] = {}
    for field in dataclasses.fields(Measurement):
        known = [value for result in results if (value := getattr(result, field.name)) is not None]
        medians[field.name] = statistics.median(known) if known else None
    return medians


def _tokens_between(arrivals: Iterable[Arrivals], after: float, until: float) -> int:
    return sum(
        count
        for stream in arrivals
        for time_, count in zip(stream.times, stream.num_tokens, strict=True)
        if after < time_ <= until
    )
