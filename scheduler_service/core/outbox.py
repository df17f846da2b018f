"""What one front end is to be told, collected over a step and sent as one frame."""

from array import array

from scheduler_service.ipc import Failed, Finished, Outputs, Started


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

    def take(self) -> Outputs | None:
        """Everything collected since the last call, or None where there is nothing."""
        if not (self.streams or self.started or self.finished or self.failed):
            return None
        outputs = Outputs(self.streams.tobytes(), self.token_ids.tobytes(), self.started, self.finished, self.failed)
        self._clear()
        return outputs
