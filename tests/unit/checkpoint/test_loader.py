import pytest
import torch
from torch import nn

from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
from megatron_longrope.checkpoint.layout import disk_name

LOCAL = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
FUSED = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")


def make_model(norms=LOCAL, tp=1, layers=2, padded=64, extra=()):
    """Parameters named as a GPTModel names them, without megatron."""
    shapes = {
        "embedding.word_embeddings.weight": (padded // tp, 32),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (padded // tp, 32),
    }
    for layer in range(layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + norms[0]: (32,),
            prefix + "self_attention.linear_qkv.weight": (64 // tp, 32),
            prefix + "self_attention.linear_proj.weight": (32, 32 // tp),
            prefix + norms[1]: (32,),
            prefix + "mlp.linear_fc1.weight": (96 // tp, 32),
            prefix + "mlp.linear_fc2.weight": (32, 48 // tp),
        }
    shapes |= {name: (1,) for name in extra}
    model = nn.Module()
    for name, shape in shapes.items():
        *parents, leaf = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, nn.Parameter(torch.full(shape, float("nan"))))
    return model


@pytest.mark.parametrize("norms", [LOCAL, FUSED], ids=["local spec", "Transformer Engine spec"])
def test_every_parameter_gets_its_tensor(make_checkpoint, tensors, norms):
    model = make_model(norms)
    assert load_into(model, MegatronCheckpoint.open(make_checkpoint())) == 15
    for name, parameter in model.named_parameters():
        disk, layer = disk_name(name)
        expected = tensors[disk] if layer is None else tensors[disk][layer]
        if disk in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(parameter[:50], expected[:50])
            assert not parameter[50:].any()
        else:
            assert torch.equal(parameter, expected)


def test_wrapped_models_are_recognised(make_checkpoint):
    wrapped = nn.Module()
    wrapped.add_module("module", make_model())
    assert load_into(wrapped, MegatronCheckpoint.open(make_checkpoint())) == 15


def test_tensor_parallel_parts_put_together_are_the_whole(make_checkpoint, tensors):
    checkpoint = MegatronCheckpoint.open(make_checkpoint())
    parts = [make_model(tp=2) for _ in range(2)]
    for rank, part in enumerate(parts):
        load_into(part, checkpoint, tp_rank=rank, tp_size=2)
    left, right = (dict(part.named_parameters()) for part in parts)

    def both(name, dim):
        return torch.cat([left[name], right[name]], dim=dim)

    embedding = both("embedding.word_embeddings.weight", 0)
    assert torch.equal(embedding[:50], tensors["embedding.word_embeddings.weight"][:50])
    layer = "decoder.layers."
    qkv = "self_attention.linear_qkv.weight"
    assert torch.equal(both(f"{layer}1.{qkv}", 0), tensors[layer + qkv][1])
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert torch.equal(both(f"{layer}0.{name}", 1), tensors[layer + name][0])
    gate, up = tensors[f"{layer}mlp.linear_fc1.weight"][0].chunk(2)
    ours = left[f"{layer}0.mlp.linear_fc1.weight"]
    assert torch.equal(ours, torch.cat([gate[:24], up[:24]]))


def test_vocabulary_padding_may_differ_between_model_and_checkpoint(make_checkpoint, tensors):
    checkpoint = MegatronCheckpoint.open(make_checkpoint())
    model = make_model(padded=128)
    load_into(model, checkpoint)
    rows = model.output_layer.weight
    assert torch.equal(rows[:50], tensors["output_layer.weight"][:50])
    assert not rows[50:].any()


BIAS = "decoder.layers.0.self_attention.linear_qkv.bias"
FC3 = {"decoder.layers.mlp.linear_fc3.weight": torch.zeros(2, 1)}


@pytest.mark.parametrize(
    ("model", "stored", "tp_size", "refusal"),
    [
        ({"extra": [BIAS]}, {}, 1, r"lacks decoder\.layers\.0\.self_attention.*bias"),
        ({}, FC3, 1, r"holds decoder\.layers\.mlp\.linear_fc3\.weight"),
        ({"layers": 1}, {}, 1, "has 2 layers, the model 1"),
        ({"tp": 4}, {}, 4, "does not divide the 2 query groups"),
        ({"padded": 48}, {}, 1, "48 rows, fewer than the vocabulary's 50"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_model_is_refused(
    make_checkpoint, tensors, model, stored, tp_size, refusal
):
    checkpoint = MegatronCheckpoint.open(make_checkpoint(tensors={**tensors, **stored}))
    with pytest.raises(ValueError, match=refusal):
        load_into(make_model(**model), checkpoint, tp_size=tp_size)
