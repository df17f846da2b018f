"""Those who wait for the core's streams, and know what each request gets when it runs alone and undisturbed."""

import dataclasses
from array import array

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.ipc import Failed, Finished
from tests.property.fake_model import EMPTY_PREFIX, choose, extend_hash, finish_reason, mask_for, next_value

EXPECTED_ERRORS = "ContextLengthExceeded DeadlineExceeded ExecutorUnavailable InternalError InvalidRequest".split()


@dataclasses.dataclass
class Client:
    """Who waits for a request, and what it was told so far."""

    request: Request
    expected_tokens: list[int]  # of an undisturbed run
    expected_reason: int
    expected_stop_token: int | None
    is_refused: bool = False  # the constraint is held to be wrong
    tokens: list[int] = dataclasses.field(default_factory=list)
    started: bool = False
    end: str | None = None  # how its stream ended


def run_alone(request: Request, vocab_size: int) -> tuple[list[int], int, int | None]:
    """The tokens that follow the prompt, why they end, and the stop token."""
    prefix, generated, reason, seed = EMPTY_PREFIX, list[int](), 0, request.sampling.seed
    for token in request.token_ids:
        prefix = extend_hash(prefix, token)
    while not reason:
        mask = None if request.constraint is None else mask_for(seed, tuple(generated), vocab_size)
        if mask == 0:
            return generated, pb.FINISH_REASON_STOP, None
        token = choose(next_value(prefix, seed), mask, vocab_size)
        generated.append(token)
        prefix = extend_hash(prefix, token)
        num_tokens = request.num_prompt_tokens + len(generated)
        reason = finish_reason(token, num_tokens, set(request.stop_token_ids), request.max_total_tokens)
    return generated, reason, generated[-1] if reason == pb.FINISH_REASON_STOP else None


class Clients:
    """Every client, by stream, behind two front ends. A request's seed is its stream."""

    def __init__(self, vocab_size: int) -> None:
        self.outboxes = [Outbox(), Outbox()]
        self.all: list[Client] = []
        self._vocab_size = vocab_size

    def add(self, request: Request) -> Client:
        """Wait for the request's stream."""
        assert request.stream == request.sampling.seed == len(self.all)
        client = Client(request, *run_alone(request, self._vocab_size))
        self.all.append(client)
        return client

    def is_waiting(self, stream: int) -> bool:
        """Whether the stream goes on."""
        return self.all[stream].end is None

    def read(self, now: float, failing_seeds: set[int]) -> list[tuple[int, int]]:
        """Read what the core has to say; returns the new tokens as (stream, token)."""
        news: list[tuple[int, int]] = []
        for outbox in self.outboxes:
            outputs = outbox.take()
            if outputs is None:
                continue
            for started in outputs.started:
                client = self.all[started.stream]
                assert (client.started, client.end) == (False, None), "a stream starts twice"
                assert started.prompt_tokens == client.request.num_prompt_tokens > started.cached_tokens
                client.started = True
            for stream, token in zip(array("i", outputs.streams), array("i", outputs.token_ids), strict=True):
                client = self.all[stream]
                assert (client.started, client.end) == (True, None), "a token outside of its stream"
                client.tokens.append(token)
                assert client.tokens == client.expected_tokens[: len(client.tokens)], "not the tokens of a run alone"
                news.append((stream, token))
            for finished in outputs.finished:
                self._finish(self.all[finished.stream], finished)
            for failed in outputs.failed:
                self._fail(self.all[failed.stream], failed, now, failing_seeds)
        return news

    def _finish(self, client: Client, event: Finished) -> None:
        assert client.end is None, "a stream ended twice"
        client.end = pb.FinishReason.Name(event.reason)
        assert (event.prompt_tokens, event.output_tokens) == (client.request.num_prompt_tokens, len(client.tokens))
        if event.reason == pb.FINISH_REASON_CANCELLED:
            return
        assert client.tokens == client.expected_tokens, "the stream ended early"
        assert event.reason == client.expected_reason, "another reason than that of a run alone"
        assert event.stop_token_id == client.expected_stop_token

    def _fail(self, client: Client, event: Failed, now: float, failing_seeds: set[int]) -> None:
        assert client.end is None, "a stream ended twice"
        client.end = event.reason
        assert event.reason in EXPECTED_ERRORS, f"failed by {event.reason}"
        if event.reason == "InternalError":
            assert client.request.sampling.seed in failing_seeds, "one request's error ended another"
        if event.reason == "InvalidRequest":
            assert (client.is_refused, event.field) == (True, "constraint"), "nothing is wrong with its constraint"
        if event.reason == "DeadlineExceeded":
            assert (client.request.deadline or 0.0) <= now, "the deadline is still to come"
