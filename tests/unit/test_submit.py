"""What the core is told of a request."""

from typing import Any

import msgspec
import numpy as np

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend.submit import build_submit
from tests.small_model import EOS


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="the fox", **fields)


def build(accepted: pb.GenerateRequest, token_ids: list[int], **changes: Any) -> ipc.Submit:
    arguments: dict[str, Any] = {
        "streams": [7],
        "eos_token_ids": [EOS, 0, 400, 2**40],
        "vocab_size": 400,
        "arrival": 1.5,
        "deadline": None,
        "constraint": None,
        "tenant": "",
    }
    return build_submit(accepted, token_ids, **arguments | changes)


def test_an_end_of_sequence_outside_the_vocabulary_is_not_a_stop() -> None:
    assert build(request(), [5]).stop_token_ids == [0, EOS]


def test_unset_fields_get_the_defaults_of_the_proto() -> None:
    submit = build(request(), [5, 6])
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == [5, 6]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert submit.stop_token_ids == [0, EOS]
    assert (submit.max_tokens, submit.priority, submit.cache_salt, submit.deadline) == (None, 0, "", None)
    assert (submit.streams, submit.arrival, submit.constraint) == ([7], 1.5, None)
    expected = ipc.Sampling(seed=sampling.seed)  # whose defaults are those of the proto
    assert sampling == expected


def test_missing_ids_and_seeds_are_drawn_anew_each_time() -> None:
    submits = [build(request(), [5]) for _ in range(20)]
    assert len({submit.request_id for submit in submits}) == 20
    assert len({submit.sampling.seed for submit in submits}) == 20
    assert max(submit.sampling.seed for submit in submits) > 2**56


def test_zero_is_not_unset() -> None:
    submit = build(request(sampling=pb.SamplingParams(temperature=0, seed=0)), [5])
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.0, 0)


def test_ignoring_the_end_of_sequence_keeps_the_requests_own_stops() -> None:
    stop = pb.StopConditions(stop_token_ids=[9, 0], ignore_eos=True)
    assert build(request(stop=stop), [5]).stop_token_ids == [0, 9]
    stop.ignore_eos = False
    assert build(request(stop=stop), [5]).stop_token_ids == [0, EOS, 9]


def test_the_models_ends_are_told_even_where_they_are_ignored() -> None:
    assert build(request(stop=pb.StopConditions(ignore_eos=True)), [5]).end_token_ids == [0, EOS]


def test_every_sampling_parameter_reaches_the_core() -> None:
    sampling = pb.SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        seed=9,
        n=2,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.75,
        logit_bias={4: -1.5},
        allowed_token_ids=[9, 4, 9],
        banned_token_ids=[8, 7],
    )
    output = pb.OutputOptions(logprobs=2, prompt_logprobs=0)
    stop = pb.StopConditions(min_tokens=3)
    submit = build(request(sampling=sampling, output=output, stop=stop), [5], streams=[7, 8], constraint="g")
    assert (submit.streams, submit.constraint) == ([7, 8], "g")
    assert msgspec.structs.asdict(submit.sampling) == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "seed": 9,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.75,
        "logit_bias": {4: -1.5},
        "allowed_token_ids": [4, 9],
        "banned_token_ids": [7, 8],
        "min_tokens": 3,
        "logprobs": 2,
        "prompt_logprobs": 0,
    }


def test_a_submit_survives_its_frame() -> None:
    sampling = pb.SamplingParams(logit_bias={4: -1.5}, banned_token_ids=[8])
    submit = build(request(sampling=sampling), [5], deadline=2.5, constraint="g")
    assert msgspec.msgpack.decode(ipc.encode_frame(submit)[4:], type=ipc.FrontendMessage) == submit
