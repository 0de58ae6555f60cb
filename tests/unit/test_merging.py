"""Factor files of several searches become one."""

from dataclasses import replace

import pytest

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.merging import merge_configs

ONES = FactorSet(64, (1.0,) * 4)


def tuned(*lengths, attention_factor=1.1, last=None):
    """Factors of a model that was tuned for 256 tokens, and of windows beyond."""
    sets = [ONES, FactorSet(256, (1.0, 2.0, 3.0, 4.0))]
    sets += [FactorSet(n, (1.0, 2.0, n / 100, last or n / 80)) for n in lengths]
    return LongRopeConfig(10000.0, 8, 64, tuple(sets), attention_factor)


def test_every_window_of_every_file_is_there_and_keeps_its_factors_and_origin():
    far = tuned(512)
    farther = tuned(1024).with_factor_set(
        FactorSet(1024, (1.0, 2.0, 8.0, 9.0), origin={"stage": "second"})
    )
    merged = merge_configs({"far": far, "farther": farther})
    assert [item.max_length for item in merged.factor_sets] == [64, 256, 512, 1024]
    assert merged.factor_set_for(500) == far.factor_set_for(500)
    assert merged.factor_set_for(1000) == farther.factor_set_for(1000)
    assert merged.attention_factor == 1.1


def test_the_order_of_the_files_does_not_matter():
    far, farther = tuned(512), tuned(1024)
    assert merge_configs({"a": far, "b": farther}) == merge_configs({"b": farther, "a": far})


def test_one_file_is_itself():
    assert merge_configs({"a": tuned(512)}) == tuned(512)


@pytest.mark.parametrize(
    "other, sentence",
    [
        (tuned(512, last=7.0), "different factors for 512 tokens"),
        (tuned(1024, attention_factor=1.2), "attention factor 1.2 and a.json has attention factor"),
        (tuned(1024, attention_factor=None), "attention-factor policy su"),
        (replace(tuned(1024), rotary_base=5e5), "rotary_base 500000.0 and a.json has 10000.0"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(other, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_configs({"a.json": tuned(512), "b.json": other})


def test_the_command_merges_and_shows(tmp_path, capsys):
    files = []
    for length in (512, 1024):
        files.append(str(tmp_path / f"{length}.json"))
        tuned(length).save(files[-1])
    merged = tmp_path / "all.json"
    assert main(["factors", "merge", *files, "--output", str(merged)]) == 0
    assert "factors for 64, 256, 512, 1024 tokens" in capsys.readouterr().out
    assert LongRopeConfig.load(merged).max_length == 1024
    assert main(["factors", "show", str(merged)]) == 0
    assert "1024        1.1      0" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["factors", "show", str(tmp_path / "absent.json")]) == 2
    assert "no such file" in capsys.readouterr().err
