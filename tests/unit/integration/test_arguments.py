"""The `--longrope-*` flags and every combination that is refused, on namespaces built by hand."""

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_gpt import run_arguments

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.integration import attention_choice
from megatron_longrope.integration.arguments import add_longrope_args
from megatron_longrope.integration.attention_choice import attention_from_args, check_norms
from megatron_longrope.integration.settings import (
    check_spec,
    check_unused,
    config_from_args,
    settings_from_args,
)
from megatron_longrope.selection import FactorSelection

pytestmark = pytest.mark.one_release

HEAD_DIM = 8
CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=HEAD_DIM,
    original_max_position_embeddings=64,
    factor_sets=(
        FactorSet(64, (1.0, 1.0, 1.0, 1.1)),
        FactorSet(128, (1.0, 1.2, 1.6, 2.0), origin={"method": "yarn"}),
        FactorSet(131072, (1.0, 2.0, 300.0, 2048.0), num_start_tokens=4),
    ),
)


def su(ratio: float) -> float:
    """The attention factor sqrt(1 + ln s / ln L), written out again."""
    return math.sqrt(1 + math.log(ratio) / math.log(64))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "factors.json"
    CONFIG.save(file)
    return str(file)


def read(args):
    """The run's settings, as wrappers.configure reads them."""
    config = config_from_args(args)
    return None if config is None else settings_from_args(args, config, attention_from_args(args))


def namespace(path, **changes) -> argparse.Namespace:
    args = run_arguments(longrope_config=path, kv_channels=HEAD_DIM, seq_length=128)
    optional = {
        "softmax_scale", "dataloader_inter_document_masking", "sft", "apply_rope_fusion",
        "flash_decode", "fused_single_qkv_rope", "bf16", "spec", "hybrid_layer_pattern",
        "rotary_interleaved", "dynamic_context_parallel", "rl_use_sequence_packing", "window_size",
        "perform_rl_step", "heterogeneous_layers_config_path", "export_kd_teacher_load",
        "attention_dropout", "no_rope_freq", "use_mup", "qk_clip", "log_max_attention_logit",
    }  # fmt: skip
    assert not changes.keys() - vars(args).keys() - optional
    return argparse.Namespace(**{**vars(args), **changes})


# Flags


def test_flags_default_to_stock_rope():
    args = add_longrope_args(argparse.ArgumentParser()).parse_args([])
    assert vars(args) == {
        "longrope_config": None,
        "longrope_mode": None,
        "longrope_attention": "auto",
        "longrope_attention_factor_carrier": "auto",
        "longrope_hf_parity": False,
        "longrope_replace_factors": False,
        "longrope_chunked_loss": None,
    }


def test_a_parser_that_has_the_flags_already_stays_as_it_is():
    parser = add_longrope_args(argparse.ArgumentParser())
    before = len(parser._actions)
    assert add_longrope_args(parser) is parser
    assert len(parser._actions) == before


# Settings


@pytest.mark.parametrize("absent", [None, ""])
def test_without_a_config_nothing_is_read_or_stored(absent):
    args = namespace(absent)
    before = dict(vars(args))
    assert read(args) is None
    assert vars(args) == before


def test_settings_hold_the_config_and_the_factor_of_the_runs_length(path):
    settings = read(namespace(path, longrope_hf_parity=True))
    assert settings.config == CONFIG
    assert settings.selection == FactorSelection(CONFIG, "auto", run_length=128)
    assert (settings.carrier, settings.hf_parity) == ("softmax", True)
    assert settings.attention_factor == pytest.approx(su(2))


@pytest.mark.parametrize(
    ("mode", "seq_length", "ratio"),
    [
        ("auto", 64, 1),
        ("auto", 65, 2),
        ("auto", 128, 2),
        ("auto", 129, 2048),
        ("long", 64, 2048),
        ("short", 128, 1),
        ("short", 262144, 1),
    ],
)
def test_the_attention_factor_follows_the_mode_and_the_length(path, mode, seq_length, ratio):
    args = namespace(path, longrope_mode=mode, seq_length=seq_length)
    assert read(args).attention_factor == pytest.approx(su(ratio))
    assert args.longrope_attention_factor == pytest.approx(su(ratio))


def test_arguments_hold_the_factors_by_value_as_plain_json(path):
    args = namespace(path)
    read(args)
    assert args.longrope_config_value == json.loads(json.dumps(args.longrope_config_value))
    assert LongRopeConfig.from_dict(args.longrope_config_value) == CONFIG

    def plain(value):
        if type(value) is dict:
            return all(type(key) is str and plain(item) for key, item in value.items())
        if type(value) is list:
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    assert plain(args.longrope_config_value)
    assert type(args.longrope_attention_factor) is float


