"""What a client reads before the first tokens: `started`, and the prompt where it was asked for."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend.logprobs import add_prompt_logprobs
from scheduler_service.frontend.streams import TokenStream
from scheduler_service.frontend.tokenizer import ModelTokenizer


class Opening:
    """The messages that come once for all choices of a request."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        submit: ipc.Submit,
        token_ids: Sequence[int],
        streams: Sequence[TokenStream],
        tokenizer: ModelTokenizer,
        pool: Executor,
    ) -> None:
        """`token_ids` are the prompt's; its text and log-probabilities are put together in `pool`."""
        output = request.output
        self.is_over = False
        self._submit = submit
        self._token_ids = token_ids
        self._streams = streams
        self._tokenizer = tokenizer
        self._pool = pool
        self._with_text = output.echo
        self._with_logprobs = output.HasField("prompt_logprobs")
        self._skip_special_tokens = output.skip_special_tokens if output.HasField("skip_special_tokens") else True
        self._is_started = False

    async def take(self) -> list[pb.GenerateResponse]:
        """The messages that are due now, in order."""
        messages = []
        if not self._is_started:
            started = next((stream.started for stream in self._streams if stream.started is not None), None)
            if started is None:
                return messages
            self._is_started = True
            messages.append(self._started(started))
        logprobs = self._streams[0].prompt_logprobs  # the core gives them to the first choice, before any token
        if not self._with_logprobs or logprobs is not None:
            self.is_over = True
            if self._with_text or logprobs is not None:
                loop = asyncio.get_running_loop()
                messages.append(await loop.run_in_executor(self._pool, self._prompt, logprobs))
        return messages

    def _started(self, started: ipc.Started) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            started=pb.Started(
                request_id=self._submit.request_id,
                prompt_tokens=started.prompt_tokens,
                cached_tokens=started.cached_tokens,
                queue_time_ns=started.queue_time_ns,
                seed=started.seed,
            )
        )

    def _prompt(self, logprobs: ipc.PromptLogprobs | None) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        prompt = response.prompt
        prompt.token_ids.extend(self._token_ids)
        if self._with_text:
            prompt.text = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        if logprobs is not None:
            add_prompt_logprobs(prompt, logprobs, self._tokenizer.text_alone)
        return response
