"""The MLP takes some tokens at a time and computes the same."""

import make_megatron_checkpoint as maker
import pytest
import torch
from megatron.core.transformer.mlp import MLP

from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import load_engine
from megatron_longrope.engine import mlp as mlp_module


@pytest.fixture(scope="module", params=["GPTModel", "HybridModel"])
def engine(request, megatron_runs, hybrid_runs):
    paths = {"GPTModel": megatron_runs["untied_gqa"].path, "HybridModel": hybrid_runs["same"][0]}
    engine = load_engine(
        paths[request.param], longrope_config=maker.longrope_config(), device="cpu"
    )
    assert request.param in (type(engine.model).__name__, "HybridModel")  # MambaModel in 0.17
    return engine


def mlps_of(engine):
    return [module for module in engine.model.modules() if isinstance(module, MLP)]


# Of one and of several slices a position, and a batch wider than a slice.
@pytest.mark.parametrize(
    ("batch", "tokens_per_slice"), [(1, 1), (2, 1), (1, 7), (2, 7), (2, 50), (1, 200), (5, 3)]
)
def test_slices_change_nothing_but_rounding(engine, monkeypatch, tokens_per_slice, batch):
    tokens = torch.cat([random_tokens(maker.VOCAB, 100, seed) for seed in range(batch)])
    whole = engine.nll(tokens)
    monkeypatch.setattr(mlp_module, "_TOKENS_PER_SLICE", tokens_per_slice)
    torch.testing.assert_close(engine.nll(tokens), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_no_intermediate_has_more_tokens_than_a_slice(engine, monkeypatch, batch):
    sizes = []
    hooks = [
        mlp.linear_fc1.register_forward_hook(lambda _, __, out: sizes.append(out[0].shape))
        for mlp in mlps_of(engine)
    ]
    assert len(hooks) == maker.LAYERS
    monkeypatch.setattr(mlp_module, "_TOKENS_PER_SLICE", 16)
    tokens = torch.cat([random_tokens(maker.VOCAB, 100, seed) for seed in range(batch)])
    engine.nll(tokens)
    for hook in hooks:
        hook.remove()
    assert {size[-1] for size in sizes} == {2 * maker.FFN}
    assert max(size.numel() for size in sizes) == 16 * 2 * maker.FFN
    assert sum(size[:-1].numel() for size in sizes) == maker.LAYERS * batch * 100
