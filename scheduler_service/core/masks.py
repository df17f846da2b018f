"""Constrained requests and the masks under which their next tokens are sampled.

A mask belongs to exactly the tokens that are known of its request. It is forgotten where one more becomes known, and
kept where a plan is lost or dropped, since known tokens never change: so preemption, the loss of an executor and late
tokens need nothing of their own here. The masks come from grammar_worker, a process that starts with the first
constrained request; where it dies, the next one is told the grammars and the known tokens again.
"""

import asyncio
import asyncio.subprocess
import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.grammar_jobs import Answer, Compile, Consume, Drop, Masks, Ready, Refused, Unusable
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.errors import InvalidRequest, logged_internal_error
from scheduler_service.ipc import encode_frame, read_frame

WORKER = (sys.executable, "-m", "scheduler_service.core.grammar_worker")
FIELD = "constraint"
FINISH_REASON_STOP = 1  # as in inference.proto's FinishReason
LATENCY_SMOOTHING = 0.2
MAX_CONSUME_S = 10.0  # far more than llguidance's limits allow: a worker that takes longer hangs
MAX_LOSSES = 3  # workers in a row that may die while they owe a request a mask
MAX_UNREAD_BYTES = 16 << 20

log = logging.getLogger(__name__)


def allows(request: Request, token: int) -> bool:
    """Whether the request's mask has the bit of a token that was sampled under it."""
    assert request.mask is not None, "a token was sampled without a mask"
    return bool(request.mask[token >> 5] >> (token & 31) & 1)


def forget_mask(pool: RequestPool, request: Request) -> None:
    """Another token of a constrained request is known, after which it goes on."""
    request.mask = None
    pool.unmasked.append(request)


def give_mask(pool: RequestPool, request: Request, mask: NDArray[np.int32]) -> None:
    """The tokens that may follow those of a living request are known: it may run, or ends here if there are none."""
    if not mask.any():
        pool.start(request, pool.clock())
        pool.finish(request, FINISH_REASON_STOP)
        return
    request.mask = mask
    if request.state is RequestState.COMPILING:
        pool.compiling.remove(request)
        request.state = RequestState.WAITING
        pool.waiting.push(request)


def refuse(pool: RequestPool, request: Request, message: str) -> None:
    """The constraint of a living request is at fault."""
    pool.fail(request, InvalidRequest(message, field=FIELD))


