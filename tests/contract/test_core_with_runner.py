"""The core's plans on the executor's CPU runner, over the encoded messages of both, against transformers."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.plan import decode_plan
from executor_service.runner.cpu_build import build_cpu_runner
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.session import _encode
from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.request import Request
from scheduler_service.ipc import Sampling
from tests.unit.core_harness import Core, FakeExecutor
from tests.unit.tiny_checkpoints import save_tiny_model

VOCAB_SIZE, MAX_MODEL_LEN = 96, 128
LIMITS = ExecutorLimits(
    block_size=8, num_blocks=40, num_slots=6, max_tokens_per_step=24, max_model_len=MAX_MODEL_LEN, max_inflight_plans=2
)
TIGHT = dataclasses.replace(LIMITS, num_blocks=13)
PROMPT = [7 * index % 90 + 1 for index in range(35)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, save_tiny_model(directory, "LlamaForCausalLM", vocab_size=VOCAB_SIZE)


class RealExecutor(FakeExecutor):
    """The runner in the place of the fake, behind the messages of a session."""

    def __init__(self, limits: ExecutorLimits, runner: CpuRunner) -> None:
        super().__init__(limits)
        self._runner = runner
        runner.reset()

    def run(self, plan: pb.StepPlan) -> list[pb.StepResult]:
        decoded = decode_plan(pb.StepPlan.FromString(plan.SerializeToString()), self._runner.info.limits)
        outputs = [_encode(output, plan.epoch).SerializeToString() for output in self._runner.execute(decoded)]
        return [pb.StepResult.FromString(output) for output in outputs]


class RealCore(Core):
    """The harness's core, on the runner."""

    def __init__(self, directory: Path, limits: ExecutorLimits) -> None:
        config = ExecutorConfig(
            model=str(directory), dtype="float32", block_size=limits.block_size, num_blocks=limits.num_blocks,
            max_num_seqs=limits.num_slots, max_tokens_per_step=limits.max_tokens_per_step,
            max_model_len=limits.max_model_len, num_threads=1,
        )  # fmt: skip
        self._runner = build_cpu_runner(config, RankGroup(Placement(), torch.device("cpu")))
        super().__init__(limits, inflight=2)

    def begin_epoch(self, limits: ExecutorLimits | None = None) -> None:
        self.executor = RealExecutor(self.limits, self._runner)
        self.in_flight = deque()
        self.pool.begin_epoch(self.limits)


@torch.inference_mode()
def assert_logprobs_of_the_model(
    model: PreTrainedModel, token_ids: Sequence[int], position: int, told: tuple[list[int], list[float], int]
) -> None:
    """What is told of a position is what transformers computes for it."""
    logits = model(torch.tensor([token_ids[:position]])).logits[0, -1].float()
    expected = logits.log_softmax(-1)
    told_ids, logprobs, rank = told
    assert told_ids[0] == token_ids[position]
    assert rank == 1 + int((logits > logits[token_ids[position]]).sum())
    assert told_ids[1:] == logits.topk(len(told_ids) - 1).indices.tolist()
    assert np.allclose(logprobs, expected[told_ids].numpy(), atol=1e-4)


def streamed_alone(directory: Path, sampling: Sampling, n: int, max_tokens: int) -> list[list[int]]:
    core = RealCore(directory, LIMITS)
    choices = core.submit_choices(n, PROMPT, max_tokens, sampling=sampling)
    core.run()
    assert core.pool.counters.preemptions == 0
    return [core.streamed(request) for request in choices]


def disturbed(core: RealCore) -> None:
    """Run to the end, over the loss of the executor, and see that requests were preempted too."""
    while not core.pool.counters.preemptions:
        core.step()
    core.step()
    core.pool.end_epoch()
    core.begin_epoch()
    core.run()


def told_rows(core: RealCore, request: Request) -> list[tuple[list[int], list[float], int]]:
    return [(row.token_ids, row.logprobs, row.rank) for row in core.streamed_logprobs(request)]


def test_log_probabilities_are_the_models_own_at_every_position_whatever_happens_to_the_request(
    checkpoint: tuple[Path, PreTrainedModel],
):
    directory, model = checkpoint
    core = RealCore(directory, TIGHT)
    sampling = Sampling(temperature=0.9, seed=11, presence_penalty=1.5, logprobs=3, prompt_logprobs=2)
    choices = core.submit_choices(3, PROMPT, 24, sampling=sampling)
    disturbed(core)
    for request in choices:
        token_ids = [*PROMPT, *core.streamed(request)]
        rows = told_rows(core, request)
        assert len(rows) == 24
        for index, row in enumerate(rows):
            assert_logprobs_of_the_model(model, token_ids, len(PROMPT) + index, row)
    (told,) = core.outbox.prompt_logprobs
    ids = np.frombuffer(told.token_ids, "<i4").reshape(-1, 3).tolist()
    logprobs = np.frombuffer(told.logprobs, "<f4").reshape(-1, 3).tolist()
    ranks = np.frombuffer(told.ranks, "<i4").tolist()
    assert len(ids) == len(PROMPT) - 1
    for index, row in enumerate(zip(ids, logprobs, ranks, strict=True)):
        assert_logprobs_of_the_model(model, PROMPT, 1 + index, row)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.2, seed=3),
        Sampling(temperature=1.0, seed=4, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4),
        Sampling(temperature=1.5, seed=5, allowed_token_ids=list(range(0, 90, 3)), banned_token_ids=[3, 6]),
        Sampling(temperature=1.0, seed=6, logit_bias={5: 4.0, 6: -100.0}, min_tokens=20, top_k=40),
    ],
    ids=["noise", "penalties", "allowed and banned", "bias and min_tokens"],
)
def test_choices_get_the_tokens_of_an_undisturbed_run_over_preemptions_and_a_loss(
    checkpoint: tuple[Path, PreTrainedModel], sampling: Sampling
):
    directory, _ = checkpoint
    undisturbed = streamed_alone(directory, sampling, 3, 24)
    assert len({tuple(tokens) for tokens in undisturbed}) == 3, "each choice has noise of its own"
    core = RealCore(directory, TIGHT)
    choices = core.submit_choices(3, PROMPT, 24, sampling=sampling)
    disturbed(core)
    assert [core.streamed(request) for request in choices] == undisturbed
