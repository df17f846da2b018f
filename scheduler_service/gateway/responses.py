"""Our events as the gateway's messages: chunks and an end for each choice, or one whole answer for each choice."""

from collections.abc import Iterator, Set

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.duet.inference.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
}


class Responses:
    """Turns the events of one request into messages.

    While streaming, each delta is a chunk, and a message without tokens ends a choice. Otherwise one message for each
    choice holds all of it.
    """

    def __init__(self, request: pb.GenerateRequest, *, is_streamed: bool) -> None:
        self._is_streamed = is_streamed
        self._stop_token_ids: Set[int] = frozenset(request.stop.stop_token_ids)
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._input_logprobs: vllm.InputLogProbs | None = None
        self._begun: set[int] = set()  # choices of which a chunk was made
        self._whole: dict[int, vllm.GenerateComplete] = {}

    def of(self, event: pb.GenerateResponse) -> Iterator[vllm.GenerateResponse]:
        """What is to be sent of one event."""
        match event.WhichOneof("event"):
            case "started":
                self._num_prompt_tokens = event.started.prompt_tokens
                self._num_cached_tokens = event.started.cached_tokens
            case "prompt":
                self._input_logprobs = _input_logprobs(event.prompt)
            case "delta" if self._is_streamed:
                yield self._chunk(event.delta)
            case "delta":
                whole = self._whole.setdefault(event.delta.index, vllm.GenerateComplete())
                whole.output_ids.extend(event.delta.token_ids)
                _add_logprobs(whole, event.delta)
            case "finished":
                yield self._complete(event.finished)

    def _chunk(self, delta: pb.TokenDelta) -> vllm.GenerateResponse:
        response = vllm.GenerateResponse()
        chunk = response.chunk
        chunk.index = delta.index
        chunk.token_ids.extend(delta.token_ids)
        chunk.prompt_tokens = self._num_prompt_tokens
        chunk.completion_tokens = len(delta.token_ids)  # of this chunk, as vLLM counts them
        chunk.cached_tokens = self._num_cached_tokens
        _add_logprobs(chunk, delta)
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            if self._input_logprobs is not None:
                chunk.input_logprobs.CopyFrom(self._input_logprobs)
        return response

    def _complete(self, finished: pb.Finished) -> vllm.GenerateResponse:
        complete = self._whole.pop(finished.index, None) or vllm.GenerateComplete()
        complete.index = finished.index
        complete.finish_reason = _FINISH_REASONS[finished.reason]
        complete.prompt_tokens = finished.usage.prompt_tokens
        complete.completion_tokens = finished.usage.output_tokens
        complete.cached_tokens = finished.usage.cached_tokens
        if finished.HasField("stop_string"):
            complete.matched_stop_str = finished.stop_string
        elif finished.HasField("stop_token_id") and finished.stop_token_id in self._stop_token_ids:
            complete.matched_token_id = finished.stop_token_id  # the model's own end of sequence is no match
        if self._input_logprobs is not None and finished.index not in self._begun:
            complete.input_logprobs.CopyFrom(self._input_logprobs)
        return vllm.GenerateResponse(complete=complete)


def _add_logprobs(message: vllm.GenerateStreamChunk | vllm.GenerateComplete, delta: pb.TokenDelta) -> None:
    if not delta.logprobs:
        return
    columns = message.output_logprobs
    columns.token_ids.extend(delta.token_ids)
    for entry in delta.logprobs:
        columns.token_logprobs.append(entry.logprob)
        _add_top(columns.top_logprobs.add(), entry)


def _input_logprobs(prompt: pb.Prompt) -> vllm.InputLogProbs | None:
    """The first token has none."""
    if not prompt.logprobs:
        return None
    columns = vllm.InputLogProbs()
    columns.token_ids.extend(prompt.token_ids)
    for index, entry in enumerate(prompt.logprobs):
        column = columns.token_logprobs.add()
        if index:
            column.value = entry.logprob
        _add_top(columns.top_logprobs.add(), entry)
    return columns


def _add_top(top: vllm.TopLogProbs, entry: pb.TokenLogprobs) -> None:
    for alternative in entry.top:
        top.token_ids.append(alternative.token_id)
        top.values.append(alternative.logprob)
