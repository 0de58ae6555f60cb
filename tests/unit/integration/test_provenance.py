"""Which checkpoints a run may load, what it says when it may not, and what it remembers."""

import argparse
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")

from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.integration import provenance, wrappers
from megatron_longrope.integration.settings import LongRopeSettings
from megatron_longrope.integration.wrappers import Run
from megatron_longrope.selection import FactorSelection

pytestmark = pytest.mark.one_release

SHORT = FactorSet(64, (1.0, 1.0, 1.0, 1.1))
LONG = FactorSet(128, (1.0, 1.2, 1.6, 2.0), origin={"method": "yarn"})
LONGER = FactorSet(256, (1.0, 1.4, 2.5, 4.0), num_start_tokens=4)
CONFIG = LongRopeConfig(
    rotary_base=10000.0,
    rotary_dim=8,
    original_max_position_embeddings=64,
    factor_sets=(SHORT, LONG),
)
OTHER = CONFIG.with_factor_set(FactorSet(128, (1.0, 1.2, 1.7, 2.0)))
REMEDY = "or add --longrope-replace-factors to go on with this run's"


def settings(
    config=CONFIG, seq_length=128, mode="auto", hf_parity=False, mode_is_chosen=False
) -> LongRopeSettings:
    return LongRopeSettings(
        FactorSelection(config, mode, seq_length),
        hf_parity=hf_parity,
        mode_is_chosen=mode_is_chosen,
    )


def arguments(seq_length=128, **more) -> argparse.Namespace:
    values = {"seq_length": seq_length, "rank": 0, "longrope_replace_factors": False}
    return argparse.Namespace(**{**values, **more})


def stock(seq_length=64, **more) -> argparse.Namespace:
    """What Megatron alone stores."""
    values = {"position_embedding_type": "rope", "rotary_base": 10000}
    return argparse.Namespace(seq_length=seq_length, **{**values, **more})


def saved(config=CONFIG, seq_length=128, mode="auto", hf_parity=False, **more):
    """What a run with the plugin stores."""
    factor = FactorSelection(config, mode, seq_length).attention_factor(seq_length)
    plugin = {
        "longrope_config_value": config.to_dict(), "longrope_mode": mode,
        "longrope_hf_parity": hf_parity, "longrope_attention_factor": factor,
    }  # fmt: skip
    return stock(seq_length, **{**plugin, **more})


def check(run, checkpoint, iteration=7, **more):
    args = arguments(run.selection.run_length, **more) if run else arguments(**more)
    return provenance.check(args, checkpoint, run, iteration)


def refusal(run, checkpoint) -> str:
    with pytest.raises(ValueError) as error:
        check(run, checkpoint)
    text = str(error.value)
    assert "\n" not in text
    if run is not None:  # the flag is the deliberate way on, whatever the reason
        assert text.endswith(REMEDY)
        verdict = check(run, checkpoint, longrope_replace_factors=True)
        assert verdict.remark.startswith("factors replaced (--longrope-replace-factors): ")
        assert verdict.lineage[-1]["seq_length"] == run.selection.run_length
        assert len(verdict.lineage) == 2
    return text


# Weights that fit


def test_the_same_factors_say_nothing_and_keep_the_lineage():
    lineage = [{"rope": "stock", "iteration": 0, "seq_length": 64}, {"rope": "longrope"}]
    verdict = check(settings(), saved(longrope_lineage=lineage))
    assert (verdict.lineage, verdict.remark) == (lineage, None)


