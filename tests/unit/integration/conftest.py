import pytest
import torch


@pytest.fixture
def megatron():
    """Process groups of one rank; every symbol as it was when the test ends."""
    from megatron_longrope.engine import process_groups
    from megatron_longrope.integration import hooks

    process_groups.initialize()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_num_threads(threads)
    hooks.remove()
