"""A front end between two deaths: the real end of the core's socket, and the real streams that clients read."""

import asyncio
from typing import Any, cast

import msgspec

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend.choice import Choice
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.holding import Holding
from scheduler_service.frontend.streams import TokenStream


class _PlainText:
    """A detokenizer that holds nothing back and has no text to tell."""

    def push(self, token_ids: list[int]) -> tuple[list[int], str]:
        return token_ids, ""

    def flush(self) -> tuple[list[int], str]:
        return [], ""


class FrontEnd:
    """Its process; `core` reads and writes through whatever Link there is."""

    def __init__(self) -> None:
        self.core = CoreClient("", 60.0)
        self.calls: list[Call] = []  # those that go on, as far as it knows

    @property
    def model(self) -> ipc.ModelInfo | None:
        """What a call waits for before it is submitted."""
        return None if self.core._writer is None or self.core.status is None else self.core.status.model

    def submit(self, submit: ipc.Submit, offsets: list[int]) -> "Call":
        """As Generator does, once there is a core and a model; the client holds so many tokens of each choice."""
        assert self.model is not None
        assert self.core._writer is not None
        streams = self.core.new_streams(len(offsets), asyncio.Event())
        submit = msgspec.structs.replace(submit, streams=[stream.number for stream in streams])
        self.core._streams.update((stream.number, stream) for stream in streams)
        self.core._holdings[streams[0].number] = Holding(submit, streams, self.model)
        self.core._writer.write(ipc.encode_frame(submit))
        call = Call(self, submit, streams, offsets)
        self.calls.append(call)
        return call

    def cancel(self, submit: ipc.Submit) -> None:
        """Cancel by id; the reply is for nobody."""
        if self.core._writer is not None:
            self.core._writer.write(ipc.encode_frame(ipc.Cancel(-1, submit.tenant, submit.request_id)))


class Call:
    """One stream of Generate."""

    def __init__(self, front_end: FrontEnd, submit: ipc.Submit, streams: list[TokenStream], offsets: list[int]) -> None:
        self.front_end = front_end
        self.streams = streams
        self.choices = [
            Choice(
                index,
                stream,
                cast(Any, _PlainText()),
                stop_token_ids=frozenset(submit.stop_token_ids),
                text_alone=str,
                on_stop_string=lambda: None,
                resume_offset=offset,
            )
            for index, (stream, offset) in enumerate(zip(streams, offsets, strict=True))
        ]
        self._started: list[ipc.Started | None] = [None for _ in streams]  # what was seen of each
        self._detaches = submit.detach_s is not None

    def take(self, index: int) -> tuple[pb.TokenDelta | None, ipc.Finished | Exception | None]:
        """What is new of a choice."""
        stream = self.streams[index]
        assert self._started[index] in (None, stream.started), "a stream starts twice"
        self._started[index] = stream.started
        end = stream.end  # looked at before the tokens, as Generator does
        response = self.choices[index].take_delta(is_last=end is not None)
        return None if response is None else response.delta, end

    def close(self) -> None:
        """The front end sees that the client is gone, or the stream has ended."""
        self.front_end.calls.remove(self)
        self.front_end.core.close_streams(self.streams, detach=self._detaches)
