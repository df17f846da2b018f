"""LLM: many prompts in, outputs in the same order; on services of its own or on running ones."""

import asyncio
import atexit
import dataclasses
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar, cast

from tqdm import tqdm

from duet.client import AsyncClient
from duet.errors import QueueFull
from duet.launch import LocalServer, to_flags
from duet.request import Event, Output, Prompt, SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb

T = TypeVar("T")

_MAX_STREAMS = 256  # at once: more than the server runs, fewer than its queue takes
_REFRESH_S = 0.5
_RETRY_S = 1.0  # where the server does not say how long


class LLM:
    """A model to generate with.

    `LLM("/path/to/model", num_blocks=512)` starts both services with these flags and stops them in `close`, at the
    end of a `with` block or with the interpreter; `LLM(address="host:port")` uses running ones.
    Raises: StartFailed, with the end of the services' log.
    """

    def __init__(self, model: str | None = None, *, address: str | None = None, **flags: object) -> None:
        if (model is None) == (address is None):
            raise TypeError("LLM takes either the path of a model or the address of a running server")
        if address is not None and flags:
            raise TypeError(f"a running server takes no flags: {', '.join(flags)}")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="duet-client", daemon=True)
        self._thread.start()
        self._closed = False
        self._server = LocalServer(model, to_flags(flags)) if model is not None else None
        atexit.register(self.close)
        try:
            if self._server:
                self._server.wait_until_ready()
            self.address = self._server.address if self._server else cast(str, address)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Continue every prompt: strings, or lists of token ids.

        One SamplingParams counts for all prompts, a list holds one for each. Returns a dict for each prompt, in
        order, of the fields of duet.Output: `text`, `token_ids`, `finish_reason`, `prompt_tokens` and so on. The
        first error ends all of the call's requests and is raised.
        """
        batch = _as_batch(prompts)
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            params = [sampling_params] * len(batch)
        else:
            params = list(sampling_params)
        if len(params) != len(batch):
            raise ValueError(f"{len(batch)} prompts, but {len(params)} sampling params")
        with tqdm(total=len(batch), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
            outputs = self._run(self._generate_all(batch, params, _Progress(bar)))
        return [dataclasses.asdict(output) for output in outputs]

    def close(self) -> None:
        """Stop what this object started; the second time, nothing happens."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._server:
            self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` on the client's own loop, so that callers may have one themselves; Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _generate_all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], progress: "_Progress"
    ) -> list[Output]:
        limit = asyncio.Semaphore(_MAX_STREAMS)

        async def generate(prompt: Prompt, prompt_params: SamplingParams | None) -> Output:
            async with limit:
                while True:
                    events: list[Event] = []
                    try:
                        async for event in client.stream(prompt, prompt_params):
                            events.append(event)
                            progress.count(event)
                        return Output.of(events)
                    except QueueFull as error:  # refused before it began
                        await asyncio.sleep(error.retry_after_s or _RETRY_S)

        try:
            async with AsyncClient(self.address) as client, asyncio.TaskGroup() as group:
                pairs = zip(prompts, params, strict=True)
                tasks = [group.create_task(generate(prompt, prompt_params)) for prompt, prompt_params in pairs]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [task.result() for task in tasks]


class _Progress:
    """Shows finished prompts and tokens per second: of late, and in the end over all."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._start = self._shown = (time.monotonic(), 0, 0)  # seconds, prefill tokens, decode tokens

    def count(self, event: Event) -> None:
        """Take note of one event of any of the streams."""
        if isinstance(event, pb.Started):
            self._prefill_tokens += event.prompt_tokens - event.cached_tokens
        elif isinstance(event, pb.TokenDelta):
            self._decode_tokens += len(event.token_ids)
        else:
            self._bar.update()
        if self._bar.n == self._bar.total:
            self._show(self._start)
        elif time.monotonic() - self._shown[0] >= _REFRESH_S:
            self._show(self._shown)
            self._shown = (time.monotonic(), self._prefill_tokens, self._decode_tokens)

    def _show(self, since: tuple[float, int, int]) -> None:
        then, prefill, decode = since
        elapsed_s = max(time.monotonic() - then, 1e-9)
        rates = (self._prefill_tokens - prefill) / elapsed_s, (self._decode_tokens - decode) / elapsed_s
        self._bar.set_postfix_str(f"prefill {rates[0]:.0f} tok/s, decode {rates[1]:.0f} tok/s")


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt counts as a batch of one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
