"""Published factors: every vector loads, alone too, and rotates as the released model does."""

import warnings
from dataclasses import replace

import pytest
import torch

from megatron_longrope import published
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.frequencies import inv_freq_fp32

AUTHORS = ("llama2-128k", "llama2-256k", "mistral-128k", "mistral-256k")
DEPLOYED = {"phi-3-mini-128k": 96, "phi-3.5-mini": 96, "phi-4-mini": 128}
"""Size of a head; Phi-4-mini rotates three quarters of it."""


def load(name: str) -> tuple[LongRopeConfig, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = LongRopeConfig.load(f"published:{name}")
    return config, [str(item.message) for item in caught]


def test_the_thirty_vectors_of_the_authors_are_there_and_each_stands_alone_too():
    sets = [(load(name)[0], item) for name in AUTHORS for item in load(name)[0].factor_sets]
    assert len(sets) == 30
    for config, item in sets:
        assert replace(config, factor_sets=(item,)).factor_sets == (item,)


def test_what_is_published_states_its_source_and_licence():
    assert set(published.names()) == {*AUTHORS, *DEPLOYED, "llama3-8b-longrope2"}
    for name in published.names():
        for item in load(name)[0].factor_sets:
            assert item.origin["license"] == "MIT"
            assert item.origin["source"]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("mistral-128k", "factor_sets[2].rescale_factors[6] is 1.1, below its predecessor 1.11"),
        ("phi-3-mini-128k", "factor_sets[1].rescale_factors[39] is 64.06739807128906, over 64"),
        ("llama2-256k", None),
    ],
)
def test_unusual_factors_are_one_warning_by_set_and_index(name, warning):
    _, messages = load(name)
    if warning is None:
        assert messages == []
    else:
        assert [text.startswith(f"published:{name}: {warning}") for text in messages] == [True]


@pytest.mark.parametrize(("name", "head"), DEPLOYED.items())
def test_a_deployed_model_is_read_and_rotates_as_in_transformers(name, head):
    transformers = pytest.importorskip("transformers")
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    stored = load(name)[0]
    original, longest = stored.original_max_position_embeddings, stored.max_length
    short, long = (list(item.rescale_factors) for item in stored.factor_sets)
    hf = {
        "max_position_embeddings": longest,
        "original_max_position_embeddings": original,
        "rope_theta": stored.rotary_base,
        "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its factors are unusual, as the test above says
        config = LongRopeConfig.from_hf(hf)
    rotary = Phi3RotaryEmbedding(
        transformers.Phi3Config(
            hidden_size=2 * head, num_attention_heads=2, partial_rotary_factor=96 / head, **hf
        )
    )
    assert config.to_hf() == stored.to_hf()
    assert rotary.attention_scaling == config.attention_factor_for(original)
    for length in (original, original + 1):
        rotary(torch.zeros(1), torch.arange(length)[None])
        factors = torch.tensor(config.factor_set_for(length).rescale_factors, dtype=torch.float64)
        assert torch.equal(rotary.inv_freq, inv_freq_fp32(stored.rotary_base, 96, factors))


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"^published:llama9: no such factors; published are llama"
    ):
        LongRopeConfig.load("published:llama9")
