"""LLM: many prompts in, outputs in the same order; on services of its own or on running ones."""

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar, cast

from tqdm import tqdm

from duet.client import AsyncClient
from duet.launch import LocalServer, to_flags
from duet.output import Event, Output
from duet.params import Options, SamplingParams
from duet.progress import Progress
from duet.request import Prompt
from duet.retry import Retry

T = TypeVar("T")

_MAX_STREAMS = 256  # at once: more than the server runs, fewer than its queue takes
_RETRY = Retry(first_delay_s=1.0, waits_for_queue=True)


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
        *,
        detach_seconds: float | None = None,
    ) -> list[dict[str, Any]]:
        """Continue every prompt: strings, or lists of token ids.

        One SamplingParams counts for all prompts, a list holds one for each. Returns a dict for each prompt, in
        order, of the fields of duet.Output: `text`, `token_ids`, `finish_reason`, `prompt_tokens` and so on, and with
        n > 1 `choices`, a list of dicts of the fields of duet.Choice. The first error ends all of the call's requests
        and is raised; with `detach_seconds` requests outlive a lost connection for that long: see duet.Client.
        """
        batch = _as_batch(prompts)
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            params = [sampling_params] * len(batch)
        else:
            params = list(sampling_params)
        if len(params) != len(batch):
            raise ValueError(f"{len(batch)} prompts, but {len(params)} sampling params")
        options = Options(detach_seconds=detach_seconds) if detach_seconds is not None else Options()
        with tqdm(total=len(batch), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
            outputs = self._run(self._generate_all(batch, params, options, Progress(bar)))
        return [output.as_dict() for output in outputs]

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
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        options: Options,
        progress: Progress,
    ) -> list[Output]:
        limit = asyncio.Semaphore(_MAX_STREAMS)

        async def generate(prompt: Prompt, prompt_params: SamplingParams | None) -> Output:
            async with limit:
                events: list[Event] = []
                async for event in client.stream(prompt, prompt_params, **options):
                    events.append(event)
                    progress.count(event)
            progress.count_finished()
            return Output.of(events)

        try:
            async with AsyncClient(self.address, retry=_RETRY) as client, asyncio.TaskGroup() as group:
                pairs = zip(prompts, params, strict=True)
                tasks = [group.create_task(generate(prompt, prompt_params)) for prompt, prompt_params in pairs]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [task.result() for task in tasks]


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
