"""One continuation of a prompt: from the core's tokens to the messages that a client reads."""

from collections.abc import Callable, Set
from typing import cast

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend.detokenizer import Detokenizer
from scheduler_service.frontend.logprobs import TextAlone, add_token_logprobs
from scheduler_service.frontend.stop_strings import StoppingDetokenizer
from scheduler_service.frontend.streams import TokenStream


class Choice:
    """Tokens taken from a stream, their text, and what was counted.

    Tokens whose text is held back are held back too, with their log-probabilities.
    """

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        detokenizer: Detokenizer | StoppingDetokenizer,
        *,
        stop_token_ids: Set[int],
        text_alone: TextAlone | None,
        on_stop_string: Callable[[], None],
        resume_offset: int,
    ) -> None:
        """`text_alone` is given where log-probabilities were asked for; `on_stop_string` is called once, if at all.

        The client holds `resume_offset` tokens already.
        """
        self.stream = stream
        self._index = index
        self._detokenizer = detokenizer
        self._stopping = detokenizer if isinstance(detokenizer, StoppingDetokenizer) else None
        self._stop_token_ids = stop_token_ids
        self._stop_string: str | None = None  # the one that was completed; whatever comes after it is dropped
        self._text_alone = text_alone
        self._on_stop_string = on_stop_string
        self._resume_offset = resume_offset
        self._offset = 0  # tokens sent, or held by the client

    def take_delta(self, *, is_last: bool) -> pb.GenerateResponse | None:
        """The new tokens that may be sent now; all that are left where `is_last` says that the stream has ended."""
        token_ids = self.stream.take()
        if self._stop_string is not None:
            return None
        # A stop token is the last one: it goes out with all that was held back, unspoken.
        stop = token_ids.pop() if token_ids and token_ids[-1] in self._stop_token_ids else None
        released, text = self._push(token_ids)
        if is_last or stop is not None:
            rest, rest_text = self._detokenizer.flush()
            released, text = released + rest, text + rest_text
        if self._stopping is not None and self._stopping.match is not None:
            self._stop_string = self._stopping.match
            self._on_stop_string()
        elif stop is not None:
            released.append(stop)
        if self._offset + len(released) <= self._resume_offset:
            self._pass_over(released)
            released = []
        return self._delta(released, text) if released else None

    def _push(self, token_ids: list[int]) -> tuple[list[int], str]:
        """Detokenize; what the client holds one by one, since only so every offset is met that it may have."""
        num_pushed = 0
        while num_pushed < len(token_ids) and self._offset < self._resume_offset:
            released, text = self._detokenizer.push(token_ids[num_pushed : num_pushed + 1])
            num_pushed += 1
            if self._offset + len(released) > self._resume_offset:
                rest, rest_text = self._detokenizer.push(token_ids[num_pushed:])
                return released + rest, text + rest_text
            self._pass_over(released)
        return self._detokenizer.push(token_ids[num_pushed:])

    def _pass_over(self, token_ids: list[int]) -> None:
        self._offset += len(token_ids)
        if self._text_alone is not None:
            del self.stream.logprobs[: len(token_ids)]

    def finished(self, finished: ipc.Finished) -> pb.GenerateResponse:
        """The last message, of what the core says and of the stop string, which the core does not know."""
        response = pb.GenerateResponse()
        message = response.finished
        message.index = self._index
        message.usage.prompt_tokens = finished.prompt_tokens
        message.usage.cached_tokens = finished.cached_tokens
        message.usage.preemptions = finished.preemptions
        message.usage.recoveries = finished.recoveries
        message.usage.queue_time_ns = finished.queue_time_ns
        message.usage.time_to_first_token_ns = finished.time_to_first_token_ns
        if self._stop_string is not None:
            message.reason = pb.FINISH_REASON_STOP
            message.stop_string = self._stop_string
            message.usage.output_tokens = self._offset
        else:
            message.reason = cast(pb.FinishReason, finished.reason)
            message.usage.output_tokens = finished.output_tokens
            if finished.stop_token_id is not None:
                message.stop_token_id = finished.stop_token_id
        return response

    def _delta(self, token_ids: list[int], text: str) -> pb.GenerateResponse:
        response = pb.GenerateResponse()  # filled in place, at less than half the cost of nested constructors
        delta = response.delta
        delta.index = self._index
        delta.offset = self._offset
        delta.token_ids.extend(token_ids)
        delta.text = text
        if self._text_alone is not None:
            add_token_logprobs(delta, self.stream.logprobs[: len(token_ids)], self._text_alone)
        self._pass_over(token_ids)
        return response