def test_what_neither_side_trains_is_no_difference():
    longer, alone = CONFIG.with_factor_set(LONGER), replace(CONFIG, factor_sets=(LONG,))
    for config in (CONFIG.with_factor_set(replace(LONG, origin={})), longer, alone):
        assert check(settings(config), saved()).remark is None
        assert check(settings(), saved(config)).remark is None
    ones = identity_config(10000.0, 8, 128)  # start tokens of which rotate like all others
    started = ones.with_factor_set(replace(ones.factor_sets[0], num_start_tokens=4))
    assert check(settings(ones), saved(started)).remark is None
    shorter = check(settings(seq_length=100), saved())  # under the same set
    assert shorter.remark is None and len(shorter.lineage) == 1
    assert check(settings(seq_length=64, mode="long"), saved()).remark is None
    computed = saved().longrope_attention_factor * (1 + 1e-15)
    assert check(settings(), saved(longrope_attention_factor=computed)).remark is None
    given = settings(replace(CONFIG, attention_factor=1.19))  # what another release computed
    assert check(given, saved(longrope_attention_factor=1.19)).remark is None


def test_a_stock_checkpoint_begins_the_first_stage():
    verdict = check(settings(), stock())
    assert verdict.remark == (
        "first LongRoPE stage: 128 tokens with the set up to 128, attention factor 1.08012, on a "
        "model with stock RoPE"
    )
    first, second = verdict.lineage
    assert first == {"rope": "stock", "iteration": 0, "seq_length": 64}
    digest = second.pop("sha256")
    assert len(digest) == 64 and int(digest, 16)
    assert second == {
        "rope": "longrope", "iteration": 7, "seq_length": 128, "max_length": 128,
        "attention_factor": pytest.approx(math.sqrt(1 + math.log(2) / math.log(64))),
    }  # fmt: skip


@pytest.mark.parametrize("length", [64, 128])
def test_a_checkpoint_of_ones_counts_as_stock(length):
    ones = identity_config(10000.0, 8, length)
    checkpoint = saved(ones, length)
    verdict = check(settings(), checkpoint)
    assert verdict.remark.startswith("first LongRoPE stage: ")
    assert [stage["rope"] for stage in verdict.lineage] == ["stock", "longrope"]
    assert check(None, checkpoint).remark is None
    assert check(settings(ones, length), stock()).remark is None


def test_a_stock_run_loads_a_stock_checkpoint_without_a_word():
    assert check(None, stock()) == provenance.Verdict([])


def test_the_same_factors_at_another_length_are_a_stage_that_is_logged():
    config = CONFIG.with_factor_set(LONGER)
    verdict = check(settings(config, 256), saved(config, 128))
    assert verdict.remark == (
        "same factors at another length: 256 tokens with the set up to 256, attention factor "
        "1.1547, after 128 tokens with the set up to 128, attention factor 1.08012"
    )
    assert [stage["max_length"] for stage in verdict.lineage] == [128, 256]
    assert check(settings(config, 64), saved(config, 128)).lineage[-1]["max_length"] == 64


# Weights that do not


def test_other_factors_are_refused_and_both_sides_are_named():
    assert refusal(settings(OTHER), saved()) == (
        "the checkpoint was trained with other LongRoPE factors than this run's: rescale factor 2 "
        "is 1.6 against 1.7 (checkpoint: 128 tokens with the set up to 128, attention factor "
        "1.08012; this run: 128 tokens with the set up to 128, attention factor 1.08012); give the "
        "checkpoint's factors (--use-checkpoint-args without --longrope-config restores them), "
        "or add --longrope-replace-factors to go on with this run's"
    )


def test_the_next_stage_is_refused_without_the_flag():
    both = CONFIG.with_factor_set(LONGER)
    for config in (both, replace(both, factor_sets=(SHORT, LONGER))):
        text = refusal(settings(config, 256), saved())
        assert (
            "rescale factor 1 is 1.2 against 1.4 (checkpoint: 128 tokens with the set up to 128, "
            "attention factor 1.08012; this run: 256 tokens with the set up to 256, attention "
            "factor 1.1547)"
        ) in text


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (replace(CONFIG, attention_factor=1.25), "attention_factor 1.0801234 against 1.25"),
        (replace(CONFIG, attention_factor_policy="none"), "attention_factor 1.0801234 against 1"),
        (
            replace(CONFIG, original_max_position_embeddings=32),
            "original_max_position_embeddings 64 against 32",
        ),
        (replace(CONFIG, rotary_base=500000.0), "rotary_base 10000 against 500000"),
        (
            CONFIG.with_factor_set(replace(LONG, num_start_tokens=4)),
            "num_start_tokens 0 against 4",
        ),
    ],
)
def test_everything_that_changes_the_model_is_compared(config, difference):
    assert difference in refusal(settings(config), saved())


