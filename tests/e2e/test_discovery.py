"""What the server tells of itself: health, reflection, model, load."""

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from duet import SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import SERVICE, SERVING, Refusal, System
from tests.small_model import EOS
from tests.tiny_llama import MAX_MODEL_LEN


def test_health_is_known_for_the_server_and_for_the_service(server: System) -> None:
    assert server.status("") == server.status(SERVICE) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        server.status("another.Service")
    assert Refusal.of(caught.value).code is grpc.StatusCode.NOT_FOUND


def test_watchers_of_health_hear_it_at_once_and_do_not_depend_on_each_other(server: System) -> None:
    watches = [server.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(3)]
    assert [next(watch).status for watch in watches] == [SERVING] * 3
    watches[0].cancel()
    unknown = server.health.Watch(health_pb2.HealthCheckRequest(service="another.Service"))
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    for watch in (*watches[1:], unknown):
        watch.cancel()


def test_reflection_lists_the_services_and_describes_ours(server: System) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    describe = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    services, file = stub.ServerReflectionInfo(iter([listing, describe]))
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert pb.DESCRIPTOR.serialized_pb in file.file_descriptor_response.file_descriptor_proto


def test_model_is_described(server: System) -> None:
    model = server.client.model()
    assert (model.name, model.architecture, model.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert (model.max_model_len, model.vocab_size) == (MAX_MODEL_LEN, 400)
    assert set(model.eos_token_ids) == {0, EOS}
    assert model.has_chat_template
    assert int(model.weights_digest, 16)
    assert server.client.generate("Hello", SamplingParams(max_tokens=1), model="tiny").token_ids


def test_load_counts_what_is_done(server: System) -> None:
    before = server.load()
    prompt = list(range(300, 340))
    server.client.generate(prompt, SamplingParams(max_tokens=7, ignore_eos=True))
    after = server.load()
    assert after.output_tokens_total - before.output_tokens_total == 7
    assert after.prompt_tokens_total - before.prompt_tokens_total == 40
    assert after.prefill_tokens_total - before.prefill_tokens_total == 40
    assert after.finished_requests_total - before.finished_requests_total == 1
    assert after.steps_total > before.steps_total
    assert (after.max_running_requests, after.total_blocks, after.block_size) == (16, 1024, 16)
    assert after.uptime_seconds > before.uptime_seconds


def test_load_is_watched_while_a_request_runs(server: System) -> None:
    loads = server.client.watch_load(0.05)
    with server.endless():
        running = next(load for load in loads if load.running_requests == 1)
        assert running.used_blocks >= 1
    assert next(load for load in loads if load.running_requests == 0).used_blocks == 0
    loads.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_server_is_described(narrow_server: System) -> None:
    server = narrow_server.client.server()
    assert (server.ready, server.queue_order, server.epoch) == (True, "priority", 1)
    assert server.version
    assert "cpu" in server.device.lower()
