"""The Python API as a notebook uses it: options in, results out, no argv, no SystemExit."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import megatron_longrope as longrope


def test_search_returns_the_configuration_that_it_wrote(untied_gqa, data, tmp_path):
    config = longrope.search(
        longrope.SearchOptions(
            load=str(untied_gqa.path),
            base_config="none",
            original_length=64,
            data=data["search"],
            target_length="256",
            num_samples=2,
            max_evaluations=12,
            retrieval_trials=0,
            no_figures=True,
            output=str(tmp_path / "factors.json"),
        )
    )
    assert config == longrope.LongRopeConfig.load(tmp_path / "factors.json")
    assert [item.max_length for item in config.factor_sets] == [64, 256]
    assert config.factor_sets[-1].origin["evaluations"] <= 12


def test_evaluate_returns_a_record_for_each_cell_and_measures_none_twice(
    untied_gqa, data, tmp_path
):
    options = longrope.PerplexityOptions(
        load=f"base={untied_gqa.path}",
        data=data["heldout"],
        lengths="64,128",
        num_documents=2,
        output=str(tmp_path),
    )
    rows = longrope.evaluate(options)
    assert [(row["model"], row["length"]) for row in rows] == [("base", 64), ("base", 128)]
    assert rows == longrope.evaluate(options)
    assert len((tmp_path / "ppl.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "ppl.csv").is_file()


def test_an_export_is_of_the_iteration_that_was_the_latest_when_it_began(untied_gqa, tmp_path):
    save = shutil.copytree(untied_gqa.path, tmp_path / "save")

    def train_on(done, total):
        (save / "latest_checkpointed_iteration.txt").write_text("4")

    options = longrope.ToHfOptions(load=str(save), output=str(tmp_path / "hf"))
    assert longrope.convert_to_hf(options, train_on).verification is not None


def test_an_export_does_not_replace_its_factors(untied_gqa, config, tmp_path):
    factors = tmp_path / "old" / "f.json"
    config.save(factors)
    options = longrope.ToHfOptions(
        load=str(untied_gqa.path), output=str(tmp_path / "old"), overwrite=True,
        longrope_config=str(factors),
    )  # fmt: skip
    with pytest.raises(longrope.LongRopeError, match="which is read; give another --output"):
        longrope.convert_to_hf(options)


def test_an_export_is_replaced_by_one_of_its_own_factors(untied_gqa, config, tmp_path):
    factors = tmp_path / "old" / "longrope.json"
    config.save(factors)
    options = longrope.ToHfOptions(
        load=str(untied_gqa.path), output=str(tmp_path / "old"), overwrite=True,
        longrope_config=str(factors),
    )  # fmt: skip
    longrope.convert_to_hf(options)
    assert longrope.LongRopeConfig.load(factors) == config


def test_prepare_data_returns_the_manifest(data, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": "a window " * 20}) + "\n" for _ in range(3)))
    manifest = longrope.prepare_data(
        longrope.PrepareOptions(
            input=source, tokenizer=Path(data["tokenizer"]), output=tmp_path / "set",
            segment_length="64",
        )
    )  # fmt: skip
    assert manifest["segments"] == 6 and (tmp_path / "set.bin").is_file()


def test_lists_are_read_as_the_command_line_reads_them():
    options = longrope.PasskeyOptions(hf="m", output="o", lengths=["4k", 8192], depths=[None])
    assert (options.lengths, options.depths) == ([4096, 8192], [None])
    options = longrope.PasskeyOptions(hf="m", output="o", lengths=(64,), depths=[0.5, 1])
    assert (options.lengths, options.depths) == ([64], [0.5, 1.0])
    assert replace(options).depths == options.depths
    assert replace(options, depths=[1]).depths == [1.0]
    assert replace(options, depths=3).depths == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"depths '3\.0': give how many"):
        replace(options, depths=[3])
    options = longrope.PerplexityOptions(hf=["m"], output="o", data="d", lengths=[64], baselines=[])
    assert options.baselines == ()
    for kind in (longrope.TaskOptions, longrope.BenchmarkOptions):
        assert kind(hf="m", output="o", tasks=["hellaswag:5", "piqa"]).tasks == "hellaswag:5,piqa"
    options = longrope.SearchOptions(
        hf="m", output="o", data="d", target_length=64, start_tokens=[0, 4], needle_depths=0.5
    )
    assert (options.start_tokens, options.needle_depths) == ("0,4", "0.5")


def test_options_have_the_flags_names_and_the_package_lists_them():
    assert set(longrope.__all__) == set(dir(longrope))
    kinds = [getattr(longrope, name) for name in longrope.__all__ if name.endswith("Options")]
    assert not [item.name for kind in kinds for item in fields(kind) if "name" in item.metadata]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: longrope.SearchOptions(data="d", target_length="4k", output="o"), "none of load"),
        (
            lambda: longrope.SearchOptions(
                load="a", hf="b", data="d", target_length="4k", output="o"
            ),
            "load and hf exclude each other",
        ),
        (
            lambda: longrope.SearchOptions(
                hf="b", data="d", target_length="4k", output="o", space="flored"
            ),
            "space is 'flored'; it must be one of floored, full, critical",
        ),
        *(
            (
                lambda name=name: longrope.SearchOptions(
                    hf="b", data="d", target_length="4k", output="o", **{name: 0}
                ),
                f"{name}: '0' is not a positive integer",
            )
            for name in ("num_samples", "windows_per_document")
        ),
        *(
            (
                lambda given=given: longrope.SearchOptions(
                    hf="b", data="d", target_length="4k", output="o", **given
                ),
                sentence,
            )
            for given, sentence in (
                ({"base_config": 4}, "base_config is of type int; give a text or a path"),
                ({"overwrite": "false"}, "overwrite is 'false'; it must be True or False"),
                ({"attention_factor": 1.0, "load": "a"}, "load and hf exclude each other"),
                ({"num_samples": None}, "num_samples is None; leave it out or give a value"),
                ({"seed": None}, "seed is None; leave it out or give a value"),
            )
        ),
        (
            lambda: longrope.SearchOptions(hf="b", data="d", target_length="4x", output="o"),
            "target_length: length '4x'",
        ),
        *(
            (
                lambda kind=kind, given=given: getattr(longrope, kind)(
                    hf="m", output="o", **{"lengths": "4k", "data": "d"} | given
                ),
                sentence,
            )
            for kind, given, sentence in (
                ("PerplexityOptions", {"lengths": ["4k", "8x"]}, "lengths: length '8x'"),
                ("PerplexityOptions", {"baselines": ["yarrn"]}, "baselines: 'yarrn' is unknown"),
                ("NeedleOptions", {"depths": 1.5}, "depths '1.5': give how many"),
                ("NeedleOptions", {"depths": [0.5, None]}, "depths '0.5,random': give how many"),
                ("NeedleOptions", {"max_hours": -1.0}, "-1.0 hours must be above 0"),
            )
        ),
        (
            lambda: longrope.convert_to_hf(longrope.ToHfOptions(load="absent", output="o")),
            "absent",
        ),
        (
            lambda: longrope.evaluate(
                longrope.PasskeyOptions(hf="absent", lengths="64", output="o")
            ),
            "absent: no such folder",
        ),
    ],
)
def test_what_is_refused_is_a_LongRopeError(make, sentence):
    with pytest.raises(longrope.LongRopeError, match=sentence):
        make()


# A process of its own, in which nothing has been imported yet.
def test_options_are_at_hand_without_torch():
    code = (
        "import sys\n"
        "from megatron_longrope import PerplexityOptions, SearchOptions, ToHfOptions, search\n"
        "import megatron_longrope\n"
        "assert callable(search) and callable(megatron_longrope.evaluate)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