# Exactly one carrier


@pytest.mark.parametrize(
    ("changes", "carrier", "factor", "scales_softmax"),
    [
        ({}, "softmax", su(2), True),
        ({"seq_length": 64}, "softmax", 1.0, False),  # nothing to carry
        ({"longrope_attention_factor_carrier": "rope"}, "rope", su(2), False),
    ],
)
def test_exactly_one_carrier_has_the_attention_factor(
    path, changes, carrier, factor, scales_softmax
):
    args = namespace(path, **changes)
    settings = read(args)
    assert settings.carrier == carrier
    assert settings.attention_factor == pytest.approx(factor)
    assert hasattr(args, "softmax_scale") == scales_softmax
    if scales_softmax:
        expected = su(2) ** 2 / math.sqrt(HEAD_DIM)
        assert args.softmax_scale == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        (
            {"kv_channels": 2 * HEAD_DIM, "rotary_percent": 0.5},
            "rotary_percent 0.5 rotates a part of each head, and the softmax scale would also "
            "multiply the rest",
        ),
        (
            {"no_rope_freq": 2},
            "--no-rope-freq leaves layers unrotated, and the softmax scale would multiply them",
        ),
        ({"use_mup": True}, "--use-mup has a softmax scale of its own"),
        ({"flash_decode": True}, "--flash-decode ignores the softmax scale"),
    ],
)
def test_where_the_softmax_scale_would_be_wrong_cos_and_sin_carry(path, changes, obstacle):
    args = namespace(path, **changes)
    assert read(args).carrier == "rope"
    assert not hasattr(args, "softmax_scale")
    args.longrope_attention_factor_carrier = "softmax"
    with pytest.raises(ValueError) as error:
        read(args)
    assert str(error.value) == f"{obstacle}; use --longrope-attention-factor-carrier rope"


def test_a_mode_that_nobody_chose_is_auto(path):
    settings = read(namespace(path, longrope_mode=None))
    assert (settings.selection.mode, settings.mode_is_chosen) == ("auto", False)
    assert read(namespace(path)).mode_is_chosen


@pytest.mark.parametrize("mode", ["auto", None])
def test_reading_the_settings_twice_gives_the_same(path, mode):
    args = namespace(path, longrope_mode=mode)
    first = read(args)
    stored = dict(vars(args))
    assert read(args) == first
    assert vars(args) == stored


