"""`--longrope-chunked-loss` in Megatron's own models, and everything that it is refused with."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_gpt
import torch
from tiny_gpt import RUN, fill, random_tokens

pytest.importorskip("megatron.training")

from megatron_longrope.integration import chunked_loss, hooks, wrappers
from megatron_longrope.integration.arguments import add_longrope_args
from megatron_longrope.integration.chunked_loss import chunk_tokens_from_args
from megatron_longrope.integration.model_check import check_models
from megatron_longrope.training_loss import DEFAULT_CHUNK

CHUNK = 24  # tokens of 2 x 64


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, megatron):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def gpt(loss_chunk, *, tied=False):
    args = tiny_gpt.start_run()
    wrappers.activate(wrappers.Run(tiny_gpt.settings_of_run(), "sdpa", loss_chunk))
    options = {"share_embeddings_and_output_weights": tied}
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return GPTModel(
        tiny_gpt.transformer_config(args),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=tiny_gpt.VOCAB,
        max_sequence_length=RUN,
        position_embedding_type="rope",
        **options,
    )


def hybrid(loss_chunk, *, tied=False):
    import make_hybrid_checkpoint as maker

    hooks.apply()
    wrappers.activate(wrappers.Run(None, "sdpa", loss_chunk))
    return maker.build("*-", 2, not tied)


def step(model):
    """Losses and gradients of a batch whose mask leaves out every third token."""
    tokens, labels = random_tokens(2, RUN)
    length = torch.ones(RUN, RUN, dtype=torch.bool).triu(1)[None, None]
    losses = model(tokens, torch.arange(RUN)[None], length, labels=labels)
    mask = torch.ones(2, RUN)
    mask[:, ::3] = 0
    (losses * mask).sum().div(mask.sum()).backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("build", [gpt, hybrid])
def test_a_model_has_megatrons_losses_and_gradients(build, tied):
    theirs, ours = build(None, tied=tied), build(CHUNK, tied=tied)
    assert not chunked_loss.is_deferred(theirs)
    assert chunked_loss.is_deferred(ours)
    fill(theirs)
    fill(ours)
    (losses, gradients), (expected, their_gradients) = step(ours), step(theirs)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-6, msg=name)


def test_without_labels_the_logits_are_megatrons():
    theirs, ours = gpt(None), gpt(CHUNK)
    fill(theirs)
    fill(ours)
    tokens, _ = random_tokens(2, RUN)
    for options in ({}, {"runtime_gather_output": True}):
        found, expected = (
            model(tokens, torch.arange(RUN)[None], None, **options) for model in (ours, theirs)
        )
        assert torch.equal(found, expected)


def test_the_state_of_a_model_does_not_change():
    assert gpt(CHUNK).state_dict().keys() == gpt(None).state_dict().keys()


def test_gradient_accumulation_fusion_fills_the_main_gradient():
    plain, fused = gpt(CHUNK), gpt(CHUNK)
    fill(plain)
    fill(fused)
    weight = fused.output_layer.weight
    fused.output_layer.gradient_accumulation_fusion = True
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    _, expected = step(plain)
    step(fused)
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, expected["output_layer.weight"])


def test_only_the_last_pipeline_stage_is_changed():
    hooks.apply()
    wrappers.activate(wrappers.Run(None, "sdpa", CHUNK))
    model = tiny_gpt.build(tiny_gpt.run_arguments(), model_options={"post_process": False})
    assert not chunked_loss.is_deferred(model)
    check_models([model], "local", has_factors=False, loss_chunk=CHUNK)


# The flag


def test_the_flag_is_off_and_has_a_default_number_of_tokens():
    parser = add_longrope_args(argparse.ArgumentParser())

    def tokens(*words):
        return chunk_tokens_from_args(parser.parse_args(words))

    assert tokens() is None
    assert tokens("--longrope-chunked-loss") == DEFAULT_CHUNK
    assert tokens("--longrope-chunked-loss", "4096") == 4096


def test_the_log_names_the_chunks():
    line = wrappers.Run(None, "sdpa", 512).describe()
    assert line.endswith("stock RoPE; attention sdpa; loss in chunks of 512 tokens")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"longrope_chunked_loss": 0}, "--longrope-chunked-loss 0 is below 1"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers: multi-token prediction"),
        ({"use_mup": True}, "--longrope-chunked-loss cannot be combined with --use-mup"),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"cross_entropy_loss_fusion": True}, "--cross-entropy-loss-fusion"),
        ({"config_logger_dir": "logs"}, "--config-logger-dir"),
        ({"fp8_output_proj": True}, "--fp8-output-proj"),
        ({"logit_dtype": torch.float32}, "--output-logit-dtype"),
        ({"logits_load_dir": "teacher"}, "--logits-load-dir"),
        ({"logits_save_dir": "logits"}, "--logits-save-dir"),
        ({"export_kd_teacher_load": "teacher"}, "--export-kd-teacher-load"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
    ],
)
def test_what_needs_whole_logits_is_refused(changes, words):
    args = argparse.Namespace(**{"longrope_chunked_loss": CHUNK, **changes})
    with pytest.raises(ValueError, match=words) as error:
        chunk_tokens_from_args(args)
    assert "\n" not in str(error.value)
    args.longrope_chunked_loss = None
    assert chunk_tokens_from_args(args) is None


def test_the_docs_name_every_flag_that_is_refused():
    page = (Path(__file__).parents[3] / "docs" / "training_loss.md").read_text()
    refused = page[page.index("## What is refused") :]
    for name in chunked_loss._REFUSED:
        assert chunked_loss._FLAG_OF.get(name, f"--{name.replace('_', '-')}") in refused


@pytest.mark.parametrize(
    "changes",
    [{"gather_output": True}, {"bias": torch.zeros(1)}, {"output_dtype": torch.float32}],
)
def test_an_output_layer_that_does_more_is_refused(changes):
    model = gpt(None)
    for name, value in changes.items():
        if hasattr(model.output_layer, name):
            delattr(model.output_layer, name)
        setattr(model.output_layer, name, value)
    with pytest.raises(ValueError, match="GPTModel has ColumnParallelLinear with"):
        chunked_loss.defer(model, CHUNK)


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ValueError, match="SimpleNamespace has none"):
        chunked_loss.defer(SimpleNamespace(), CHUNK)


def test_a_model_that_has_kept_its_loss_ends_the_run():
    with pytest.raises(SystemExit, match="the model GPTModel has not taken --longrope-chunked"):
        check_models([gpt(None)], "local", has_factors=False, loss_chunk=CHUNK)
    check_models([gpt(CHUNK)], "local", has_factors=False, loss_chunk=CHUNK)


def test_a_loss_of_gathered_logits_is_refused():
    tokens, labels = random_tokens(2, RUN)
    positions = torch.arange(RUN)[None]
    with pytest.raises(ValueError, match="has gathered its logits"):
        gpt(CHUNK)(tokens, positions, None, labels=labels, runtime_gather_output=True)
