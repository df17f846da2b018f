"""What a front end keeps of a request while its streams live, so that another core can go on with it."""

import msgspec

from scheduler_service import ipc
from scheduler_service.errors import DuetError
from scheduler_service.frontend.streams import TokenStream


class Holding:
    """A request and its streams, one for each choice."""

    def __init__(self, submit: ipc.Submit, streams: list[TokenStream], model: ipc.ModelInfo) -> None:
        """`model` tells how long the request may become, where it does not say so itself."""
        most = min(model.max_model_len, model.max_cache_tokens)
        num_prompt_tokens = len(submit.token_ids) // 4  # int32
        self.streams = streams
        self._submit = submit
        self._max_total_tokens = most if submit.max_tokens is None else num_prompt_tokens + submit.max_tokens
        self._num_cores_lost = 0

    @property
    def is_alive(self) -> bool:
        """Whether any stream goes on; an error of one ends them all."""
        ends = [stream.end for stream in self.streams]
        return None in ends and not any(isinstance(end, DuetError) for end in ends)

    def resubmission(self) -> ipc.Submit:
        """What the next core is told; of choices that have ended only what another client may yet ask for."""
        self._num_cores_lost += 1
        held = [(index, stream) for index, stream in enumerate(self.streams) if self._is_held(stream)]
        return msgspec.structs.replace(
            self._submit,
            streams=[stream.number for _, stream in held],
            progress=[self._progress(index, stream) for index, stream in held],
        )

    def _progress(self, index: int, stream: TokenStream) -> ipc.Progress:
        started = stream.started
        wants_prompt_logprobs = index == 0 and self._submit.sampling.prompt_logprobs is not None
        return ipc.Progress(
            choice_index=index,
            token_ids=stream.token_ids.tobytes(),
            max_total_tokens=self._max_total_tokens,
            was_told_start=started is not None,
            cached_tokens=started.cached_tokens if started else 0,
            queue_time_ns=started.queue_time_ns if started else 0,
            first_token_time=stream.first_token_time,
            recoveries=self._num_cores_lost,
            lacks_prompt_logprobs=wants_prompt_logprobs and stream.prompt_logprobs is None,
            end=stream.end if isinstance(stream.end, ipc.Finished) else None,
        )

    def _is_held(self, stream: TokenStream) -> bool:
        return stream.end is None or (isinstance(stream.end, ipc.Finished) and self._submit.detach_s is not None)
