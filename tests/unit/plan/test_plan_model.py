"""Shapes and their number of parameters."""

import pytest
import torch

from megatron_longrope.plan.model import MODELS, Model, find_model

# What the publishers' weight files hold, without buffers.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "phi3-mini": 3_821_079_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_known_model_has_its_published_number_of_parameters(name):
    assert MODELS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("config", "model", "more"),
    [
        ("Llama", "llama2-7b", {}),
        ("Qwen2", "qwen2.5-7b", {}),
        ("Qwen3", "qwen3-8b", {"head_dim": 128}),
        ("Mixtral", "mixtral-8x7b", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
)
def test_transformers_builds_as_many_parameters(config, model, more):
    transformers = pytest.importorskip("transformers")
    ours = MODELS[model]
    options = getattr(transformers, f"{config}Config")(
        num_hidden_layers=2,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.ffn_hidden_size,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_query_groups,
        vocab_size=ours.vocab_size,
        tie_word_embeddings=not ours.untie_embeddings,
        **more,
    )
    with torch.device("meta"):
        theirs = getattr(transformers, f"{config}ForCausalLM")(options)
    small = Model(**{**vars(ours), "num_layers": 2})
    assert small.parameters == sum(weight.numel() for weight in theirs.parameters())


def test_a_checkpoints_shape_becomes_the_same_model(untied_gqa):
    from megatron_longrope.checkpoint import MegatronCheckpoint

    checkpoint = MegatronCheckpoint.open(untied_gqa.path)
    model = Model.from_shape(checkpoint.shape)
    stored = sum(torch.Size(info.shape).numel() for info in checkpoint.keys().values())
    padding = checkpoint.shape.padded_vocab_size - model.vocab_size
    assert model.parameters + 2 * padding * model.hidden_size == stored


def test_a_hybrid_model_is_refused(hybrid_runs):
    from megatron_longrope.checkpoint import MegatronCheckpoint

    with pytest.raises(ValueError, match="a HybridModel, which the plan's formulas do not cover"):
        Model.from_shape(MegatronCheckpoint.open(hybrid_runs["same"][0]).shape)


def test_rows_are_padded_as_megatron_pads_them():
    phi = MODELS["phi3-mini"]
    assert [phi.rows(tensor) * tensor for tensor in (1, 2, 8)] == [32128, 32256, 32768]


def test_an_unknown_model_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"model 'gpt-5' is unknown; name one of llama2-7b, .*"):
        find_model("gpt-5")