SHORT_DIFFERS = CONFIG.with_factor_set(FactorSet(64, (1.0, 1.0, 1.05, 1.1)))
ONE_FACTOR = replace(CONFIG, attention_factor=1.1)
MADE_FOR_130 = replace(ONE_FACTOR, factor_sets=(SHORT, replace(LONG, max_length=130)))


@pytest.mark.parametrize(
    ("run", "checkpoint", "words"),
    [
        (settings(MADE_FOR_130), saved(ONE_FACTOR), "max_length 128 against 130"),
        # At the length of one of the two alone.
        (settings(OTHER, 64), saved(), "factor 2 is 1.6 against 1.7 (checkpoint: 128 tokens with"),
        (settings(SHORT_DIFFERS, 64), saved(), "factor 2 is 1 against 1.05 (checkpoint: 64 tokens"),
        (
            settings(),
            saved(CONFIG.with_factor_set(LONGER), 256),
            "(checkpoint: 256 tokens with the set up to 256, attention factor 1.1547; this",
        ),
        (settings(mode="short"), saved(), "factor 1 is 1.2 against 1 (checkpoint: 128 tokens with"),
        (settings(mode="short"), saved(), "run: 128 tokens in mode short with the set up to 64"),
        (
            settings(SHORT_DIFFERS, mode="mixed"),
            saved(mode="mixed"),
            "in short documents rescale factor 2 is 1 against 1.05",
        ),
        (settings(SHORT_DIFFERS, mode="mixed"), saved(), "in short documents"),
        (
            settings(),
            saved(hf_parity=True),
            "fp32 (--longrope-hf-parity) angles against exact angles",
        ),
        # As another release has computed it.
        (
            settings(),
            saved(longrope_attention_factor=1.19),
            "attention_factor 1.19 against 1.0801234",
        ),
        (
            settings(),
            stock(rotary_base=500000),
            "trained with rotary_base 500000 and this run's factors are for 10000; ",
        ),
    ],
)
def test_what_differs_at_a_length_that_either_side_uses_is_refused(run, checkpoint, words):
    assert words in refusal(run, checkpoint)


@pytest.mark.parametrize(("before", "now"), [("mixed", "auto"), ("mixed", "long")])
def test_an_unpacked_run_goes_on_from_mixed_windows_whose_samples_rotated_alike(before, now):
    verdict = check(settings(mode=now), saved(mode=before))
    assert verdict.remark.startswith(f"mode {now} after mode {before}, same factors: 128 tokens")
    (stage,) = verdict.lineage
    assert stage["mode_changes"] == [{"iteration": 7, "from": before, "to": now}]
    again = check(settings(mode=before), saved(mode=now, longrope_lineage=verdict.lineage), 9)
    assert [(c["iteration"], c["to"]) for c in again.lineage[0]["mode_changes"]] == [
        (7, now),
        (9, before),
    ]


def test_a_packed_run_changes_to_or_from_mixed_windows_only_when_asked():
    packed = {"dataloader_inter_document_masking": True}
    with pytest.raises(ValueError) as error:
        check(settings(), saved(mode="mixed"), **packed)
    assert str(error.value) == (
        "the checkpoint was trained in mode mixed and this run would rotate short packed documents "
        "in mode auto; give --longrope-mode mixed to go on as it was, or --longrope-mode auto to "
        "change the mode"
    )
    chosen = check(settings(mode_is_chosen=True), saved(mode="mixed"), **packed)
    assert chosen.remark.startswith("mode auto after mode mixed, same factors")
    assert check(settings(mode="mixed"), saved(mode="mixed"), **packed).remark is None


