"""`kernels` is also an unrelated package on PyPI, and transformers probes for it: ours must do no harm there."""

import subprocess
import sys
from pathlib import Path

from tests.unit.tiny_checkpoints import save_tiny_model

ROOT = Path(__file__).parents[2]

GENERATE = """
import sys
import kernels
import torch, transformers
assert kernels.__path__[0].startswith(sys.argv[2]), kernels.__path__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
assert tokens.shape == (1, 5), tokens.shape
"""
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import kernels.cpu.eager, kernels.cpu.eager_attention, kernels.cpu.engine, kernels.reference
assert not any(name.split(".")[0] in ("executor_service", "scheduler_service") for name in sys.modules)
"""


def run(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr


def test_transformers_loads_and_runs_a_model_with_our_kernels_importable(tmp_path):
    save_tiny_model(tmp_path, "LlamaForCausalLM")
    run(GENERATE, str(tmp_path), str(ROOT))


def test_kernels_import_without_triton_and_nothing_of_ours():
    run(WITHOUT_TRITON)
