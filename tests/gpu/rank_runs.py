"""A rank of an executor, in process: runs plans that a test has left in a file.

usage: python -m tests.gpu.rank_runs DIRECTORY, where the environment says which rank it is
"""

import logging
import os
import sys
from pathlib import Path

import torch

from executor_service.distributed.placement import Placement
from executor_service.runner.build import build_runner
from executor_service.runner.gpu.gpu_runner import GpuRunner
from tests.gpu.test_gpu_executor import run


def main(directory: Path) -> None:
    logging.basicConfig(level=logging.INFO)
    placement = Placement.read(os.environ)
    config, batches = torch.load(directory / "work.pt", weights_only=False)
    runner = build_runner(config, placement)
    assert isinstance(runner, GpuRunner)
    tokens = []
    for plans, num_seqs in batches:
        runner.reset()
        tokens.append(run(runner, plans, num_seqs))
    torch.save((runner.info.limits.num_blocks, tokens), directory / f"tokens-{placement.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # graphs that hold NCCL's kernels can make an orderly end wait for ever
