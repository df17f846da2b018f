"""Snapshots of a server, and the rates between them."""

import collections
import dataclasses

from duet.client import Client
from duet.errors import Unavailable
from protos.duet.inference.v1 import inference_pb2 as pb

NUM_KEPT = 48  # rates, for the view of their course


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the server said at one moment."""

    server: pb.GetServerResponse
    model: pb.GetModelResponse | None  # None: no executor has connected yet

    @classmethod
    def take(cls, client: Client) -> "Snapshot":
        """Ask the server. Raises: DuetError."""
        server = client.server()
        try:
            return cls(server, client.model())
        except Unavailable:
            return cls(server, None)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Between two snapshots, each a second."""

    prefill_tokens: float
    decode_tokens: float
    steps: float
    hit_rate: float | None  # share of the admitted prompt tokens that was cached; None: none was admitted

    @classmethod
    def between(cls, before: pb.Load, after: pb.Load) -> "Rates":
        """Those of the time between two snapshots of the same core."""
        elapsed_s = max(after.uptime_seconds - before.uptime_seconds, 1e-9)
        prompt_tokens = after.prompt_tokens_total - before.prompt_tokens_total
        return cls(
            prefill_tokens=(after.prefill_tokens_total - before.prefill_tokens_total) / elapsed_s,
            decode_tokens=(after.output_tokens_total - before.output_tokens_total) / elapsed_s,
            steps=(after.steps_total - before.steps_total) / elapsed_s,
            hit_rate=(after.cached_tokens_total - before.cached_tokens_total) / prompt_tokens
            if prompt_tokens
            else None,
        )


class History:
    """The last snapshot and the course of the rates."""

    def __init__(self) -> None:
        self.course: collections.deque[Rates] = collections.deque(maxlen=NUM_KEPT)  # oldest first
        self._last: pb.Load | None = None

    def add(self, load: pb.Load) -> Rates:
        """The rates since the last snapshot; since its start for the first one of a core."""
        last, self._last = self._last, load
        if last is None or last.uptime_seconds > load.uptime_seconds:  # the core was started anew
            return Rates.between(pb.Load(), load)
        rates = Rates.between(last, load)
        self.course.append(rates)
        return rates
