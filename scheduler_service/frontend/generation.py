"""Requests to events: what every servicer of this front end generates with."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.errors import DeadlineExceeded, DuetError, ExecutorUnavailable, ServerDraining
from scheduler_service.frontend import validation
from scheduler_service.frontend.choice import Choice
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.opening import Opening
from scheduler_service.frontend.prompt import check_token_ids, encode_prompt
from scheduler_service.frontend.stop_strings import StoppingDetokenizer
from scheduler_service.frontend.streams import TokenStream
from scheduler_service.frontend.submit import build_submit
from scheduler_service.frontend.tokenizer import ModelTokenizer
from scheduler_service.grammar_source import to_grammar
from servicekit.fault_points import reach

_RETRY_AFTER_S = 1.0  # what a client is told when the server stops
_LONG_REQUEST_BYTES = 4096  # beyond this, tokenizing would hold up the other streams


class Generator:
    """Validates, tokenizes and submits requests, and turns the core's news into events."""

    def __init__(self, core: CoreClient, tokenizer: ModelTokenizer, *, max_pause_s: float) -> None:
        """A request waits at most `max_pause_s` seconds for the first executor."""
        self._core = core
        self._tokenizer = tokenizer
        self._max_pause_s = max_pause_s
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._num_active = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_stopping = False

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_stopping or (self._core.status is not None and self._core.status.draining)

    async def drain(self) -> None:
        """Refuse requests from here on, and wait until none is left."""
        self._is_stopping = True
        self._core.announce_change()  # watchers of health are told
        await self._is_idle.wait()

    async def events(
        self, request: pb.GenerateRequest, *, time_remaining_s: float | None, tenant: str = ""
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield `started`, the prompt where it was asked for, deltas, and `finished` for each choice.

        What happens while the caller does not ask for the next event is told in one delta for each choice, and a stop
        string in it is found only then. Closing the generator ends the request, or leaves it to whoever resumes it.
        The request's id is the `tenant`'s. Raises: DuetError.
        """
        arrival = time.monotonic()
        validation.check_fields(request, self._tokenizer.name)
        if self._is_stopping:
            raise ServerDraining("the server is stopping", retry_after_s=_RETRY_AFTER_S)
        self._num_active += 1
        self._is_idle.clear()
        try:
            async with contextlib.aclosing(self._events(request, arrival, time_remaining_s, tenant)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._is_idle.set()

    async def _events(
        self, request: pb.GenerateRequest, arrival: float, time_remaining_s: float | None, tenant: str
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        model = await self._wait_for_model(time_remaining_s)
        token_ids, constraint = await self._prepare(request, model)
        news = asyncio.Event()
        streams = self._core.new_streams(request.sampling.n or 1, news)
        try:
            submit = build_submit(
                request,
                token_ids,
                streams=[stream.number for stream in streams],
                eos_token_ids=self._tokenizer.eos_token_ids,
                vocab_size=model.vocab_size,
                arrival=arrival,
                deadline=None if time_remaining_s is None else arrival + time_remaining_s,
                constraint=constraint,
                tenant=tenant,
            )
            await self._core.submit(submit, streams, model)
            opening = Opening(request, submit, token_ids, streams, self._tokenizer, self._pool)
            choices = self._choices(request, submit, streams)
            while choices:
                await news.wait()
                news.clear()
                if not opening.is_over:
                    for event in await opening.take():
                        yield event
                for choice in tuple(choices):
                    end = choice.stream.end  # looked at before the tokens: more may come whenever an event is taken
                    delta = choice.take_delta(is_last=end is not None)
                    if delta is not None:
                        yield delta
                    if end is None:
                        continue
                    if isinstance(end, DuetError):
                        if end.field == "constraint":  # the core knows it as a grammar, whatever its language was
                            end.field = f"constraint.{request.constraint.WhichOneof('language')}"
                        raise end
                    choices.remove(choice)
                    reach("frontend.finished")
                    yield choice.finished(end)
        finally:
            self._core.close_streams(streams, detach=request.HasField("detach_seconds"))

    async def _wait_for_model(self, time_remaining_s: float | None) -> ipc.ModelInfo:
        if time_remaining_s is None or time_remaining_s >= self._max_pause_s:
            return await self._core.wait_for_model(self._max_pause_s)
        try:
            return await self._core.wait_for_model(time_remaining_s)
        except ExecutorUnavailable as error:
            raise DeadlineExceeded("the deadline passed before an executor had connected") from error

    async def _prepare(self, request: pb.GenerateRequest, model: ipc.ModelInfo) -> tuple[list[int], str | None]:
        """The prompt's tokens and the grammar. What may take long leaves the event loop to others."""
        if request.ByteSize() <= _LONG_REQUEST_BYTES and not request.HasField("constraint"):
            return self._work_out(request, model)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._work_out, request, model)

    def _work_out(self, request: pb.GenerateRequest, model: ipc.ModelInfo) -> tuple[list[int], str | None]:
        check_token_ids(request, self._tokenizer.eos_token_ids, model.vocab_size)
        grammar = to_grammar(request.constraint) if request.HasField("constraint") else None
        return encode_prompt(request, self._tokenizer, model), grammar

    def _choices(self, request: pb.GenerateRequest, submit: ipc.Submit, streams: list[TokenStream]) -> list[Choice]:
        stop, output = request.stop, request.output
        skip = output.skip_special_tokens if output.HasField("skip_special_tokens") else True
        stop_token_ids, stop_strings = frozenset(submit.stop_token_ids), tuple(stop.stop_strings)
        resume_offsets = request.resume_offsets or [request.resume_offset] * len(streams)
        choices = []
        for index, stream in enumerate(streams):
            detokenizer = self._tokenizer.detokenizer(skip_special_tokens=skip)
            if stop_strings:
                detokenizer = StoppingDetokenizer(
                    detokenizer, stop_strings, min_tokens=stop.min_tokens, include_match=stop.include_stop_string
                )
            choice = Choice(
                index,
                stream,
                detokenizer,
                stop_token_ids=stop_token_ids,
                text_alone=self._tokenizer.text_alone if output.HasField("logprobs") else None,
                on_stop_string=functools.partial(self._core.stop_stream, stream),
                resume_offset=resume_offsets[index],
            )
            choices.append(choice)
        return choices
