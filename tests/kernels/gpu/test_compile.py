"""Every kernel compiles for sm_90, on any machine."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kernels.gpu

ROOT = Path(__file__).parents[3]
MAX_SHARED = 227 * 1024  # bytes a program may have on sm_90


@pytest.fixture(scope="module")
def variants() -> list[dict[str, Any]]:
    """What compile_sm90 says, side by side for two dtypes; in processes of their own, since this may interpret."""
    with ThreadPoolExecutor() as threads:
        return [variant for dtype in threads.map(compiled, ("bfloat16", "float32")) for variant in dtype]


def compiled(dtype: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_sm90", dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(900)
def test_every_variant_fits_an_sm(variants):
    assert [variant for variant in variants if variant["shared"] > MAX_SHARED] == []
    print(f"{len(variants)} variants, {sum(variant['seconds'] for variant in variants):.1f} s")
    for variant in variants:
        print(json.dumps(variant))


@pytest.mark.timeout(900)
def test_no_launched_kernel_is_missing(variants):
    """A jit function called ..._kernel is launched by some wrapper."""
    names = set()
    for module in pkgutil.iter_modules(kernels.gpu.__path__, "kernels.gpu."):
        functions = vars(importlib.import_module(module.name)).items()
        names |= {
            f"{module.name}.{name}"
            for name, function in functions
            if name.endswith("_kernel") and function.fn.__module__ == module.name
        }
    assert names == {variant["kernel"] for variant in variants}
