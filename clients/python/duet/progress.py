"""A progress bar over many prompts."""

import time
from typing import Any

from tqdm import tqdm

from duet.output import Event
from protos.duet.inference.v1 import inference_pb2 as pb

_REFRESH_S = 0.5


class Progress:
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
        if time.monotonic() - self._shown[0] >= _REFRESH_S:
            self._show(self._shown)
            self._shown = (time.monotonic(), self._prefill_tokens, self._decode_tokens)

    def count_finished(self) -> None:
        """One prompt has all of its output."""
        self._bar.update()
        if self._bar.n == self._bar.total:
            self._show(self._start)

    def skip(self) -> None:
        """One prompt had its output before we began."""
        if not self._bar.disable:  # then it has no such field
            self._bar.initial += 1
        self._bar.update()

    def _show(self, since: tuple[float, int, int]) -> None:
        then, prefill, decode = since
        elapsed_s = max(time.monotonic() - then, 1e-9)
        rates = (self._prefill_tokens - prefill) / elapsed_s, (self._decode_tokens - decode) / elapsed_s
        self._bar.set_postfix_str(f"prefill {rates[0]:.0f} tok/s, decode {rates[1]:.0f} tok/s")
