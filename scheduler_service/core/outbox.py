"""What one front end is to be told, collected over a step and sent as one frame."""

from array import array

from scheduler_service.errors import DuetError
from scheduler_service.ipc import Failed, Finished, Outputs, PromptLogprobs, Started, TokenLogprobs


class Outbox:
    """Columns of new tokens and the rarer events beside them."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.streams = array("i")  # [n] the stream of each token
        self.token_ids = array("i")  # [n]
        self.started: list[Started] = []
        self.finished: list[Finished] = []
        self.failed: list[Failed] = []
        self.logprobs: list[TokenLogprobs] = []  # of those tokens whose streams asked
        self.prompt_logprobs: list[PromptLogprobs] = []

    def take(self) -> Outputs | None:
        """Everything collected since the last call, or None where there is nothing."""
        if not (self.streams or self.started or self.finished or self.failed):  # log-probabilities come with tokens
            return None
        outputs = Outputs(
            streams=self.streams.tobytes(),
            token_ids=self.token_ids.tobytes(),
            started=self.started,
            finished=self.finished,
            failed=self.failed,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
        self._clear()
        return outputs


def failure(stream: int, error: DuetError) -> Failed:
    """The error as the front end hears it."""
    return Failed(stream, error.code.name, type(error).__name__, error.message, error.field, error.retry_after_s)
