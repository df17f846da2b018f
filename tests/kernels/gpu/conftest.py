"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def wrapping_integers() -> Iterator[None]:
    """As on a GPU: numpy, which interprets kernels, warns where an integer overflows or a NaN is computed with."""
    with np.errstate(all="ignore"):
        yield
