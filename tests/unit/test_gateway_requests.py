"""The gateway's requests as our own: every field of theirs is mapped, or refused when it is set."""

import math
from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidRequest
from scheduler_service.gateway.requests import to_generate_request

# What the gateway sends in every request, whatever its client asked for.
PLAIN = {"top_p": 1.0, "repetition_penalty": 1.0, "n": 1, "skip_special_tokens": True}


def request(params: dict[str, Any] | None = None, **fields: Any) -> vllm.GenerateRequest:
    sampling = vllm.SamplingParams(**(PLAIN | (params or {})))
    tokenized = vllm.TokenizedInput(original_text="ignored", input_ids=[5, 6, 7])
    return vllm.GenerateRequest(**({"request_id": "r-1", "tokenized": tokenized, "sampling_params": sampling} | fields))


def value_at(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = getattr(message, name)
    return message


def test_the_prompt_and_the_id_are_carried_over():
    ours = to_generate_request(request())
    assert (ours.request_id, list(ours.token_ids.ids)) == ("r-1", [5, 6, 7])


def test_a_text_prompt_is_carried_over():
    theirs = request()
    theirs.text = "the fox"
    assert to_generate_request(theirs).text == "the fox"


@pytest.mark.parametrize(
    ("theirs", "path", "value"),
    [
        ({"temperature": 0.5}, "sampling.temperature", 0.5),
        ({"temperature": 0.0}, "sampling.temperature", 0.0),
        ({"top_p": 0.25}, "sampling.top_p", 0.25),
        ({"top_k": 7}, "sampling.top_k", 7),
        ({"min_p": 0.125}, "sampling.min_p", 0.125),
        ({"repetition_penalty": 1.5}, "sampling.repetition_penalty", 1.5),
        ({"frequency_penalty": -0.5}, "sampling.frequency_penalty", -0.5),
        ({"presence_penalty": 0.5}, "sampling.presence_penalty", 0.5),
        ({"n": 3}, "sampling.n", 3),
        ({"seed": 0}, "sampling.seed", 0),
        ({"seed": -1}, "sampling.seed", 2**64 - 1),
        ({"logit_bias": {4: -1.5}}, "sampling.logit_bias", {4: -1.5}),
        ({"max_tokens": 0}, "stop.max_tokens", 0),
        ({"max_tokens": 9}, "stop.max_tokens", 9),
        ({"min_tokens": 2}, "stop.min_tokens", 2),
        ({"stop": ["a", "b"]}, "stop.stop_strings", ["a", "b"]),
        ({"stop_token_ids": [3, 0]}, "stop.stop_token_ids", [3, 0]),
        ({"ignore_eos": True}, "stop.ignore_eos", True),
        ({"include_stop_str_in_output": True}, "stop.include_stop_string", True),
        ({"skip_special_tokens": False}, "output.skip_special_tokens", False),
        ({"logprobs": 0}, "output.logprobs", 0),
        ({"logprobs": 5}, "output.logprobs", 5),
        ({"prompt_logprobs": 2}, "output.prompt_logprobs", 2),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens", 4),
        ({"json_schema": "{}"}, "constraint.json_schema", "{}"),
        ({"json_object": True}, "constraint.json_object", pb.JsonObject()),
        ({"regex": "[ab]+"}, "constraint.regex", "[ab]+"),
        ({"grammar": 'start: "a"'}, "constraint.grammar", 'start: "a"'),
        ({"choice": vllm.ChoiceConstraint(choices=["x", "y"])}, "constraint.choice.texts", ["x", "y"]),
    ],
)
def test_a_parameter_is_carried_over(theirs: dict[str, Any], path: str, value: Any):
    ours = to_generate_request(request(theirs))
    parent, _, name = path.rpartition(".")
    holder = value_at(ours, parent) if parent else ours
    if holder.DESCRIPTOR.fields_by_name[name].has_presence:
        assert holder.HasField(name)
    assert value_at(ours, path) == value
    assert ours != to_generate_request(request())


@pytest.mark.parametrize("name", ["temperature", "max_tokens", "seed", "logprobs", "prompt_logprobs"])
def test_what_has_presence_and_is_not_set_stays_unset(name: str):
    ours = to_generate_request(request())
    holders = (ours.sampling, ours.stop, ours.output)
    (holder,) = [one for one in holders if name in one.DESCRIPTOR.fields_by_name]
    assert not holder.HasField(name)


@pytest.mark.parametrize("name", ["top_p", "repetition_penalty", "n"])
def test_zero_means_unset_where_it_could_mean_nothing_else(name: str):
    assert not to_generate_request(request({name: 0})).sampling.HasField(name)


def test_a_json_object_that_is_not_wanted_is_no_constraint():
    assert not to_generate_request(request({"json_object": False})).HasField("constraint")


@pytest.mark.parametrize(
    ("theirs", "field"),
    [
        (request({"logprobs": -1}), "sampling_params.logprobs"),
        (request({"logprobs": -2}), "sampling_params.logprobs"),
        (request({"prompt_logprobs": -1}), "sampling_params.prompt_logprobs"),
        (request({"truncate_prompt_tokens": -1}), "sampling_params.truncate_prompt_tokens"),
        (request({"truncate_prompt_tokens": 0}), "sampling_params.truncate_prompt_tokens"),
        (request({"logit_bias": {-1: 1.0}}), "sampling_params.logit_bias"),
        (request({"structural_tag": "{}"}), "sampling_params.structural_tag"),
        (request(data_parallel_rank=1), "data_parallel_rank"),
        (request(mm_inputs=vllm.MultimodalInputs()), "mm_inputs"),
        (request(extra_mm_inputs=[vllm.MultimodalInputs()]), "extra_mm_inputs"),
        (request(media_refs=vllm.MediaRefs()), "media_refs"),
        (request(kv_transfer_params=vllm.KvTransferParams()), "kv_transfer_params"),
        (request(kv_transfer_params_json="{}"), "kv_transfer_params_json"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(theirs: vllm.GenerateRequest, field: str):
    with pytest.raises(InvalidRequest) as caught:
        to_generate_request(theirs)
    assert caught.value.field == field


def test_data_parallel_rank_0_is_ours():
    assert to_generate_request(request(data_parallel_rank=0)) == to_generate_request(request())


def test_values_out_of_range_are_left_to_our_own_checks():
    ours = to_generate_request(request({"temperature": -1.0, "top_p": math.nan, "min_p": 7.0}))
    assert ours.sampling.temperature == -1
    assert math.isnan(ours.sampling.top_p)
    assert ours.sampling.min_p == 7


def test_every_field_of_theirs_is_known_here():
    """A field that a later version adds must be mapped, refused, or listed here with the reason why it is neither."""
    mapped = {
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "skip_special_tokens", "ignore_eos", "n", "logprobs"),
        *("prompt_logprobs", "seed", "include_stop_str_in_output", "logit_bias", "truncate_prompt_tokens"),
        *("json_schema", "regex", "grammar", "structural_tag", "json_object", "choice"),
    }
    of_text_alone = {"spaces_between_special_tokens"}  # the gateway makes the text
    as_ever = {"grammar_from_first_token"}  # a constraint of ours always holds from there
    assert set(vllm.SamplingParams.DESCRIPTOR.fields_by_name) == mapped | of_text_alone | as_ever
    assert set(vllm.GenerateRequest.DESCRIPTOR.fields_by_name) == {
        *("request_id", "tokenized", "text", "sampling_params", "stream"),
        *("kv_transfer_params", "mm_inputs", "extra_mm_inputs", "kv_transfer_params_json", "data_parallel_rank"),
        "media_refs",
    }
