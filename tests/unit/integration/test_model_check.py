"""What Megatron has built is compared with what the run announced."""

import pytest
import tiny_gpt
import torch
from torch import nn

pytest.importorskip("megatron.training")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_longrope.integration import agreement, hooks
from megatron_longrope.integration.model_check import check_models

pytestmark = pytest.mark.usefixtures("megatron")


def run_model():
    return tiny_gpt.build(tiny_gpt.start_run())


def foreign_attention():
    """A spec that names its core attention, as those of heterogeneous layers and ModelOpt do."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return tiny_gpt.build(tiny_gpt.start_run(), model_options={"spec": spec})


def test_a_model_of_the_run_fits_silently(capsys):
    check_models([run_model()], "sdpa", has_factors=True)
    assert capsys.readouterr().out == ""


def test_a_model_whose_classes_fsdp_has_renamed_fits():
    model = run_model()
    # As fully_shard does, which --use-torch-fsdp2 calls on every RotaryEmbedding.
    rotary = model.rotary_pos_emb
    rotary.__class__ = type("FSDPLongRopeRotaryEmbedding", (type(rotary),), {})
    model.__class__ = type("FSDPGPTModel", (type(model),), {})
    check_models([model], "sdpa", has_factors=True)


def test_a_model_that_only_holds_a_language_model_ends_the_run():
    """A VLM copies the language model's config, softmax scale included, for its vision tower."""
    vlm = type("LLaVAModel", (nn.Module,), {})()
    vlm.language_model, vlm.vision_model = run_model(), nn.Identity()
    with pytest.raises(SystemExit, match=r"the model LLaVAModel did not take .*it has none"):
        check_models([vlm], "sdpa", has_factors=True)


def test_every_rank_takes_part_in_the_verdict_whatever_its_own_chunks_are(monkeypatch):
    heard = []
    monkeypatch.setattr(agreement, "decide", heard.append)
    check_models([run_model()], "sdpa", has_factors=True)
    check_models([foreign_attention()], "sdpa", has_factors=True)
    check_models([nn.Identity()], "local", has_factors=False, loss_chunk=64)
    assert heard[0] is None
    assert heard[1].startswith("the model has DotProductAttention")
    assert heard[2].startswith("the model Identity has not taken --longrope-chunked-loss")


def test_a_model_with_stock_rope_ends_a_run_with_factors():
    args = tiny_gpt.run_arguments()
    hooks.remove()
    stock = tiny_gpt.build(args)
    with pytest.raises(SystemExit, match=r"the model GPTModel did not take .*has RotaryEmbedding"):
        check_models([stock], "local", has_factors=True)
    check_models([stock], "local", has_factors=False)


def test_attention_that_a_spec_chose_by_itself_is_said_and_with_factors_refused(capsys):
    model = foreign_attention()
    check_models([model], "sdpa", has_factors=False)
    assert capsys.readouterr().out == (
        "> longrope: the model has DotProductAttention where sdpa attention was announced: its "
        "layer spec chooses core attention by itself\n"
    )
    with pytest.raises(SystemExit, match=r"where flash attention was announced: .*; give --longr"):
        check_models([model], "flash", has_factors=True)
    check_models([model], "local", has_factors=True)


def megatron_fsdp(model):
    """As --use-megatron-fsdp wraps; the constructors of both need CUDA."""
    adapter = pytest.importorskip("megatron.core.distributed.fsdp.mcore_fsdp_adapter")
    for kind in (type("MegatronFSDP", (nn.Module,), {}), adapter.FullyShardedDataParallel):
        wrapper = kind.__new__(kind)
        nn.Module.__init__(wrapper)
        wrapper.module = model
        model = wrapper
    return model


@pytest.mark.parametrize("sharded", [lambda model: model, megatron_fsdp], ids=["plain", "fsdp"])
def test_wrapped_chunks_are_unwrapped(sharded):
    from megatron.core.transformer.module import Float16Module

    model = run_model()
    model.config.bf16, model.config.params_dtype = True, torch.bfloat16
    check_models([sharded(model)], "sdpa", has_factors=True)
    check_models([sharded(Float16Module(model.config, model))], "sdpa", has_factors=True)