def test_a_stock_run_on_a_checkpoint_with_factors_is_refused():
    assert refusal(None, saved()) == (
        "the checkpoint was trained with LongRoPE, 128 tokens with the set up to 128, attention "
        "factor 1.08012, and this run has stock RoPE; give the checkpoint's factors with "
        "--longrope-config, or --use-checkpoint-args, which restores them"
    )


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn and this run"),
        ({"position_embedding_type": "none"}, "--position-embedding-type none and this run"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_abs"),
        ({"rotary_seq_len_interpolation_factor": 4}, "--rotary-seq-len-interpolation-factor 4 and"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5 and this run has 1.0; give"),
        ({"rotary_interleaved": True}, "rotary_interleaved True and this run has False; give"),
    ],
)
def test_a_model_with_other_positions_is_no_model_with_stock_rope(trained, words):
    here = {"rotary_percent": 1.0, "rotary_interleaved": False}
    checkpoint = stock(**{**here, "rotary_seq_len_interpolation_factor": None})
    assert check(settings(), checkpoint, **here).remark.startswith("first LongRoPE stage")
    for value in (vars(checkpoint), vars(saved())):  # without factors, and with the run's own
        with pytest.raises(ValueError) as error:
            check(settings(), argparse.Namespace(**{**value, **trained}), **here)
        assert str(error.value).startswith(f"the checkpoint was trained with {words}")
        assert str(error.value).endswith(REMEDY)
    replaced = {**here, "longrope_replace_factors": True}
    verdict = check(settings(), argparse.Namespace(**{**vars(checkpoint), **trained}), **replaced)
    assert verdict.remark.startswith("factors replaced (--longrope-replace-factors): ")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_model_of_scaled_rope_begins_its_first_stage_under_factors_for_that_scaling():
    base = identity_config(10000.0, 8, 64, LLAMA3)
    extended = replace(CONFIG, base_frequencies=LLAMA3)
    megatrons = stock(use_rope_scaling=True, rope_scaling_factor=8.0)
    for checkpoint in (saved(base, 64), megatrons):
        assert check(settings(extended), checkpoint).remark.startswith("first LongRoPE stage")
    assert check(settings(base, 64), saved(base, 64)).remark is None
    assert check(settings(base, 64), megatrons).remark is not None
    plain = "this run's factors multiply plain RoPE"
    for run in (settings(CONFIG), settings(identity_config(10000.0, 8, 64), 64)):
        for checkpoint in (saved(base, 64), megatrons):
            assert f"trained with RoPE scaled by llama3 and {plain}" in refusal(run, checkpoint)
    assert "trained with plain RoPE and this run's factors multiply RoPE scaled by llama3" in (
        refusal(settings(extended), stock())
    )
    assert "this run has stock RoPE" in refusal(None, saved(base, 64))


def test_a_run_without_factors_loads_what_megatron_itself_scales_alike():
    """Llama 3.1, imported by `convert from-hf`; of Llama 3.2 Megatron would take factor 8."""
    checkpoint = saved(identity_config(10000.0, 8, 64, LLAMA3), 64)
    verdict = check(None, checkpoint, use_rope_scaling=True)
    assert verdict == provenance.Verdict(provenance.saved_lineage(checkpoint))
    with pytest.raises(ValueError) as error:
        check(None, checkpoint)
    assert str(error.value) == (
        "the checkpoint was trained with RoPE scaled by llama3, factor 8, and this run has stock "
        "RoPE; give the checkpoint's factors with --longrope-config, or --use-checkpoint-args, "
        "which restores them"
    )
    other = saved(identity_config(10000.0, 8, 64, {**LLAMA3, "factor": 32.0}), 64)
    words = "llama3, factor 32, and this run has RoPE scaled by llama3, factor 8; give the"
    with pytest.raises(ValueError, match=words):
        check(None, other, use_rope_scaling=True, rope_scaling_factor=32.0)
    with pytest.raises(ValueError, match=r"trained with LongRoPE, 128 tokens .*, factor 8; give"):
        check(None, saved(replace(CONFIG, base_frequencies=LLAMA3)), use_rope_scaling=True)


