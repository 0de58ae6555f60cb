"""Hooks go in by name, twice is once, and every original comes back."""

import argparse
import importlib
import logging
from dataclasses import replace
from types import SimpleNamespace

import launching
import pytest
from tiny_gpt import run_arguments

pytest.importorskip("megatron.training")

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import compat, hooks, wrappers
from megatron_longrope.integration.settings import LongRopeSettings
from megatron_longrope.integration.wrappers import Run
from megatron_longrope.rotary import LongRopeRotaryEmbedding
from megatron_longrope.selection import FactorSelection

CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=8,
    original_max_position_embeddings=64,
    factor_sets=(FactorSet(64, (1.0,) * 4), FactorSet(128, (1.0, 1.2, 1.6, 2.0))),
)
OTHER = CONFIG.with_factor_set(FactorSet(128, (1.0, 1.5, 1.8, 2.0)))
FACTOR = CONFIG.attention_factor_for(128)
SOFTMAX = LongRopeSettings(FactorSelection(CONFIG, "long", 128), "softmax", FACTOR, True)
ROPE = LongRopeSettings(FactorSelection(CONFIG, "auto", 128), "rope", FACTOR)
GPT_ROTARY = "megatron.core.models.gpt.gpt_model.RotaryEmbedding"
LOCAL_ATTENTION = "megatron.core.models.backends.LocalSpecProvider.core_attention"
CONCENTRATION = "megatron.core.transformer.attention._yarn_get_concentration_factor_from_config"


@pytest.fixture(autouse=True)
def restored():
    """Megatron's symbols are global: every test must leave them as they were."""
    yield
    hooks.remove()


def every_symbol() -> list[compat.Symbol]:
    pairs = [*hooks.argument_wrappers(), *hooks.model_wrappers()]
    return [*(symbol for symbol, _ in pairs), compat.COMPILE_HELPERS]


def configured(settings: LongRopeSettings | None, attention: str = "sdpa") -> None:
    """What a run does after its arguments are read: models follow it from now on."""
    hooks.apply()
    wrappers.activate(Run(settings, attention))


def stored(symbol: compat.Symbol) -> object:
    """The object as its holder stores it, without binding."""
    holder, attribute = symbol.owner()
    return vars(holder)[attribute]


def gpt_rotary():
    return importlib.import_module("megatron.core.models.gpt.gpt_model").RotaryEmbedding


# In and out


def test_apply_hooks_the_parser_and_the_models_and_logs_each_by_its_dotted_name(caplog):
    with caplog.at_level(logging.INFO, logger=hooks.logger.name):
        hooks.apply()
    names = hooks.replaced_symbols()
    assert names[:2] == [
        "megatron.training.arguments.add_megatron_arguments",
        "megatron.training.arguments.validate_args",
    ]
    assert {GPT_ROTARY, LOCAL_ATTENTION, CONCENTRATION} <= set(names)
    assert {f"replaced {name}" for name in names} <= set(caplog.messages)


def test_remove_restores_the_exact_original_objects():
    before = {str(symbol): stored(symbol) for symbol in every_symbol()}
    hooks.remove()  # without apply it does nothing
    configured(ROPE)
    changed = {str(item) for item in every_symbol() if stored(item) is not before[str(item)]}
    assert changed == set(hooks.replaced_symbols()) == set(before)
    for _ in range(2):
        hooks.remove()
        assert all(stored(symbol) is before[str(symbol)] for symbol in every_symbol())
        assert hooks.replaced_symbols() == []


def test_applying_twice_is_applying_once():
    hooks.apply()
    once = {str(symbol): stored(symbol) for symbol in every_symbol()}
    names = hooks.replaced_symbols()
    hooks.apply()
    assert hooks.replaced_symbols() == names
    assert all(stored(symbol) is once[str(symbol)] for symbol in every_symbol())


# What models are built with


def rotary(**options):
    return gpt_rotary()(kv_channels=8, rotary_percent=1.0, rotary_base=10000, **options)


def core_attention():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec().submodules.self_attention.submodules.core_attention


def concentration(config=None):
    holder, attribute = compat.CONCENTRATION.owner()
    return getattr(holder, attribute)(config)


