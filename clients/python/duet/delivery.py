"""One request until all of its events have come, over as many calls as that takes."""

import uuid

from duet.errors import DuetError
from duet.output import Event
from duet.retry import Attempts, Resumptions, Retry
from duet.stream_order import StreamOrder
from protos.duet.inference.v1 import inference_pb2 as pb


class Delivery:
    """What to send, what of the answer is new, and when to send again; sending is the client's.

    A request with detach_seconds gets an id, and is resumed where its stream broke.
    """

    def __init__(self, request: pb.GenerateRequest, retry: Retry | None, timeout_s: float | None) -> None:
        """`retry` and `timeout_s` as in Client.stream."""
        self.request = request  # of the next call
        self.is_detachable = request.HasField("detach_seconds")
        self._order = StreamOrder(request.sampling.n or 1)
        if self.is_detachable:
            self._attempts: Attempts = Resumptions(request.detach_seconds, retry, timeout_s)
            if not request.HasField("request_id"):
                request.request_id = uuid.uuid4().hex
        else:
            self._attempts = Attempts(retry, timeout_s)

    @property
    def is_whole(self) -> bool:
        """Whether the last event has come."""
        return self._order.is_whole

    def remaining_s(self) -> float | None:
        """The timeout of the next call."""
        return self._attempts.remaining_s()

    def take(self, response: pb.GenerateResponse) -> Event | None:
        """The next event, None where an earlier call had it. Raises: StreamCut."""
        event = self._order.take(response)
        self._attempts.hear(is_new=event is not None)
        if self.is_detachable and isinstance(event, pb.Started):
            self.request.sampling.seed = event.seed
        return event

    def end(self) -> None:
        """The server closed the stream. Raises: StreamCut before the last event."""
        self._order.end()

    def delay_s(self, failure: DuetError) -> float | None:
        """Make the request ready for another call, now that one ended with `failure`.

        Returns the seconds until that call; None where none is needed, since the last event of a detachable request
        had come. Raises: `failure`, where there is none.
        """
        if self.is_detachable and self.is_whole:
            return None
        delay_s = self._attempts.delay_s(failure)
        if delay_s is None:
            raise failure
        offsets = self._order.resume()
        if self.is_detachable and len(offsets) == 1:
            self.request.resume_offset = offsets[0]
        elif self.is_detachable:
            self.request.resume_offsets[:] = offsets
        return delay_s
