import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def needs_gpu():
    """Skip without one, and say why there is none."""
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        found = f"torch {torch.__version__} finds no CUDA device, or its driver is too old"
        pytest.skip("CUDA_VISIBLE_DEVICES hides the GPU; run tests/gpu alone" if hidden else found)