def test_models_get_a_rotary_module_with_the_runs_settings():
    configured(SOFTMAX)
    ours = rotary()
    assert (ours.config, ours.mode, ours.hf_parity) == (CONFIG, "long", True)
    assert (ours.carried_attention_factor, ours.factor_in_cos_sin) == (FACTOR, False)
    assert ours._document_scale is None


@pytest.mark.parametrize("run", [None, Run(None, "te")])
def test_without_a_run_or_without_factors_everything_is_stock(run):
    stock_rotary, stock_attention = gpt_rotary(), core_attention()
    hooks.apply()
    wrappers.activate(run)
    assert type(rotary(use_cpu_initialization=True)) is stock_rotary
    assert core_attention() is stock_attention
    assert concentration(SimpleNamespace()) == 1.0


def test_the_latest_run_counts():
    configured(ROPE)
    wrappers.activate(Run(LongRopeSettings(FactorSelection(OTHER, "auto", 128)), "te"))
    assert rotary().config is OTHER
    assert concentration(SimpleNamespace()) == 1.0


@pytest.mark.parametrize(("settings", "factor"), [(SOFTMAX, 1.0), (ROPE, FACTOR)])
def test_only_the_rope_carrier_multiplies_cos_and_sin(settings, factor):
    configured(settings)
    assert concentration(SimpleNamespace()) == factor
    assert rotary().factor_in_cos_sin is (factor != 1.0)


def test_local_layer_specs_get_sdpa_attention():
    from megatron_longrope.attention import SdpaCoreAttention

    stock = core_attention()
    configured(None)
    assert core_attention() is SdpaCoreAttention
    hooks.remove()
    assert core_attention() is stock is not SdpaCoreAttention


def test_mixed_windows_get_attention_that_scales_by_document():
    settings = LongRopeSettings(FactorSelection(CONFIG, "mixed", 128), "softmax", FACTOR)
    configured(settings)
    scale = core_attention().document_scale
    assert rotary()._document_scale is scale
    assert (scale(64), scale(128)) == (settings.document_scale(64), 1.0)
    assert scale(64) * FACTOR**2 == pytest.approx(1.0)


# Through Megatron's parser


def validated(monkeypatch, tmp_path, **changes) -> argparse.Namespace:
    """Run the hooked validate_args on a namespace built by hand, with little of Megatron's part."""
    holder, attribute = compat.validate_symbols()[0].owner()

    def megatrons(args, defaults=None):
        assert args.seq_length % (2 * args.context_parallel_size) == 0
        return args

    monkeypatch.setattr(holder, attribute, megatrons)
    path = tmp_path / "factors.json"
    CONFIG.save(path)
    args = run_arguments(**{"longrope_config": str(path), "seq_length": 128} | changes)
    hooks.apply()
    try:
        getattr(holder, attribute)(args)
        args.active = hooks.replaced_symbols()
        args.built = type(rotary(use_cpu_initialization=True))
        return args
    finally:
        hooks.remove()


def test_the_plugins_flags_join_megatrons_parser():
    hooks.apply()
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(["--longrope-mode", "short"])
    assert args.longrope_mode == "short"
    assert args.num_layers is None


def test_validation_activates_the_hooks_and_says_so(monkeypatch, tmp_path, capsys):
    args = validated(monkeypatch, tmp_path)
    assert {GPT_ROTARY, LOCAL_ATTENTION} <= set(args.active)
    assert args.built is LongRopeRotaryEmbedding
    assert args.longrope_config_value == CONFIG.to_dict()
    assert capsys.readouterr().out == (
        "> longrope: factor sets up to 64, 128 tokens, mode auto, attention factor 1.08012 by "
        "softmax; attention sdpa\n"
    )


def test_validation_without_a_config_says_that_rope_is_stock(monkeypatch, tmp_path, capsys):
    args = validated(monkeypatch, tmp_path, longrope_config=None)
    assert args.built is not LongRopeRotaryEmbedding
    assert capsys.readouterr().out == (
        "> longrope: no --longrope-config, stock RoPE; attention sdpa\n"
    )


