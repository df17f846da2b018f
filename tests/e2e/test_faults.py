"""kill -9 of each process, one after the other: what clients see, and what is there afterwards."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2

from duet import Unavailable
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import (
    NOT_SERVING,
    PATIENCE_S,
    SERVICE,
    SERVING,
    System,
    generate_request,
    is_alive,
    refusal_of,
    tokens_of,
    wait_until,
)

SEEDED = pb.SamplingParams(temperature=1, seed=11)


def kill(server: System, module: str) -> int:
    pid = server.pids()[module]
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_until_served(server: System) -> None:
    """Return once an executor is connected; until then, every answer must say that the server is unavailable."""

    def is_ready() -> bool:
        try:
            return server.client.server().ready
        except Unavailable:
            return False

    wait_until(is_ready)


def test_streams_outlive_an_executor_and_health_tells_of_its_absence(mortal_server: System) -> None:
    server = mortal_server
    requests = [generate_request([number, 2, 3], max_tokens=300) for number in range(3)]
    requests += [generate_request([number, 2, 3], max_tokens=300, sampling=SEEDED) for number in range(3)]
    undisturbed = [tokens_of(server.stub.Generate(request)) for request in requests]
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE_S)
    assert next(watch).status == SERVING
    epoch = server.client.server().epoch

    with ThreadPoolExecutor(len(requests)) as threads:
        calls = [server.stub.Generate(request) for request in requests]
        firsts = [(next(call), next(call)) for call in calls]
        killed = kill(server, "executor_service.rank")
        rests = [threads.submit(list, call) for call in calls]
        streams = [[*first, *rest.result()] for first, rest in zip(firsts, rests, strict=True)]

    assert [tokens_of(iter(stream)) for stream in streams] == undisturbed
    assert [stream[-1].finished.usage.recoveries for stream in streams] == [1] * len(requests)
    assert [next(watch).status, next(watch).status] == [NOT_SERVING, SERVING]
    watch.cancel()
    assert server.client.server().epoch == epoch + 1
    assert not is_alive(killed)
    server.assert_serves()


def test_request_that_comes_while_there_is_no_executor_waits_for_one(mortal_server: System) -> None:
    kill(mortal_server, "executor_service.rank")
    wait_until(lambda: mortal_server.status() == NOT_SERVING)
    assert mortal_server.probe() == mortal_server.sound_tokens
    mortal_server.assert_serves()


def test_streams_outlive_a_core_and_the_next_one_serves(mortal_server: System) -> None:
    server = mortal_server
    before = server.pids()
    request = generate_request([1, 2, 3], max_tokens=300, sampling=SEEDED)
    undisturbed = tokens_of(server.stub.Generate(request))
    call = server.stub.Generate(request)
    first = [next(call), next(call)]
    killed = kill(server, "scheduler_service.core")
    stream = [*first, *call]
    assert tokens_of(iter(stream)) == undisturbed
    assert stream[-1].finished.usage.recoveries == 1
    wait_until_served(server)
    server.assert_serves()
    after = server.pids()
    assert {module for module in before if before[module] != after[module]} == {"scheduler_service.core"}
    assert not is_alive(killed)


def test_requests_of_a_killed_front_end_end_and_the_next_one_serves(mortal_server: System) -> None:
    server = mortal_server
    before = server.pids()
    with server.endless() as call:
        kill(server, "scheduler_service.frontend")
        assert refusal_of(call).code is grpc.StatusCode.UNAVAILABLE
    wait_until_served(server)
    server.assert_serves()
    after = server.pids()
    assert {module for module in before if before[module] != after[module]} == {"scheduler_service.frontend"}


def test_killed_scheduler_service_leaves_no_orphan_and_comes_back(mortal_server: System) -> None:
    server = mortal_server
    before = server.pids()
    with server.endless() as call:
        kill(server, "scheduler_service")
        assert refusal_of(call).code is grpc.StatusCode.UNAVAILABLE
    scheduler = {module for module in before if module.startswith("scheduler_service")}
    wait_until(lambda: not any(is_alive(before[module]) for module in scheduler))
    wait_until_served(server)
    server.assert_serves()
    after = server.pids()
    assert {module for module in before if before[module] != after[module]} == scheduler


def test_killed_executor_service_leaves_no_orphan_and_streams_go_on(mortal_server: System) -> None:
    server = mortal_server
    before = server.pids()
    request = generate_request([1, 2, 3], max_tokens=300)
    undisturbed = tokens_of(server.stub.Generate(request))
    call = server.stub.Generate(request)
    first = [next(call), next(call)]
    kill(server, "executor_service")
    assert tokens_of(iter([*first, *call])) == undisturbed
    executor = {module for module in before if module.startswith("executor_service")}
    assert not any(is_alive(before[module]) for module in executor)
    server.assert_serves()
    after = server.pids()
    assert {module for module in before if before[module] != after[module]} == executor
