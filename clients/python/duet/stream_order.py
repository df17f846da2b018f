"""What a stream must look like, and what of it is new where a request was resumed."""

from duet.errors import StreamCut
from duet.output import Event
from protos.duet.inference.v1 import inference_pb2 as pb


class StreamOrder:
    """Watches the stream of `num_choices` continuations, over several calls where the request is resumed.

    In each call `started` is first, `prompt` may follow; then the offsets of each choice follow on until it ends; all
    of them end. The first call begins at 0, one that resumes at or before the tokens that are held already, and what
    it repeats is dropped.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self._last: str | None = None  # kind of the event before, in this call
        self._seen: set[str] = set()  # of started and prompt, in any call
        self._choices = [_Choice(index) for index in range(num_choices)]

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.has_ended for choice in self._choices)

    def resume(self) -> list[int]:
        """Be ready for another call of the same request; returns the offset to resume each choice at."""
        self._last = None
        return [choice.resume() for choice in self._choices]

    def take(self, response: pb.GenerateResponse) -> Event | None:
        """The event of the next message, or what of it is new: None where it only repeats.

        Raises: StreamCut where it does not follow the one before.
        """
        kind = response.WhichOneof("event")
        last, self._last = self._last, kind or "nothing"
        if kind == "delta" and last is not None:
            return self._choice(response.delta.index).take(response.delta)
        if kind == "started" and last is None:
            return response.started if self._is_first(kind) else None
        if kind == "prompt" and last == "started":
            return response.prompt if self._is_first(kind) else None
        if kind == "finished" and last is not None:
            return response.finished if self._choice(response.finished.index).end() else None
        raise StreamCut(f"the server sent {self._last} out of order")

    def end(self) -> None:
        """The server closed the stream. Raises: StreamCut before every choice has ended."""
        for choice in self._choices:
            if not choice.has_ended:
                told = f"after {choice.num_tokens} tokens of choice {choice.index}"
                raise StreamCut(f"the stream ended {told} without saying why")

    def _is_first(self, kind: str) -> bool:
        is_first = kind not in self._seen
        self._seen.add(kind)
        return is_first

    def _choice(self, index: int) -> "_Choice":
        if index >= len(self._choices) or self._choices[index].is_over:
            raise StreamCut(f"the server sent {self._last} of choice {index} out of order")
        return self._choices[index]


class _Choice:
    """One continuation: what is held of it, and where in it the call is.

    A server that held text back at the place where the last call broke begins a little before it, and its first delta
    may go beyond. What of its text is new is then known where the text before that delta is: at the start, and before
    and after the last delta that is held. Elsewhere only another call from the start can tell, which is asked for.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_tokens = 0  # held
        self.has_ended = False  # in whatever call
        self.is_over = False  # in this call
        self._num_chars = 0  # held
        self._last = 0, 0  # tokens and characters that were held before the last delta
        self._due: int | None = 0  # offset of this call's next delta; None: of a call that resumes, not known yet
        self._due_chars: int | None = 0  # characters before that delta; None: not known
        self._needs_start = False

    def resume(self) -> int:
        """Another call begins; returns the offset to ask it for."""
        self.is_over = False
        self._due = None
        return 0 if self._needs_start else self.num_tokens

    def take(self, delta: pb.TokenDelta) -> pb.TokenDelta | None:
        """What of `delta` is new; None: nothing. Raises: StreamCut."""
        if self._due is None and delta.offset <= self.num_tokens:
            self._due = delta.offset
            self._due_chars = {0: 0, self._last[0]: self._last[1], self.num_tokens: self._num_chars}.get(self._due)
        if delta.offset != self._due:
            due = self.num_tokens if self._due is None else self._due
            raise StreamCut(f"tokens from {due} were due, those from {delta.offset} came")
        self._due = delta.offset + len(delta.token_ids)
        num_repeated = self.num_tokens - delta.offset
        if num_repeated and self._due <= self.num_tokens:
            if self._due_chars is not None:
                self._due_chars += len(delta.text)
            return None
        if self.has_ended:
            raise StreamCut(f"the server sent tokens from {self.num_tokens} of choice {self.index}, which had ended")
        if num_repeated:
            delta = self._cut(delta, num_repeated)
        self._last = self.num_tokens, self._num_chars
        self.num_tokens = self._due
        self._num_chars = self._due_chars = self._num_chars + len(delta.text)
        self._needs_start = False
        return delta

    def end(self) -> bool:
        """The call says that the choice has ended; returns whether that is new."""
        is_new = not self.has_ended
        self.has_ended = self.is_over = True
        return is_new

    def _cut(self, delta: pb.TokenDelta, num_repeated: int) -> pb.TokenDelta:
        if self._due_chars is None:
            self._needs_start = True
            raise StreamCut(f"what is new of the text of the tokens from {delta.offset} cannot be told")
        return pb.TokenDelta(
            index=delta.index,
            offset=self.num_tokens,
            token_ids=delta.token_ids[num_repeated:],
            text=delta.text[self._num_chars - self._due_chars :],
            logprobs=delta.logprobs[num_repeated:],
        )
