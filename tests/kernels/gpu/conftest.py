"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
