"""Three packages of flash-attention, called alike, and the one that suits the GPU."""

import sys
from types import ModuleType

import fake_flash_attn
import pytest
import torch

pytest.importorskip("megatron.core")

from attention_cases import (
    Pack,
    assert_same,
    core_attention,
    packed_reference,
    random_batch,
    reference,
)

from megatron_longrope.attention import FlashCoreAttention, flash, flash_kernels


def module(name, dense, varlen):
    made = ModuleType(name)
    made.flash_attn_func, made.flash_attn_varlen_func = dense, varlen
    return made


def release_3():
    """The signatures of flash-attn 3: no dropout, the logsumexp on demand."""

    def dense(q, k, v, softmax_scale=None, causal=False, deterministic=False, sm_margin=0,
              return_attn_probs=False):  # fmt: skip
        output, lse = fake_flash_attn._attend(q, k, v, 0.0, softmax_scale, causal)
        return (output, lse) if return_attn_probs else output

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
               softmax_scale=None, causal=False, deterministic=False):  # fmt: skip
        return fake_flash_attn.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal,
        )  # fmt: skip

    return module("flash_attn_interface", dense, varlen)


def release_4():
    """The signatures of flash-attn 4: always a pair, no longest lengths in its first releases."""

    def dense(q, k, v, softmax_scale=None, causal=False, deterministic=False, return_lse=False):
        output, lse = fake_flash_attn._attend(q, k, v, 0.0, softmax_scale, causal)
        return output, lse if return_lse else None

    def varlen(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
        longest = (int(cu.diff().max()) for cu in (cu_seqlens_q, cu_seqlens_k))
        output = fake_flash_attn.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, 0.0, softmax_scale, causal
        )
        return output, None

    return module("flash_attn.cute", dense, varlen)


@pytest.fixture
def installed(monkeypatch):
    """Install releases by number and leave out the others."""

    def install(*releases):
        namespace = ModuleType("flash_attn")
        namespace.__path__ = []
        modules = {
            "flash_attn": fake_flash_attn if 2 in releases else namespace,
            "flash_attn_interface": release_3() if 3 in releases else None,
            "flash_attn_3": None,
            "flash_attn.cute": release_4() if 4 in releases else None,
        }
        for name, value in modules.items():
            monkeypatch.setitem(sys.modules, name, value)

    return install


@pytest.mark.parametrize(
    ("capability", "releases", "name"),
    [
        ((9, 0), (2, 3, 4), "flash-attn 3"),
        ((9, 0), (2, 4), "flash-attn 4"),
        ((9, 0), (2,), "flash-attn 2"),
        ((10, 0), (2, 3, 4), "flash-attn 4"),
        ((8, 6), (2, 3, 4), "flash-attn 2"),
        (None, (4,), "flash-attn 4"),
    ],
)
def test_the_fastest_package_for_the_gpu_is_taken(installed, capability, releases, name):
    installed(*releases)
    assert flash_kernels.find(capability).name == name


def test_a_namespace_without_the_function_is_no_flash_attention(installed):
    """Where flash-attn 4 alone is installed, `import flash_attn` succeeds."""
    installed(4)
    with pytest.raises(ValueError, match=r"flash-attn 2 cannot be used .*flash_attn_func"):
        flash_kernels.find((8, 0))


def test_a_build_for_another_torch_is_no_flash_attention(monkeypatch, installed):
    installed()

    class Undefined(ModuleType):
        def __getattr__(self, name):
            raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore")

    monkeypatch.setitem(sys.modules, "flash_attn", Undefined("flash_attn"))
    with pytest.raises(ValueError) as error:
        flash_kernels.find((8, 0))
    assert str(error.value) == (
        "flash-attn 2 cannot be used (flash_attn_2_cuda.so: undefined symbol: _ZN3c10)"
    )


def test_a_gpu_before_ampere_has_none():
    with pytest.raises(ValueError, match=r"compute capability 7\.5, below 8\.0"):
        flash_kernels.find((7, 5))


@pytest.mark.parametrize("release", [2, 3, 4])
def test_every_release_computes_the_same_attention(monkeypatch, installed, release):
    installed(release)
    monkeypatch.setattr(flash, "_DTYPES", (torch.float64,))
    attention = core_attention(FlashCoreAttention)
    assert attention.kernels.name == f"flash-attn {release}"
    *qkv, _ = random_batch(12, groups=2, batch=2)
    assert_same([attention(*qkv)], [reference(*qkv)])
    pack = Pack.tight(5, 7)
    *qkv, _ = random_batch(pack.total, groups=2)
    assert_same([attention(*qkv, packed_seq_params=pack.params())], [packed_reference(*qkv, pack)])
    query, key, value = (x.transpose(0, 1) for x in random_batch(6, groups=4, batch=2)[:3])
    output, lse = attention._tile(query, key, value, 0.5, True)
    scores = torch.einsum("bshd,bthd->bhst", query, key) * 0.5
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected.transpose(1, 2))
    assert output.shape == query.shape


def test_with_dropout_the_package_that_has_it_is_taken_or_none(monkeypatch, installed):
    monkeypatch.setattr(flash_kernels, "capability", lambda: (9, 0))
    installed(2, 3, 4)
    attention = core_attention(FlashCoreAttention, attention_dropout=0.1)
    assert attention.kernels.name == "flash-attn 2"
    installed(3, 4)
    with pytest.raises(ValueError, match=r"only flash-attn 2 has dropout \(--attention-dropout 0 "):
        core_attention(FlashCoreAttention, attention_dropout=0.1)
