"""docs/errors.md against the server's errors, the client's, and a server."""

import re
from collections.abc import Iterator

import grpc

import duet.errors
import scheduler_service.errors
from duet.retry import MAX_BREAKS
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.frontend.validation import MAX_REQUEST_BYTES
from tests.docs.pages import page
from tests.e2e.system import System, generate_request, refusal_of

ROWS = {
    name: grpc.StatusCode[status]
    for name, status in re.findall(r"^\| `(\w+)` \| ([A-Z_]+) \|", page("docs/errors.md").text, re.MULTILINE)
}


def subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


def test_the_table_is_the_servers_errors() -> None:
    assert {kind.__name__: kind.code for kind in subclasses(scheduler_service.errors.DuetError)} == ROWS


def test_the_python_client_has_a_class_for_each_status() -> None:
    codes = [kind.code for kind in subclasses(duet.errors.DuetError) if kind.code is not None]
    assert sorted(codes, key=str) == sorted(set(ROWS.values()), key=str)


def test_the_limits_in_the_text_are_the_servers_and_the_clients() -> None:
    text = page("docs/errors.md").text
    assert f"more than {MAX_REQUEST_BYTES >> 20} MiB" in text
    assert f"after {MAX_BREAKS} breaks in a row" in text


def test_a_server_says_the_reason_and_the_status_of_the_table(docs_server: System) -> None:
    unknown = pb.CancelRequest(request_id="nobody").SerializeToString()
    refusals = [
        docs_server.refusal(b"\xff"),
        docs_server.refusal(generate_request("Hi", max_tokens=10_000)),
        docs_server.refusal(unknown, "Cancel"),
        refusal_of(docs_server.stub.Generate(generate_request("Hi", max_tokens=100), timeout=0.05)),
    ]
    with docs_server.endless(request_id="mine", stop=pb.StopConditions(max_tokens=100)):
        refusals.append(docs_server.refusal(generate_request("Hi", max_tokens=1, request_id="mine")))
    reasons = ["InvalidRequest", "ContextLengthExceeded", "UnknownRequest", "DeadlineExceeded", "DuplicateRequest"]
    for refusal, reason in zip(refusals, reasons, strict=True):
        assert refusal.code is ROWS[reason]
        assert refusal.reason in (reason, None if reason == "DeadlineExceeded" else reason)  # gRPC's own may come first