def test_the_rope_carrier_leaves_a_softmax_scale_of_another_origin(path):
    args = namespace(path, softmax_scale=0.5, longrope_attention_factor_carrier="rope")
    read(args)
    assert args.softmax_scale == 0.5


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_embedding_type": "yarn"},
            "--position-embedding-type yarn: LongRoPE rescales RoPE; use --position-embedding-type "
            "rope",
        ),
        (
            {"position_embedding_type": "mrope"},
            "--position-embedding-type mrope: LongRoPE rescales RoPE; use "
            "--position-embedding-type rope",
        ),
        (
            {"multi_latent_attention": True},
            "--multi-latent-attention: its attention builds a rotary embedding of its own",
        ),
        (
            {"use_rope_scaling": True},
            "--use-rope-scaling: base_frequencies in the file of --longrope-config replaces it "
            "(longrope convert from-hf writes them), and both would scale the frequencies twice; "
            "remove the flag",
        ),
        (
            # Megatron demands the other flag with them, so that its refusal would name no way out.
            {"heterogeneous_layers_config_path": "f.json", "use_rope_scaling": True},
            "--heterogeneous-layers-config-path: Megatron lets them rotate with --use-rope-scaling "
            "alone",
        ),
        (
            {"export_kd_teacher_load": "teacher"},
            "--export-kd-teacher-load: the teacher would get this run's factors, whatever its own "
            "are",
        ),
        (
            {"rotary_seq_len_interpolation_factor": 4},
            "--rotary-seq-len-interpolation-factor: it would interpolate the positions twice",
        ),
        (
            {"hybrid_context_parallel": True},
            "--hybrid-context-parallel: its ranks would get another rank's positions",
        ),
        (
            {"dynamic_context_parallel": True},  # its name after 0.19
            "--dynamic-context-parallel: its ranks would get another rank's positions",
        ),
        (
            {"hybrid_layer_pattern": "*-", "rotary_interleaved": True},
            "--rotary-interleaved: Megatron's HybridModel applies it to angles in the order of two "
            "halves",
        ),
    ],
)
def test_flags_that_would_train_another_model_are_refused(path, changes, message):
    args = namespace(path, **changes)
    with pytest.raises(ValueError) as error:
        read(args)
    assert str(error.value) == f"--longrope-config cannot be combined with {message}"
    assert not hasattr(args, "longrope_config_value")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_channels": 16},
            "factors.json: rotary_dim 8 differs from this model's 16 (kv_channels 16 x "
            "rotary_percent 1.0)",
        ),
        (
            {"rotary_base": 500000},
            "factors.json: rotary_base 10000 differs from --rotary-base 500000; give the base that",
        ),
        ({"seq_length": 131073}, "sequence length 131073 exceeds 131072, the max_length"),
        (
            {"seq_length": 131073, "longrope_mode": "long"},
            "sequence length 131073 exceeds 131072, the max_length",
        ),
        ({"longrope_config": "absent.json"}, "absent.json: no such file"),
        (
            {"softmax_scale": 0.5},
            "softmax_scale 0.5 is already set, so the attention factor has no room there; use "
            "--longrope-attention-factor-carrier rope",
        ),
        (
            {"rl_use_sequence_packing": True},
            "the factors have 4 start tokens, and --rl-use-sequence-packing counts positions from "
            "the start of a bin, so that only its first sequence would have any; remove that flag",
        ),
        *(
            (
                {"longrope_attention": choice, "transformer_impl": "transformer_engine"},
                f"--longrope-attention {choice} needs --transformer-impl local, got transformer_e",
            )
            for choice in ("sdpa", "local")
        ),
        (
            {"longrope_attention": "local", "context_parallel_size": 2},
            "--longrope-attention local cannot run context parallel size 2; use sdpa",
        ),
        *(
            (
                {"longrope_attention": choice, "reset_attention_mask": True},
                "--reset-attention-mask is not supported by sdpa",
            )
            for choice in ("auto", "sdpa")
        ),
        *(
            (
                {flag: True},
                f"--{flag.replace('_', '-')} is not supported by sdpa attention, which keeps no "
                "largest logits; remove the flag, or use --transformer-impl transformer_engine",
            )
            for flag in ("qk_clip", "log_max_attention_logit")
        ),
    ],
)
def test_what_does_not_fit_the_factors_the_carrier_or_the_attention_is_refused(
    path, changes, message
):
    with pytest.raises(ValueError) as error:
        read(namespace(path, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("mode", ["short", "mixed"])
def test_modes_that_mean_the_original_windows_factors_refuse_a_file_without(path, mode):
    replace(CONFIG, factor_sets=CONFIG.factor_sets[1:]).save(path)
    packed = {"dataloader_inter_document_masking": True}
    with pytest.raises(ValueError) as error:
        read(namespace(path, longrope_mode=mode, **packed))
    assert str(error.value) == (
        "the smallest factor set that covers the original window of 64 tokens reaches to 128, so "
        f"that --longrope-mode {mode} would take long factors; use factors with a set of their own "
        "for 64 tokens"
    )
    read(namespace(path, **packed))


def test_a_dense_attention_mask_is_refused_from_64k_on(path):
    args = namespace(path, seq_length=65536, create_attention_mask_in_dataloader=True)
    with pytest.raises(ValueError) as error:
        read(args)
    assert str(error.value) == (
        "sequence length 65536 with a dense attention mask from the data loader would build a "
        "65536 x 65536 mask per sample; add --no-create-attention-mask-in-dataloader (attention is "
        "causal without it)"
    )
    read(namespace(path, seq_length=65535, create_attention_mask_in_dataloader=True))
    read(namespace(path, seq_length=65536))
    # Without training there is no data loader: tools that convert, servers.
    args.train_iters = None
    read(args)


def test_arguments_of_a_checkpoint_whose_file_is_gone_have_its_factors(path, tmp_path):
    """Megatron's converter copies a checkpoint's arguments as a whole."""
    args = namespace(path)
    read(args)
    args.longrope_config, args.softmax_scale = str(tmp_path / "gone.json"), None
    assert read(args).config == CONFIG


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"longrope_mode": "mixed"}, "--longrope-mode"),
        ({"longrope_mode": "long"}, "--longrope-mode"),
        ({"longrope_hf_parity": True}, "--longrope-hf-parity"),
        ({"longrope_attention_factor_carrier": "rope"}, "--longrope-attention-factor-carrier"),
        ({"longrope_replace_factors": True}, "--longrope-replace-factors"),
    ],
)
def test_flags_that_need_factors_are_refused_without(changes, flag):
    args = run_arguments(longrope_config=None)
    check_unused(args)
    with pytest.raises(ValueError) as error:
        check_unused(argparse.Namespace(**{**vars(args), **changes}))
    assert str(error.value) == (
        f"{flag} needs factors; give them with --longrope-config, or remove it"
    )


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"sequence_parallel": True}, "remove --sequence-parallel"),
        ({"no_persist_layer_norm": False}, "add --no-persist-layer-norm"),
        (
            {"sequence_parallel": True, "no_persist_layer_norm": False},
            "remove --sequence-parallel and add --no-persist-layer-norm",
        ),
    ],
)
def test_what_megatrons_local_rms_norm_only_asserts_is_refused(changes, remedy):
    fits = {"normalization": "RMSNorm", "sequence_parallel": False, "no_persist_layer_norm": True}
    check_norms(run_arguments(**fits))
    args = run_arguments(**{**fits, **changes})
    with pytest.raises(ValueError) as error:
        check_norms(args)
    assert str(error.value) == (
        "RMSNorm of --transformer-impl local is torch's, without sequence parallelism or a "
        f"persistent kernel; {remedy}, or use --transformer-impl transformer_engine"
    )
    for name, value in (("normalization", "LayerNorm"), ("transformer_impl", "transformer_engine")):
        check_norms(argparse.Namespace(**{**vars(args), name: value}))


