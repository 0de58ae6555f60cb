"""Which attention the engine takes, where."""

import sys

import fake_flash_attn
import make_megatron_checkpoint as maker
import pytest
import torch

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention
from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import Engine, load_engine, process_groups
from megatron_longrope.engine.kernels import core_attention, describe
from megatron_longrope.engine.model import build_model

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HALF = torch.bfloat16


@pytest.fixture
def flash_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def no_flash(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["auto", "flash"])
def test_flash_is_taken_on_cuda_in_half_precision(flash_installed, attention, dtype):
    assert core_attention(attention, CUDA, dtype) is FlashCoreAttention


@pytest.mark.parametrize(
    ("device", "dtype", "obstacle"),
    [(CPU, HALF, "the device is cpu"), (CUDA, torch.float32, "the dtype is torch.float32")],
)
def test_elsewhere_auto_is_sdpa_and_flash_is_refused(flash_installed, device, dtype, obstacle):
    assert core_attention("auto", device, dtype) is SdpaCoreAttention
    with pytest.raises(ValueError, match=f"{obstacle}; use attention 'sdpa'"):
        core_attention("flash", device, dtype)


def test_without_the_package_auto_is_sdpa_and_flash_is_refused(no_flash):
    assert core_attention("auto", CUDA, HALF) is SdpaCoreAttention
    with pytest.raises(ValueError, match=r"flash-attn 2 cannot be used \(import of flash_"):
        core_attention("flash", CUDA, HALF)


def test_sdpa_is_sdpa_everywhere(flash_installed):
    assert core_attention("sdpa", CUDA, HALF) is SdpaCoreAttention


def test_another_name_is_refused(megatron_runs):
    with pytest.raises(ValueError, match=r"attention 'xla' is unknown .* auto, sdpa, flash"):
        load_engine(megatron_runs["tied_mha"].path, device="cpu", attention="xla")


def test_a_model_on_flash_gives_the_losses_of_sdpa(flash_installed, megatron_runs):
    process_groups.initialize()
    checkpoint = MegatronCheckpoint.open(megatron_runs["untied_gqa"].path)
    tokens = random_tokens(maker.VOCAB, maker.LONG_TOKENS, 1)
    fake_flash_attn.calls.clear()
    losses = []
    for kernel in (SdpaCoreAttention, FlashCoreAttention):
        model = build_model(checkpoint.shape, maker.longrope_config(), core_attention=kernel)
        load_into(model, checkpoint)
        losses.append(Engine(model.to(HALF), checkpoint.shape).nll(tokens))
    assert fake_flash_attn.calls["flash_attn_func"] == maker.LAYERS
    torch.testing.assert_close(*losses, atol=0.1, rtol=0)  # bf16
    assert (losses[0] - losses[1]).abs().mean() < 0.01


def test_what_auto_takes_is_described_with_the_reason(flash_installed):
    assert describe(CUDA, HALF) == "flash (flash-attn 2)"
    assert describe(CPU, HALF) == "sdpa (the device is cpu)"
