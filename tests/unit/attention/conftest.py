import sys

import fake_flash_attn
import pytest
import torch


@pytest.fixture
def flash_attn(monkeypatch):
    """The fake package, importable as flash_attn."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    fake_flash_attn.calls.clear()
    return fake_flash_attn


@pytest.fixture
def flash_in_fp64(flash_attn, monkeypatch):
    """FlashCoreAttention in fp64, where differences mean errors."""
    from megatron_longrope.attention import flash

    monkeypatch.setattr(flash, "_DTYPES", (torch.float64,))
    return flash_attn
