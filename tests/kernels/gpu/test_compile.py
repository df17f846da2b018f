"""Every kernel compiles for sm_90, on any machine."""

import importlib
import json
import pkgutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kernels.gpu

MAX_SHARED = 227 * 1024  # bytes a program may have on sm_90


@pytest.fixture(scope="module")
def variants(compilers: dict[Path, "subprocess.Popen[bytes]"]) -> list[dict[str, Any]]:
    """What compile_sm90 says, in processes of its own, since this one may interpret."""
    for path, process in compilers.items():
        assert process.wait() == 0, path.with_suffix(".log").read_text()
    return [json.loads(line) for path in compilers for line in path.read_text().splitlines()]


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