class MaskSource:
    """The core's end of the grammar worker, which lives while it is needed."""

    def __init__(self, pool: RequestPool, model: Path, on_change: Callable[[], None]) -> None:
        """`on_change` is called whenever requests were given masks, or ended for lack of them."""
        self._pool = pool
        self._model = model
        self._on_change = on_change
        self._vocab_size = 0
        self._is_wanted = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None  # None until it is ready
        self._unusable: str | None = None  # why this model can have no constraint
        self._held: dict[int, Request] = {}  # by arrival: what the worker has, or was asked to compile
        self._losses: dict[Request, int] = {}  # workers that died since the request's last mask
        self._consuming: set[int] = set()  # keys of the Consume that is not answered; there is one at most
        self._consuming_since = 0.0  # time.monotonic() seconds

    def begin(self, vocab_size: int) -> None:
        """An executor has told the size of its model's vocabulary."""
        self._vocab_size = vocab_size

    def work(self) -> None:
        """Hand over what has changed since the last call: new constrained requests, new tokens, ended requests."""
        if self._unusable is not None:
            for request in self._take_unmasked():
                refuse(self._pool, request, self._unusable)
        if self._process is None:
            if self._pool.unmasked:
                self._is_wanted.set()
            return
        if ended := [key for key, request in self._held.items() if request.state is RequestState.FINISHED]:
            for key in ended:
                del self._held[key]
            self._send(Drop(ended))
        if self._pool.unmasked:
            self._hand_over()

    def _take_unmasked(self) -> list[Request]:
        requests, self._pool.unmasked = self._pool.unmasked, []
        return [request for request in requests if request.state is not RequestState.FINISHED]

    def _hand_over(self) -> None:
        keys, token_ids, is_free = list[int](), list[int](), not self._consuming
        for request in self._take_unmasked():
            key = request.arrival
            if key not in self._held:
                self._held[key] = request
                self._send(_compile(request))
            elif is_free:
                keys.append(key)
                token_ids.append(request.token_ids[-1])
            else:
                self._pool.unmasked.append(request)
        if keys:
            self._consuming, self._consuming_since = set(keys), time.monotonic()
            self._send(Consume(keys, token_ids))

    def _send(self, job: Compile | Consume | Drop) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(encode_frame(job))

    def check(self, now: float) -> None:
        """Kill a worker that hangs; `now` in monotonic seconds."""
        if self._process is not None and self._consuming and now - self._consuming_since > MAX_CONSUME_S:
            log.error("the grammar worker hangs: killing it")
            self._consuming_since = math.inf
            with contextlib.suppress(ProcessLookupError):  # it has just died by itself
                self._process.kill()

    async def run(self) -> None:
        """Keep a worker while one is needed, until cancelled."""
        while True:
            await self._is_wanted.wait()
            await self._run_worker()
            self._is_wanted.clear()
            self._on_change()

    async def _run_worker(self) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *(*WORKER, str(self._model), str(self._vocab_size)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_UNREAD_BYTES,
            )
        except OSError:
            log.exception("the grammar worker cannot be started")
            self._lose_worker(was_ready=False)
            return
        assert process.stdout is not None
        decoder = msgspec.msgpack.Decoder(Answer)
        try:
            while (answer := await read_frame(process.stdout, decoder)) is not None:
                if isinstance(answer, Ready):
                    self._process, self._pool.mask_latency_ns = process, 0.0
                self._hear(answer)
                self._on_change()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        was_ready, self._process = self._process is not None, None
        if self._unusable is None:
            self._lose_worker(was_ready=was_ready)

    def _hear(self, answer: Answer) -> None:
        match answer:
            case Unusable(message):
                self._unusable = f"this model's tokenizer cannot be constrained: {message}"
            case Masks(keys, masks):
                rows = np.frombuffer(masks, dtype="<i4").reshape(len(keys), -1)
                for key, mask in zip(keys, rows, strict=True):
                    self._end_consuming(key)
                    request = self._held.get(key)
                    if request is not None and request.state is not RequestState.FINISHED:
                        self._losses.pop(request, None)
                        give_mask(self._pool, request, mask)
            case Refused(key, message):
                self._end_consuming(key)
                request = self._held.pop(key, None)
                if request is not None and request.state is not RequestState.FINISHED:
                    refuse(self._pool, request, message)

    def _end_consuming(self, key: int) -> None:
        """One of those is answered; after the last one it is known how long they took."""
        if key not in self._consuming:
            return
        self._consuming.remove(key)
        if not self._consuming:
            latency_ns, average = (time.monotonic() - self._consuming_since) * 1e9, self._pool.mask_latency_ns
            self._pool.mask_latency_ns = average + LATENCY_SMOOTHING * (latency_ns - average) if average else latency_ns

    def _lose_worker(self, *, was_ready: bool) -> None:
        """The next one is asked for what this one owed, unless that may be what workers die of."""
        log.error("the grammar worker died")
        owed = dict.fromkeys([request for request in self._held.values() if request.mask is None] + self._pool.unmasked)
        losses = {request: self._losses.get(request, 0) + 1 for request in owed}
        self._losses = {request: n for request, n in losses.items() if request.state is not RequestState.FINISHED}
        self._held.clear()
        self._consuming.clear()
        self._pool.mask_latency_ns = math.inf  # no plan is held back for masks until a worker is there again
        self._pool.unmasked = []
        for request, num_losses in self._losses.items():
            if was_ready and num_losses < MAX_LOSSES:
                self._pool.unmasked.append(request)
            else:
                cause = f"request {request.request_id}: no grammar worker lived long enough to compute its mask"
                self._pool.fail(request, logged_internal_error(cause))


def _compile(request: Request) -> Compile:
    return Compile(
        key=request.arrival,
        grammar=request.constraint or "",
        token_ids=request.token_ids[request.num_prompt_tokens :].tobytes(),
        end_token_ids=request.end_token_ids,
        stop_token_ids=request.stop_token_ids,
        banned_token_ids=request.sampling.banned_token_ids,
        min_tokens=request.sampling.min_tokens,
    )
