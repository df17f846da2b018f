"""Ranks that exchange values: streams of one GPU, a process a GPU, or processes of the interpreter that share files.

usage, for the latter two: python -m tests.kernels.gpu.peer_ranks DIRECTORY, where the environment says which rank it is
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement, local_environments
from kernels.gpu.peer_exchange import PeerMemory

ROOT = Path(__file__).parents[3]


class Case(Protocol):
    """What all ranks run together."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_words(self) -> int: ...

    def prepare(self, memory: PeerMemory) -> Callable[[], Any]:
        """Inputs of a rank; what comes back launches its work and returns tensors."""
        ...


def run(cases: Sequence[Case], place: str, directory: Path) -> list[list[Any]]:
    """What each rank returns for each case: [case][rank]; all have as many ranks. place: streams, gpus or cpu."""
    return _run_streams(cases) if place == "streams" else _run_processes(cases, place, directory)


def _run_streams(cases: Sequence[Case]) -> list[list[Any]]:
    results = []
    streams = [torch.cuda.Stream() for _ in range(cases[0].num_ranks)]
    for case in cases:
        words = [torch.ones(case.num_words, dtype=torch.int64, device="cuda") << 32 for _ in streams]
        addresses = torch.tensor([one.data_ptr() for one in words], dtype=torch.int64, device="cuda")
        memories = [PeerMemory(rank, addresses, case.num_words) for rank in range(case.num_ranks)]
        # Every word of the first exchange is there, so that ranks run alone: no kernel may be loaded while one waits.
        for memory in memories:
            case.prepare(memory)()
            torch.cuda.synchronize()
        for one in words:
            one.zero_()
        launches = [case.prepare(memory) for memory in memories]
        torch.cuda.synchronize()
        returned = []
        for stream, launch in zip(streams, launches, strict=True):
            with torch.cuda.stream(stream):
                returned.append(launch())
        torch.cuda.synchronize()
        results.append(returned)
    return results


def _run_processes(cases: Sequence[Case], place: str, directory: Path) -> list[list[Any]]:
    torch.save((place, list(cases)), directory / "cases.pt")
    num_ranks = cases[0].num_ranks
    for index, case in enumerate(cases):
        for rank in range(num_ranks):
            np.zeros(case.num_words, np.int64).tofile(_words_path(directory, index, rank))
    command = [sys.executable, "-m", "tests.kernels.gpu.peer_ranks", str(directory)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        for environment in local_environments(num_ranks, port)
    ]
    deadline = time.monotonic() + 240
    try:
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes), "a rank failed"
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.05)
        assert [process.returncode for process in processes] == [0] * num_ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()
    by_rank = [torch.load(directory / f"results-{rank}.pt") for rank in range(num_ranks)]
    return [list(returned) for returned in zip(*by_rank, strict=True)]


def _words_path(directory: Path, case: int, rank: int) -> Path:
    return directory / f"words-{case}-{rank}"


def _words(directory: Path, case: int, rank: int, num_words: int) -> Tensor:
    return torch.from_file(str(_words_path(directory, case, rank)), shared=True, size=num_words, dtype=torch.int64)


def main(directory: Path) -> None:
    placement = Placement.read(os.environ)
    place, cases = torch.load(directory / "cases.pt", weights_only=False)
    results = _run_on_gpu(placement, cases) if place == "gpus" else _run_interpreted(placement, cases, directory)
    torch.save(results, directory / f"results-{placement.rank}.pt")


def _run_on_gpu(placement: Placement, cases: Sequence[Case]) -> list[Any]:
    device = torch.device("cuda", placement.local_rank)
    torch.cuda.set_device(device)
    group = RankGroup(placement, device)
    results = []
    for case in cases:
        memory = group.peer_memory(case.num_words)
        assert memory is not None, "the GPUs do not reach each other's memory"
        launch = case.prepare(memory)
        torch.cuda.synchronize()
        results.append([_to_host(returned) for returned in launch()])
    group.least(0)  # nobody ends while others still write into its memory
    return results


def _to_host(returned: Any) -> Any:
    return returned.cpu() if isinstance(returned, Tensor) else tuple(part.cpu() for part in returned)


def _run_interpreted(placement: Placement, cases: Sequence[Case], directory: Path) -> list[Any]:
    results = []
    for index, case in enumerate(cases):
        words = [_words(directory, index, peer, case.num_words) for peer in range(case.num_ranks)]
        memory = PeerMemory(placement.rank, torch.tensor([one.data_ptr() for one in words]), case.num_words)
        with np.errstate(all="ignore"):
            results.append(case.prepare(memory)())
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
