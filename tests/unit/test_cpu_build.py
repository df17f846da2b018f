"""Which kernels a CPU runner gets: the library in C where it can be built, PyTorch otherwise, and clear refusals."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.runner import cpu_build
from executor_service.runner.build import build_runner
from executor_service.runner.cpu_build import build_cpu_steps
from executor_service.runner.cpu_steps import EagerSteps, EngineSteps
from executor_service.weights.errors import UnfitSettings
from kernels.cpu import build as library_build
from kernels.cpu.levels import LEVELS, usable_levels
from tests.unit.runner_harness import ALONE, save_tiny_llama, tiny_settings
from tests.unit.tiny_checkpoints import save_tiny_model

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


@pytest.fixture(scope="module", autouse=True)
def kept_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture
def no_gcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, and no build of an earlier day."""
    monkeypatch.setattr(library_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu_build, "library_directory", lambda environ: tmp_path)


@needs_gcc
def test_the_library_computes_and_the_log_says_for_what_processor(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(build_cpu_steps(tiny_settings(model), ALONE).steps, EngineSteps)
    assert f"the library in C computes, built for {usable_levels()[0].name}" in caplog.text


@pytest.mark.usefixtures("no_gcc")
def test_without_gcc_pytorch_computes_and_the_log_says_so(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(build_cpu_steps(tiny_settings(model), ALONE).steps, EagerSteps)
    assert "no library in C, so PyTorch computes" in caplog.text
    assert "there is no gcc" in caplog.text


@pytest.mark.usefixtures("no_gcc")
@pytest.mark.parametrize("flags", [{"weights": "int8"}, {"cpu_kernels": "portable"}], ids=str)
def test_without_gcc_settings_that_need_the_library_are_refused(model: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(UnfitSettings, match="there is no gcc"):
        build_cpu_steps(tiny_settings(model, **flags), ALONE)


def test_pytorch_computes_where_it_is_asked_for(model: Path) -> None:
    assert isinstance(build_cpu_steps(tiny_settings(model, cpu_kernels="torch"), ALONE).steps, EagerSteps)


def test_a_level_that_the_processor_lacks_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "usable_levels", lambda: [LEVELS[-1]])
    with pytest.raises(UnfitSettings, match="cannot run --cpu-kernels avx512"):
        build_cpu_steps(tiny_settings(model, cpu_kernels="avx512"), ALONE)


@pytest.mark.parametrize("flags", [{"weights": "int8"}, {"cpu_kernels": "avx2"}], ids=str)
def test_several_ranks_refuse_what_only_the_library_can_do(model: Path, flags: dict[str, Any]) -> None:
    group = RankGroup.__new__(RankGroup)  # its processes would have to be started
    object.__setattr__(group, "placement", Placement(rank=0, size=2, local_rank=0, local_size=2))
    with pytest.raises(UnfitSettings, match="one rank only"):
        build_cpu_steps(tiny_settings(model, tensor_parallel_size=2, **flags), group)


@needs_gcc
def test_a_model_of_sizes_that_no_panel_fits_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "LlamaForCausalLM", intermediate_size=104)
    with pytest.raises(UnfitSettings, match="use --cpu-kernels torch"):
        build_cpu_steps(tiny_settings(tmp_path), ALONE)


def test_int8_weights_are_refused_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UnfitSettings, match="--weights int8 is for the CPU"):
        build_runner(tiny_settings(model, device="cuda", weights="int8"))


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled does not matter here."""
    monkeypatch.setattr(library_build, "OPTIONS", ("-std=c11", "-O0", "-w", "-D_GNU_SOURCE"))


@needs_gcc
@pytest.mark.usefixtures("quick_build")
def test_a_build_that_is_there_is_used_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library_build.build(LEVELS[-1], tmp_path)
    monkeypatch.setattr(library_build.shutil, "which", lambda name: None)
    assert library_build.build(LEVELS[-1], tmp_path) == built
    with pytest.raises(library_build.BuildError, match="there is no gcc"):
        library_build.build(LEVELS[0], tmp_path)


@needs_gcc
@pytest.mark.usefixtures("quick_build")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_build, "LIBRARIES", ("-lno-such-library",))
    with pytest.raises(library_build.BuildError, match="no-such-library"):
        library_build.build(LEVELS[-1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_threads_get_cores_of_their_own_and_ranks_their_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build.os, "sched_getaffinity", lambda pid: {2, 3, 5, 7})
    settings = tiny_settings(model, num_threads=None)
    assert cpu_build._choose_cores(settings, 0, 1) == [2, 3, 5, 7]
    assert cpu_build._choose_cores(settings, 1, 2) == [5, 7]
    assert cpu_build._choose_cores(tiny_settings(model, num_threads=6), 0, 1) == [2, 3, 5, 7, 2, 3]
    assert cpu_build._choose_cores(tiny_settings(model, num_threads=1), 0, 1) == [2]