def test_ranks_beyond_the_first_are_silent(monkeypatch, tmp_path, capsys):
    validated(monkeypatch, tmp_path, rank=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_rope_scaling": True}, "--longrope-config cannot be combined with --use-rope-scal"),
        ({"longrope_attention": "local", "context_parallel_size": 2}, "--longrope-attention local"),
        ({"longrope_chunked_loss": 0}, "--longrope-chunked-loss 0 is below 1"),
        (
            {"seq_length": 126, "context_parallel_size": 2},
            "sequence length 126 is not divisible by 2 x context parallel size 2 = 4; use 128 or",
        ),
        (
            {"longrope_config": None, "longrope_hf_parity": True},
            "--longrope-hf-parity needs factors; give them",
        ),
        (
            {"longrope_config": None, "normalization": "RMSNorm", "sequence_parallel": True},
            "RMSNorm of --transformer-impl",
        ),
    ],
)
def test_a_refusal_ends_the_run_with_one_sentence(monkeypatch, tmp_path, changes, sentence):
    with pytest.raises(SystemExit) as error:
        validated(monkeypatch, tmp_path, **changes)
    assert str(error.value).startswith(f"longrope: error: {sentence}")
    assert "\n" not in str(error.value)


def test_a_script_that_forgot_the_plugins_flags_is_told_how_to_add_them():
    args = run_arguments()
    del args.longrope_config
    with pytest.raises(SystemExit) as error:
        hooks.enable(args)
    assert error.value.code == (
        "longrope: error: the arguments lack --longrope-config; parse them with "
        "extra_args_provider=add_longrope_args"
    )


# Other releases


@pytest.mark.parametrize(
    "symbol",
    [
        compat.Symbol("megatron.training.arguments", "absent_function"),
        compat.Symbol("megatron.absent_module", "anything"),
        compat.Symbol("megatron.core.models.backends", "LocalSpecProvider.absent_method"),
    ],
)
def test_a_missing_symbol_fails_with_its_dotted_name_and_leaves_nothing_replaced(
    monkeypatch, symbol
):
    before = {str(item): stored(item) for item in every_symbol()}
    monkeypatch.setattr(compat, "batch_split_symbols", lambda: [symbol])
    with pytest.raises(LongRopeError) as error:
        hooks.apply()
    assert str(error.value).startswith(f"{symbol} is missing from megatron-core ")
    assert hooks.replaced_symbols() == []
    monkeypatch.undo()
    assert all(stored(item) is before[str(item)] for item in every_symbol())


@pytest.mark.parametrize(("version", "warns"), [("0.19.2", False), ("0.20.0", True)])
def test_an_untested_release_warns_and_is_tried(monkeypatch, recwarn, version, warns):
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    hooks.apply()
    assert hooks.replaced_symbols()
    messages = [str(item.message) for item in recwarn if "tested releases" in str(item.message)]
    assert len(messages) == warns
    assert all(f"megatron-core {version} is outside" in message for message in messages)


def test_a_symbol_whose_parameters_changed_warns_and_is_tried(monkeypatch):
    changed = replace(compat.LOCAL_ATTENTION, parameters=("self", "backend"))
    monkeypatch.setattr(compat, "LOCAL_ATTENTION", changed)
    with pytest.warns(UserWarning, match=r"core_attention has no parameter 'backend' any more"):
        hooks.apply()
    assert LOCAL_ATTENTION in hooks.replaced_symbols()


@pytest.mark.slow
def test_importing_the_plugin_changes_nothing_in_megatron(tmp_path):
    # A process: this one has imported the plugin.
    (tmp_path / "importing.py").write_text(
        "from megatron.core.models.gpt import gpt_model\n"
        "stock = gpt_model.RotaryEmbedding\n"
        "import megatron_longrope.integration.hooks as hooks\n"
        "import megatron_longrope.rotary, megatron_longrope.attention\n"
        "assert gpt_model.RotaryEmbedding is stock\n"
        "assert stock.__module__.startswith('megatron.core')\n"
        "assert hooks.replaced_symbols() == []\n"
    )
    done = launching.python(tmp_path / "importing.py")
    assert done.returncode == 0, done.stderr
