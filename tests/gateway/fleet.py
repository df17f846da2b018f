"""The gateway and its servers as an OpenAI client sees them, and each server as its own clients do."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from duet import Unavailable
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.commands import running
from tests.e2e.conftest import FLAGS
from tests.e2e.system import PATIENCE_S, System, generate_request, is_alive, wait_until

HALF = "\ufffd"  # half a character
NUM_REPLICAS = 2
PROCESSES_OF_A_REPLICA = 5
_FLAGS = FLAGS | {"max_num_seqs": 8, "num_blocks": 1024}
# Recovery is seen within a second, and no request is sent to a server for any reason but its cache and its load.
_SMG_FLAGS = (
    "--worker-startup-check-interval=1 --health-check-interval-secs=1 --health-failure-threshold=1 "
    "--worker-warmup-secs=0 --worker-warmup-divert-every=0 --tool-call-parser=json --log-level=error"
)


class Fleet:
    """An OpenAI client, and the servers with connections of their own."""

    def __init__(self, http: str, model: str, replicas: Sequence[System]) -> None:
        self.model = model
        self.http = http
        self.replicas = replicas
        self.client = openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def complete(self, prompt: str, max_tokens: int = 8, **fields: Any) -> Any:
        """Greedy, unless `fields` say otherwise. The answer, or the stream of its pieces."""
        fields = {"temperature": 0, "extra_body": {"ignore_eos": True}} | fields
        return self.client.completions.create(model=self.model, prompt=prompt, max_tokens=max_tokens, **fields)

    def chat(self, content: str, max_tokens: int = 8, **fields: Any) -> Any:
        """The same with a conversation of one message."""
        fields = {"temperature": 0, "extra_body": {"ignore_eos": True}} | fields
        messages: Any = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=self.model, messages=messages, max_tokens=max_tokens, **fields)

    def loads(self) -> list[pb.Load]:
        """Of each server."""
        return [replica.load() for replica in self.replicas]

    def num_requests(self) -> list[int]:
        """Requests that each server has, or had until now."""
        loads = self.loads()
        return [load.waiting_requests + load.running_requests + load.finished_requests_total for load in loads]

    def wait_whole(self) -> None:
        """Return once all processes are there and the gateway sends requests to every server again."""
        for replica in self.replicas:
            wait_until(functools.partial(_is_whole, replica))
        wait_until(lambda: self.num_healthy() == NUM_REPLICAS)

    def num_healthy(self) -> int:
        """Servers to which the gateway sends requests."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.http}/readiness", timeout=PATIENCE_S) as response:
            return json.load(response)["healthy_workers"]


class Native:
    """What a server itself answers, which the gateway must hand on unchanged."""

    def __init__(self, responses: Iterator[pb.GenerateResponse]) -> None:
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: list[pb.TokenLogprobs] = []
        self.finished: dict[int, pb.Finished] = {}
        for response in responses:
            delta = response.delta
            if response.HasField("delta"):
                self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
                self.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
                self.logprobs += delta.logprobs
            if response.HasField("finished"):
                self.finished[response.finished.index] = response.finished

    @property
    def text(self) -> str:
        """Of the only choice."""
        (text,) = self.texts.values()
        return text


def ask(system: System, prompt: str, max_tokens: int = 8, *, chat: bool = False, **fields: Any) -> Native:
    """A server's own answer: greedy and past every end of sequence, unless `fields` say otherwise."""
    request = generate_request(prompt, max_tokens=max_tokens, **fields)
    if chat:
        request.chat.messages.add(role="user", content=prompt)
    return Native(system.stub.Generate(request, timeout=PATIENCE_S))


@contextlib.contextmanager
def running_fleet(model: Path) -> Iterator[Fleet]:
    """`duet gateway` with two servers. Ctrl-C at the end stops it with status 0 and leaves no process."""
    first, http = _free_ports(2 * NUM_REPLICAS), _free_ports(2)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in _FLAGS.items()]
    command = [
        *("gateway", str(model), "--replicas", str(NUM_REPLICAS), "--http", f"127.0.0.1:{http}"),
        *("--listen", f"127.0.0.1:{first}", "--executor-listen", f"127.0.0.1:{first + 1}"),
        *("--smg-flags", _SMG_FLAGS, *words),
    ]
    with running(*command) as process:
        assert process.stdout is not None
        announced = next(line for raw in process.stdout if (line := raw.decode().strip()))
        assert re.match(f"Ready at http://127.0.0.1:{http}/v1", announced)
        replicas = [System(f"127.0.0.1:{first + 2 * index}") for index in range(NUM_REPLICAS)]
        fleet = Fleet(f"127.0.0.1:{http}", model.name, replicas)
        yield fleet
        pids = [pid for replica in replicas for pid in replica.pids().values()]
        assert len(pids) == NUM_REPLICAS * PROCESSES_OF_A_REPLICA
        for replica in replicas:
            replica.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert not any(map(is_alive, pids))


def same(text: str, other: str) -> bool:
    """Whether two texts are equal but for half characters, of which the gateway may write more or fewer than we."""
    return text.replace(HALF, "") == other.replace(HALF, "")


def kill(replica: System) -> None:
    """Kill every process of a server with no chance to say anything."""
    for pid in replica.pids().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_whole(replica: System) -> bool:
    """Ready first: while processes start, a copy of one may be seen that is on its way to become another."""
    try:
        return replica.client.server().ready and len(replica.pids()) == PROCESSES_OF_A_REPLICA
    except Unavailable:
        return False


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens at."""
    while True:
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            first = held.getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
