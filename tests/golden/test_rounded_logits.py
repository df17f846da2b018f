"""What bfloat16 and int8 weights do to the default model's predictions, in bounds that a mistake would break.

Measured over sixteen texts: bfloat16 0.00015 nats, int8 0.049 (docs/decisions/0018-cpu-kernels.md).
"""

import shutil

import pytest
import torch

from benchmarks.rounded_logits import measure
from tests.golden.oracle import Oracle

BOUNDS = {"bfloat16": (0.001, 0.97), "int8 weights, bfloat16": (0.08, 0.78), "int8 weights, float32": (0.08, 0.78)}


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_rounded_weights_predict_nearly_what_float32_predicts(oracle: Oracle) -> None:
    num_threads = torch.get_num_threads()
    try:
        measured = measure(oracle.model, 4, list(BOUNDS))
    finally:
        torch.set_num_threads(num_threads)
    for name, (largest_mean, least_same_choice) in BOUNDS.items():
        assert measured[name].mean < largest_mean, name
        assert measured[name].same_choice > least_same_choice, name
