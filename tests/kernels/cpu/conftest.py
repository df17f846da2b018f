"""What the tests of the library in C share: a build for each level that this machine's processor can run."""

import functools
import os
import shutil

import pytest

from kernels.cpu.build import library_directory
from kernels.cpu.levels import Level, usable_levels
from kernels.cpu.library import Library, load_library


@functools.cache
def load_once(level: Level) -> Library:
    return load_library(level, library_directory(os.environ))


@pytest.fixture(params=usable_levels(), ids=lambda level: level.name)
def library(request: pytest.FixtureRequest) -> Library:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    return load_once(request.param)