def test_our_hybrid_spec_refuses_layers_that_it_does_not_have():
    spec = ["megatron_longrope.integration.hybrid_spec", "hybrid_stack_spec"]
    check_spec(namespace(None, spec=spec, hybrid_layer_pattern="*-|*-"))
    check_spec(namespace(None, spec=["their.spec", "name"], hybrid_layer_pattern="M*"))
    with pytest.raises(ValueError, match="the hybrid layer pattern has 'M';"):
        check_spec(namespace(None, spec=spec, hybrid_layer_pattern="M*-"))


# Attention


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "sdpa"),  # transformer_impl is local
        ({"transformer_impl": "transformer_engine"}, "te"),
        ({"transformer_impl": "transformer_engine", "qk_clip": True}, "te"),
        ({"longrope_attention": "sdpa"}, "sdpa"),
        ({"longrope_attention": "local"}, "local"),
        ({"longrope_attention": "local", "reset_attention_mask": True}, "local"),
    ],
)
def test_attention_is_the_one_asked_for_or_else_fits_the_implementation(changes, taken):
    assert attention_from_args(namespace(None, **changes)) == taken


def test_auto_attention_is_flash_for_half_precision_where_it_can_run(monkeypatch):
    monkeypatch.setattr(attention_choice, "flash_obstacle", lambda dropout: dropout or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_from_args(namespace(None, bf16=True)) == "flash"
    assert attention_from_args(namespace(None)) == "sdpa"
    # Sliding windows are sdpa's, and so is dropout where flash-attention has none.
    for other in ({"window_size": (4095, 0)}, {"attention_dropout": 0.1}):
        assert attention_from_args(namespace(None, bf16=True, **other)) == "sdpa"


def test_flash_attention_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    reason = "flash-attn 2 cannot be used (No module named 'flash_attn')"
    monkeypatch.setattr(attention_choice, "flash_obstacle", lambda dropout: reason)
    with pytest.raises(ValueError, match=r"but flash-attn 2 cannot be used .*; install one \(pip"):
        attention_from_args(namespace(None, longrope_attention="flash"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_from_args(namespace(None, bf16=True)) == "sdpa"


def test_te_attention_without_transformer_engine_is_refused(monkeypatch):
    monkeypatch.setattr(attention_choice, "transformer_engine_version", lambda: None)
    args = namespace(None, longrope_attention="te", transformer_impl="transformer_engine")
    with pytest.raises(ValueError) as error:
        attention_from_args(args)
    assert str(error.value) == (
        "--longrope-attention te needs Transformer Engine, which is not installed; use "
        "--transformer-impl local with --longrope-attention sdpa"
    )
    monkeypatch.setattr(attention_choice, "transformer_engine_version", lambda: "2.9")
    assert attention_from_args(args) == "te"
    with pytest.raises(ValueError) as error:  # Megatron would run its local attention
        attention_from_args(namespace(None, longrope_attention="te"))
    assert str(error.value) == (
        "--longrope-attention te needs --transformer-impl transformer_engine, got local"
    )


# Kernels that would drop the attention factor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sft": True, "apply_rope_fusion": True},
            "attention factor 1.08012 on cos and sin is ignored by the fused RoPE kernel for "
            "packed sequences; add --no-rope-fusion",
        ),
        (
            {"perform_rl_step": True, "apply_rope_fusion": True},
            "attention factor 1.08012 on cos and sin is ignored by the fused RoPE kernel for "
            "packed sequences; add --no-rope-fusion",
        ),
        (
            {"fused_single_qkv_rope": True},
            "attention factor 1.08012 on cos and sin is ignored by --fused-single-qkv-rope; remove "
            "that flag",
        ),
    ],
)
def test_kernels_that_ignore_the_rope_carrier_are_refused(path, changes, message):
    replace(CONFIG, factor_sets=CONFIG.factor_sets[:2]).save(path)
    with pytest.raises(ValueError) as error:
        read(namespace(path, longrope_attention_factor_carrier="rope", **changes))
    assert str(error.value) == message
    read(namespace(path, **changes))  # the softmax scale is safe there