def test_damaged_factors_in_a_checkpoint_are_one_sentence():
    checkpoint = saved()
    checkpoint.longrope_config_value["factor_sets"] = []
    with pytest.raises(ValueError, match="the LongRoPE factors in the checkpoint: "):
        check(settings(), checkpoint)


# Lineage


def test_stages_add_up():
    base = check(settings(), stock())
    checkpoint = saved(longrope_lineage=base.lineage)
    longer = settings(CONFIG.with_factor_set(LONGER), 256)
    verdict = check(longer, checkpoint, iteration=400, longrope_replace_factors=True)
    told = [(stage["rope"], stage["iteration"], stage["seq_length"]) for stage in verdict.lineage]
    assert told == [("stock", 0, 64), ("longrope", 7, 128), ("longrope", 400, 256)]
    assert len({stage.get("sha256") for stage in verdict.lineage}) == 3
    assert checkpoint.longrope_lineage == base.lineage


def test_equal_factors_have_equal_hashes():
    def digest(config, **more):
        return provenance.begin(arguments(), settings(config, **more))[-1]["sha256"]

    assert digest(CONFIG) == digest(CONFIG.with_factor_set(replace(LONG, origin={})))
    assert digest(CONFIG) != digest(OTHER)
    assert digest(CONFIG) != digest(CONFIG, hf_parity=True)


def test_a_checkpoint_without_a_lineage_has_an_empty_one(untied_gqa):
    assert MegatronCheckpoint.open(untied_gqa.path).lineage == []


# What --use-checkpoint-args restores


def run_arguments(**more) -> argparse.Namespace:
    values = {
        "longrope_config": None, "longrope_mode": None, "longrope_hf_parity": False,
        "use_checkpoint_args": True, "load": None, "pretrained_checkpoint": None, "kv_channels": 8,
    }  # fmt: skip
    return arguments(**{**values, **more})


def test_factors_mode_and_precision_are_restored():
    args = run_arguments()
    assert provenance.restore(args, saved(mode="long", hf_parity=True))
    assert args.longrope_config_value == CONFIG.to_dict()
    assert (args.longrope_mode, args.longrope_hf_parity) == ("long", True)


def test_what_the_user_asked_for_is_not_replaced():
    for mode in ("short", "auto"):
        args = run_arguments(longrope_mode=mode)
        assert provenance.restore(args, saved(mode="mixed"))
        assert args.longrope_mode == mode
    args = run_arguments(longrope_config="factors.json")
    assert not provenance.restore(args, saved(mode="long"))
    assert args.longrope_mode is None and not hasattr(args, "longrope_config_value")


def test_nothing_is_restored_without_the_flag_or_without_factors():
    args = run_arguments()
    before = dict(vars(args))
    assert not provenance.restore(args, stock())
    assert not provenance.restore(args, None)
    assert not provenance.restore(run_arguments(load="absent"), None)
    assert vars(args) == before


def test_an_own_script_reads_the_checkpoint_itself(untied_gqa, config):
    args = run_arguments(pretrained_checkpoint=str(untied_gqa.path), load="absent")
    assert provenance.restore(args, None)
    assert LongRopeConfig.from_dict(args.longrope_config_value) == config
    args = run_arguments(load=str(untied_gqa.path), use_checkpoint_args=False)
    assert not provenance.restore(args, None)


@pytest.mark.parametrize(("scale", "left"), [(1.08**2 / math.sqrt(8), None), (0.4124, 0.4124)])
def test_only_the_plugins_own_softmax_scale_is_forgotten(scale, left):
    args = run_arguments(longrope_attention_factor=1.08, softmax_scale=scale)
    provenance.restore(args, None)
    assert args.softmax_scale == left


# Around Megatron's reading of a checkpoint


@pytest.fixture
def load():
    """The wrapper around a reader that returns what it is told."""
    wrappers.activate(None)
    wrappers._compared.clear()
    content = {}

    def read(load_dir, args, rank0=False):
        return content.get(load_dir), load_dir, False, None

    yield SimpleNamespace(read=wrappers.with_factor_check(read), content=content)
    wrappers.activate(None)
    wrappers._compared.clear()
    wrappers._saved_args = None


