"""What clients do to a server, well behaved or not: each a connection of its own, from its opening to its end."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable

import grpc

from duet.params import Options, SamplingParams
from duet.request import build_request
from protos.duet.inference.v1 import inference_pb2 as pb
from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub

SHORT_DETACH_S = 4.0

_TOKEN_IDS = (3, 380)
_PROMPT_TOKENS = (1, 200)
_OUTPUT_TOKENS = (1, 250)
_TIMEOUT_S = 60.0  # of any call; one that takes longer has found a server that hangs


class Refused(Exception):
    """The queue is full."""


class Caller:
    """One request over any number of calls and connections."""

    def __init__(self, address: str, rng: random.Random, *, detaches: bool = False) -> None:
        self.rng = rng
        self.num_tokens = 0
        self.is_whole = False
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(1 << 30),
            max_tokens=rng.randint(*_OUTPUT_TOKENS),
            ignore_eos=True,
            n=1 if detaches else rng.choice([1, 1, 1, 2]),
            stop=rng.choice([None, None, "qu"]),
        )
        options = Options(request_id=uuid.uuid4().hex)
        if detaches:
            options["detach_seconds"] = SHORT_DETACH_S
        prompt = [rng.randint(*_TOKEN_IDS) for _ in range(rng.randint(*_PROMPT_TOKENS))]
        self.request = build_request(prompt, params, options)
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = InferenceServiceStub(self._channel)

    async def close(self) -> None:
        """Close the connection, whatever is on it."""
        await self._channel.close()

    async def events(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The stream. Raises: Refused."""
        try:
            async for response in self.stub.Generate(self.request, timeout=_TIMEOUT_S):
                if response.WhichOneof("event") == "delta":
                    self.num_tokens = response.delta.offset + len(response.delta.token_ids)
                yield response
            self.is_whole = True
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Refused from None
            raise

    async def read(self, most: int | None = None) -> None:
        """Read this many messages, or all."""
        count = 0
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                count += 1
                if count == most:
                    return

    async def read_some(self) -> None:
        """Read a part, if there is as much."""
        await self.read(self.rng.randint(1, 30))


async def _only_connects(caller: Caller) -> None:
    await caller.stub.GetServer(pb.GetServerRequest(), timeout=_TIMEOUT_S)


async def _reads_all(caller: Caller) -> None:
    await caller.read()
    assert caller.is_whole


async def _hangs_up(caller: Caller) -> None:
    await caller.read_some()


async def _leaves_the_queue(caller: Caller) -> None:
    """Gone before the first event, most likely."""
    reading = asyncio.create_task(caller.read())
    await asyncio.sleep(caller.rng.uniform(0, 0.2))
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def _cancels(caller: Caller) -> None:
    async for _ in caller.events():
        if caller.rng.random() < 0.1:
            try:
                request = pb.CancelRequest(request_id=caller.request.request_id)
                await caller.stub.Cancel(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:  # it has ended
                    raise


async def _lets_a_deadline_pass(caller: Caller) -> None:
    call = caller.stub.Generate(caller.request, timeout=caller.rng.uniform(0.01, 0.5))
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise Refused from None
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise


async def _comes_back(caller: Caller) -> None:
    """Some of its breaks are longer than the server keeps it: then it begins anew, by the same id."""
    while not caller.is_whole:
        await caller.read(caller.rng.randint(1, 80))
        caller.request.resume_offset = caller.num_tokens
        await asyncio.sleep(caller.rng.choice([0.0, 0.1, 0.5, SHORT_DETACH_S + 1]))


async def _asks_again_for_the_end(caller: Caller) -> None:
    await caller.read()
    caller.request.resume_offset = caller.rng.randint(0, caller.num_tokens)
    await caller.read()
    assert caller.is_whole


async def _takes_over_from_itself(caller: Caller) -> None:
    """Two streams of one request: the first ends with ABORTED, or was faster."""
    events = caller.events()
    await anext(events)
    caller.request.resume_offset = 0
    await caller.read()
    try:
        async for _ in events:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ABORTED:
            raise


async def _never_comes_back(caller: Caller) -> None:
    await caller.read_some()


# Name -> how often beside the others, and what it does; those of the second kind detach.
LIVES: dict[str, tuple[float, Callable[[Caller], Awaitable[None]]]] = {
    "connects and leaves": (1, _only_connects),
    "reads all": (3, _reads_all),
    "hangs up": (2, _hangs_up),
    "leaves the queue": (1, _leaves_the_queue),
    "cancels": (2, _cancels),
    "lets a deadline pass": (1, _lets_a_deadline_pass),
    "detaches and comes back": (3, _comes_back),
    "asks again for the end": (1, _asks_again_for_the_end),
    "takes over from itself": (1, _takes_over_from_itself),
    "detaches for good": (2, _never_comes_back),
}
_DETACHING = {_comes_back, _asks_again_for_the_end, _takes_over_from_itself, _never_comes_back}


async def live(name: str, address: str, rng: random.Random) -> str:
    """One life; returns "done", or the error that nothing explains. Raises: Refused."""
    _, act = LIVES[name]
    caller = Caller(address, rng, detaches=act in _DETACHING)
    try:
        await act(caller)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {error.details()}"
    finally:
        await caller.close()
    return "done"
