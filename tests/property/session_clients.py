"""Those who wait for streams, and know what each request gets when it runs alone and undisturbed."""

import dataclasses
from array import array

import numpy as np

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import DuetError
from tests.property.fake_model import EMPTY_PREFIX, choose, extend_hash, finish_reason, mask_for, name_of, next_value
from tests.property.session_frontend import Call, FrontEnd


@dataclasses.dataclass
class Undisturbed:
    """What a choice gets when nothing else runs and nothing dies."""

    tokens: list[int]
    reason: int
    stop_token: int | None


def run_alone(submit: ipc.Submit, choice_index: int, vocab_size: int) -> Undisturbed:
    """The tokens that follow the prompt, why they end, and the stop token."""
    assert submit.max_tokens is not None
    name, prefix, generated, reason = name_of(submit.sampling.seed, choice_index), EMPTY_PREFIX, list[int](), 0
    for token in array("i", submit.token_ids):
        prefix = extend_hash(prefix, token)
    while not reason:
        mask = None if submit.constraint is None else mask_for(name, tuple(generated), vocab_size)
        if mask == 0:
            return Undisturbed(generated, pb.FINISH_REASON_STOP, None)
        token = choose(next_value(prefix, name), mask, vocab_size)
        generated.append(token)
        prefix = extend_hash(prefix, token)
        reason = finish_reason(token, len(generated), set(submit.stop_token_ids), submit.max_tokens)
    return Undisturbed(generated, reason, generated[-1] if reason == pb.FINISH_REASON_STOP else None)


@dataclasses.dataclass
class Known:
    """What the test has done, by which errors are judged."""

    now: float
    failed_names: set[int]  # of choices whose own steps failed
    convicted_names: set[int]  # of choices with whom alone an executor died


class Client:
    """One who wants a request's tokens, each once, over as many calls as that takes."""

    def __init__(self, submit: ipc.Submit, num_choices: int, vocab_size: int) -> None:
        self.submit = submit  # without streams
        self.names = [name_of(submit.sampling.seed, index) for index in range(num_choices)]
        self.undisturbed = [run_alone(submit, index, vocab_size) for index in range(num_choices)]
        self.held: list[list[int]] = [[] for _ in self.names]  # [num_choices][num_tokens]
        self.ends: list[str | None] = [None for _ in self.names]  # [num_choices] why each ended
        self.end: str | None = None  # how it all ended; None: it goes on, or will
        self.call: Call | None = None  # None: it is away
        self.is_refused = False  # its constraint is held to be wrong
        self.is_cancelled = False
        self.is_stopped = False  # a stop string was found
        self.shares_id = False  # with another client, by mistake
        self.comes_back = False

    @property
    def num_held(self) -> int:
        """Tokens of all choices."""
        return sum(map(len, self.held))

    def ask(self, front_end: FrontEnd, submit: ipc.Submit) -> None:
        """Ask for what it does not hold."""
        assert self.call is None
        self.call = front_end.submit(submit, [len(tokens) for tokens in self.held])

    def leave(self) -> None:
        """Hang up; without `detach_s`, for good."""
        assert self.call is not None
        self.call.close()
        self.lose_touch()

    def lose_touch(self) -> None:
        """Be cut off, whether or not the front end knows."""
        self.call = None
        if self.submit.detach_s is None:
            self.end = "dropped"
        elif not self.comes_back:
            self.end = "gone"

    def read(self, known: Known) -> None:
        """Take what the call brings, and check it."""
        call = self.call
        if call is None:
            return
        for index in range(len(self.held)):
            delta, end = call.take(index)
            if delta is not None:
                self._read_delta(call, index, delta)
            if isinstance(end, DuetError):
                self._fail(end, call, known)
                return
            if isinstance(end, ipc.Finished) and self.ends[index] is None:
                self._finish(index, end)
        if None not in self.ends:
            self.end = self.ends[0]
            call.close()
            self.call = None

    def _read_delta(self, call: Call, index: int, delta: pb.TokenDelta) -> None:
        held, stream = self.held[index], call.streams[index]
        assert delta.offset == len(held), "tokens are lost or come twice"
        assert stream.started is not None, "a token before the start of its stream"
        num_prompt_tokens = len(self.submit.token_ids) // 4
        assert stream.started.prompt_tokens == num_prompt_tokens > stream.started.cached_tokens, "another prompt"
        held.extend(delta.token_ids)
        assert held == self.undisturbed[index].tokens[: len(held)], "not the tokens of a run alone"
        if self.submit.sampling.logprobs is not None:
            places = [-entry.logprob for entry in delta.logprobs]
            assert places == list(range(delta.offset, len(held))), "log-probabilities of other tokens"
        if self.submit.sampling.prompt_logprobs is not None:
            self._check_prompt(call)

    def _check_prompt(self, call: Call) -> None:
        """Every call is told of the prompt before the first token of any choice."""
        columns, num_prompt_tokens = call.streams[0].prompt_logprobs, len(self.submit.token_ids) // 4
        assert columns is not None, "a token before what was asked of the prompt"
        places = (-np.frombuffer(columns.logprobs, dtype="<f4")).tolist()
        expected = [at for at in range(1, num_prompt_tokens) for _ in range(columns.width)]
        assert places == expected, "log-probabilities of another prompt"

    def _finish(self, index: int, event: ipc.Finished) -> None:
        held, undisturbed = self.held[index], self.undisturbed[index]
        self.ends[index] = pb.FinishReason.Name(event.reason)
        assert event.prompt_tokens == len(self.submit.token_ids) // 4, "another prompt"
        if self.is_cancelled and event.reason == pb.FINISH_REASON_CANCELLED:
            return
        if self.is_stopped and (event.reason, event.stop_token_id) == (pb.FINISH_REASON_STOP, None):
            return
        assert event.output_tokens == len(held), "an end before all tokens were told"
        assert held == undisturbed.tokens, "the stream ended early"
        assert event.reason == undisturbed.reason, "another reason than that of a run alone"
        assert event.stop_token_id == undisturbed.stop_token, "another stop token"

    def _fail(self, error: DuetError, call: Call, known: Known) -> None:
        """One choice's error ends the request, as Generator has it."""
        kind = type(error).__name__
        is_new = call.streams[0].started is None
        expected = {
            "ContextLengthExceeded": is_new,
            "DeadlineExceeded": (self.submit.deadline or known.now) <= known.now,
            "DuplicateRequest": self.shares_id,
            "ExecutorUnavailable": True,
            "InternalError": not (known.failed_names | known.convicted_names).isdisjoint(self.names),
            "InvalidRequest": self.is_refused and error.field == "constraint",
            "QueueFull": is_new,
        }
        assert expected.get(kind, False), f"failed by {kind}: {error.message}"
        call.close()
        self.call = None
        if kind == "QueueFull" and self.num_held:
            return  # it was forgotten meanwhile, and is generated anew at the next try
        self.end = "refused" if kind == "QueueFull" else kind