def test_fused_rope_that_cannot_index_the_tokens_of_a_rank_is_refused(path):
    def seven_b(seq_length, **changes):
        args = namespace(path, seq_length=seq_length, apply_rope_fusion=True, **changes)
        args.kv_channels, args.rotary_percent = 128, HEAD_DIM / 128
        args.num_attention_heads, args.tensor_model_parallel_size = 32, 1
        args.group_query_attention, args.micro_batch_size = False, 1
        args.eval_micro_batch_size = None
        return args

    long = CONFIG.with_factor_set(FactorSet(262144, (1.0, 2.0, 300.0, 4096.0)))
    for length, sizes in ((174762, {}), (174764, {"context_parallel_size": 2})):
        settings_from_args(seven_b(length, **sizes), long, "te")
    with pytest.raises(ValueError, match=r"174763 tokens a rank x 12288 values .* --no-rope-fus"):
        settings_from_args(seven_b(174763), long, "te")
    args = seven_b(131072)
    args.eval_micro_batch_size = 2
    with pytest.raises(ValueError, match="262144 tokens a rank"):
        settings_from_args(args, long, "te")
    # With fewer groups than ranks Megatron gathers the row of all ranks.
    args = seven_b(262144)
    args.group_query_attention, args.num_query_groups = True, 2
    args.tensor_model_parallel_size, args.micro_batch_size = 4, 2
    with pytest.raises(ValueError, match="524288 tokens a rank x 4608 values"):
        settings_from_args(args, long, "te")


# Mixed windows


def mixed(path, **changes):
    packed = {"longrope_mode": "mixed", "dataloader_inter_document_masking": True}
    return namespace(path, **{**packed, **changes})


def test_mixed_mode_scales_the_softmax_of_documents_within_the_original_window(path):
    args = mixed(path)
    settings = read(args)
    assert args.softmax_scale == pytest.approx(su(2) ** 2 / math.sqrt(HEAD_DIM))
    assert settings.document_scale(64) * su(2) ** 2 == pytest.approx(1.0)
    assert settings.document_scale(65) == settings.document_scale(128) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_inter_document_masking": False}, "chooses factors by packed document, and"),
        ({"sft": True}, "cannot follow --sft, whose data set counts the padding of a pack to its"),
        ({"apply_rope_fusion": True}, "needs a table row per token, and the fused RoPE kernel"),
        ({"perform_rl_step": True}, "cannot follow --perform-rl-step, which counts the padding"),
        ({"longrope_attention": "local"}, "needs another softmax scale for short documents, which"),
        ({"longrope_attention_factor_carrier": "rope"}, "carries the attention factor of a docume"),
    ],
)
def test_mixed_mode_refuses_runs_in_which_documents_cannot_differ(path, changes, message):
    replace(CONFIG, factor_sets=CONFIG.factor_sets[:2]).save(path)
    with pytest.raises(ValueError, match=f"^--longrope-mode mixed {message}"):
        read(mixed(path, **changes))


def test_mixed_mode_with_one_attention_factor_takes_any_attention(tmp_path):
    file = tmp_path / "one.json"
    replace(CONFIG, attention_factor=1.0).save(file)
    settings = read(mixed(str(file), longrope_attention="local"))
    assert not settings.follows_documents


def test_factors_that_a_checkpoint_restored_need_no_file(path):
    args = namespace(path)
    read(args)
    restored = namespace(None)
    restored.longrope_config_value = args.longrope_config_value
    assert read(restored).config == CONFIG