def test_the_checkpoint_of_the_run_is_compared_once(load, capsys):
    wrappers.activate(Run(settings(), "sdpa"))
    args = arguments(load="a", pretrained_checkpoint=None)
    load.content["a"] = {"args": stock(), "iteration": 600}
    for rank0 in (True, False):
        load.read("a", args, rank0=rank0)
    assert capsys.readouterr().out == (
        "> longrope: a: first LongRoPE stage: 128 tokens with the set up to 128, attention factor "
        "1.08012, on a model with stock RoPE\n"
    )
    assert [stage["iteration"] for stage in args.longrope_lineage] == [0, 600]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (settings(OTHER), "the checkpoint was trained with other LongRoPE factors"),
        (None, "the checkpoint was trained with LongRoPE"),
    ],
    ids=["other factors", "stock"],
)
def test_a_refusal_names_the_directory_and_ends_the_run(load, run, reason):
    wrappers.activate(Run(run, "sdpa"))
    load.content["a"] = {"args": saved(), "iteration": 600}
    with pytest.raises(SystemExit) as error:
        load.read("a", arguments(load=None, pretrained_checkpoint="a"), rank0=True)
    assert str(error.value).startswith(f"longrope: error: a: {reason}")


@pytest.mark.parametrize(("run", "past"), [(settings(), ["unknown", "longrope"]), (None, [])])
def test_a_checkpoint_without_arguments_is_loaded_with_a_word_and_not_from_scratch(
    load, capsys, run, past
):
    wrappers.activate(Run(run, "sdpa"))
    args = arguments(load="a", pretrained_checkpoint=None)
    load.content["a"] = {"iteration": 7}
    load.read("a", args)
    assert capsys.readouterr().out == (
        "> longrope: a: the checkpoint stores no arguments; its factors could not be compared with "
        "this run's\n"
    )
    lineage = getattr(args, "longrope_lineage", [])
    assert [stage["rope"] for stage in lineage] == past
    assert [stage["iteration"] for stage in lineage[1:]] == [7] * bool(run)


def test_what_lies_beside_a_checkpoint_without_arguments_is_compared(load, untied_gqa):
    """As the run_config.yaml of Megatron-Bridge."""
    wrappers.activate(Run(settings(OTHER), "sdpa"))
    path = str(untied_gqa.path)
    load.content[path] = {"iteration": 7}
    with pytest.raises(SystemExit, match="the checkpoint was trained with "):
        load.read(path, arguments(load=path, pretrained_checkpoint=None))


def test_another_models_checkpoint_is_not_compared(load):
    wrappers.activate(Run(settings(OTHER), "sdpa"))
    load.content["teacher"] = {"args": saved()}
    args = arguments(load="a", pretrained_checkpoint=None)
    load.read("teacher", args)
    assert not hasattr(args, "longrope_lineage")


def test_a_reference_model_does_not_change_the_lineage(load, capsys):
    wrappers.activate(Run(settings(), "sdpa"))
    args = arguments(load="a", pretrained_checkpoint="base")
    load.content["a"] = {"args": saved(longrope_lineage=[{"rope": "longrope"}]), "iteration": 9}
    load.content["base"] = {"args": stock(), "iteration": 600}
    load.read("a", args)
    load.read("base", args)
    assert args.longrope_lineage == [{"rope": "longrope"}]


def test_nothing_to_load_is_nothing_to_compare(load):
    wrappers.activate(Run(settings(), "sdpa"))
    args = arguments(load="absent", pretrained_checkpoint=None)
    assert load.read("absent", args)[0] is None
    assert not hasattr(args, "longrope_lineage")


def test_megatrons_parsing_hands_the_checkpoints_arguments_on(load):
    load.content["a"] = {"args": saved(), "iteration": 600}
    load.read("a", arguments(load="a", pretrained_checkpoint=None), rank0=True)
    assert wrappers._saved_args is load.content["a"]["args"]
