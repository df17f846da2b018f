"""What the executor is told of a request that takes a slot."""

import dataclasses
from array import array

import numpy as np
import pytest

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.step_plan import new_sequence
from scheduler_service.ipc import Sampling
from tests.unit.core_harness import Core, new_request

END = [900, 901]


def told(sampling: Sampling, *, constraint: str | None = None) -> pb.SamplingParams:
    request = new_request("request", range(7), 20, sampling=sampling, choice_index=5)
    request = dataclasses.replace(request, end_token_ids=END, constraint=constraint)
    return new_sequence(request, 0, np.array([3, 4], dtype=np.int32), 0).sampling


def ints(column: bytes) -> list[int]:
    return list(array("i", column))


def test_every_sampling_parameter_reaches_the_executor_in_a_field_of_its_own():
    sampling = Sampling(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        seed=2**64 - 3,
        repetition_penalty=1.5,
        frequency_penalty=-0.75,
        presence_penalty=2.0,
        logit_bias={17: -100.0, 3: 0.1},
        allowed_token_ids=[1, 2, 3],
        banned_token_ids=[2, 9],
        min_tokens=4,
        logprobs=20,
        prompt_logprobs=0,
    )
    params = told(sampling)
    same = ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "frequency_penalty")
    assert [getattr(params, name) for name in same] == [getattr(sampling, name) for name in same]
    assert (params.presence_penalty, params.choice_index) == (2.0, 5)
    assert ints(params.bias_token_ids) == [17, 3]
    assert np.frombuffer(params.bias_values, "<f4").tolist() == [-100.0, np.float32(0.1)]
    assert (ints(params.allowed_token_ids), ints(params.banned_token_ids)) == ([1, 2, 3], [2, 9])
    assert (params.min_total_tokens, ints(params.end_token_ids)) == (7 + 4, END)
    assert (params.num_logprobs, params.num_prompt_logprobs) == (21, 1)
    assert {field.name for field in params.DESCRIPTOR.fields} == {field.name for field, _ in params.ListFields()}


def test_an_ordinary_request_sends_none_of_the_rarer_fields():
    sent = {field.name for field, _ in told(Sampling(top_k=3, min_p=0.5, seed=1)).ListFields()}
    assert sent == {"temperature", "top_k", "top_p", "min_p", "seed", "choice_index", "repetition_penalty"}


def test_of_a_constrained_request_the_masks_alone_say_which_tokens_are_allowed():
    sampling = Sampling(
        allowed_token_ids=[1], banned_token_ids=[2], min_tokens=3, logit_bias={1: 1.0}, presence_penalty=1.0, logprobs=0
    )
    params = told(sampling, constraint="start: /a/")
    sent = {field.name for field, _ in params.ListFields()}
    assert sent.isdisjoint({"allowed_token_ids", "banned_token_ids", "min_total_tokens", "end_token_ids"})
    assert (ints(params.bias_token_ids), params.presence_penalty, params.num_logprobs) == ([1], 1.0, 1)


@pytest.mark.parametrize("loss", [True, False])
def test_min_tokens_counts_from_the_prompt_also_when_the_request_is_resumed(loss: bool):
    core = Core(inflight=2)
    request = core.submit(range(10), 30, sampling=Sampling(min_tokens=25))
    for _ in range(8):
        core.step()
    if loss:
        core.pool.end_epoch()
        core.begin_epoch()
    else:
        core.pool.preempt(request)
    core.run()
    first, resumed = (plan.new_sequences[0] for plan in core.plans if plan.new_sequences)
    assert len(resumed.token_ids) > len(first.token_ids) == 4 * resumed.num_prompt_tokens == 4 * 10
    assert first.sampling.min_total_tokens == resumed.sampling.min_total_tokens == 35
