"""Factors in the authors' CSV, config.json and lists, there and back, and two files compared."""

import json
import math
import re
from dataclasses import replace

import pytest
from tiny_hf import WINDOW, make_hf_folder

from megatron_longrope.baselines import extended_config
from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.factor_files import (
    Geometry,
    differences,
    export_factors,
    import_factors,
)
from megatron_longrope.merging import merge_configs

VECTOR = (1.0, 1.5, 2.25, 31.999999)
MODEL = ("--rotary-base", "10000", "--original-length", "4k")
GEOMETRY = Geometry(10000.0, 4096)


def config(*sets, **changes):
    return LongRopeConfig(**{
        "rotary_base": 10000.0, "rotary_dim": 8, "original_max_position_embeddings": 4096,
        "factor_sets": sets or (FactorSet(4096, (1.0,) * 4), FactorSet(131072, VECTOR)),
        "attention_factor": 1.19, **changes,
    })  # fmt: skip


def run(*arguments):
    return main(["factors", *map(str, arguments)])


@pytest.mark.parametrize(
    "text",
    [
        "1.0,1.5,2.25,31.999999\n" * 32,  # the authors': a row for each layer
        "1.0\n1.5\n2.25\n31.999999\n",
        "1.0 1.5 2.25 31.999999",
        "\ufeff1.0 1.5 2.25 31.999999",  # a mark of Windows
        "[1.0, 1.5, 2.25, 31.999999]",
        '{"rescale_factors": [[1.0, 1.5, 2.25, 31.999999]]}',
    ],
)
def test_a_vector_is_read_from_rows_columns_and_lists(tmp_path, text):
    name = "x.json" if text[0] in "[{" else "x.csv"
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = import_factors([(tmp_path / name, 131072)], GEOMETRY)
    assert found.factor_sets == (FactorSet(131072, VECTOR, origin={"source": name}),)
    assert found.rotary_dim == 8 and found.attention_factor is None


def test_files_called_like_the_authors_know_their_windows(tmp_path):
    for name in ("4k_la2_256k", "ft_la2_256k", "2048k_la2_256k"):
        (tmp_path / f"{name}.csv").write_text("1.0,1.5,2.25,62\n" * 2)
    output = tmp_path / "f.json"
    assert run("import", *sorted(tmp_path.glob("*.csv")), *MODEL, "--output", output) == 0
    assert [s.max_length for s in LongRopeConfig.load(output).factor_sets] == [
        4096, 262144, 2097152
    ]  # fmt: skip


def test_longrope2s_short_and_long_lists_are_two_sets(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"long_factor": list(VECTOR), "short_factor": [1.0] * 4})
    )
    found = import_factors([(tmp_path / "a.json", 131072)], GEOMETRY)
    assert [(s.max_length, s.rescale_factors) for s in found.factor_sets] == [
        (4096, (1.0,) * 4), (131072, VECTOR)
    ]  # fmt: skip


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "given",
    [
        config(),
        config(attention_factor_policy="yarn"),
        config(FactorSet(131072, VECTOR)),
        config(base_frequencies=LINEAR),
    ],
    ids=["two windows", "yarn", "one window", "scaled"],
)
def test_an_export_for_hugging_face_is_imported_as_it_was(tmp_path, given):
    given.save(tmp_path / "a.json")
    assert run("export", tmp_path / "a.json", "--output", tmp_path / "config.json") == 0
    assert run("import", tmp_path / "config.json", "--output", tmp_path / "b.json") == 0
    assert run("diff", tmp_path / "a.json", tmp_path / "b.json") == 0


def test_an_export_has_the_attention_factors_that_vllm_reads(tmp_path):
    config(attention_factor=1.3).save(tmp_path / "a.json")
    assert run("export", tmp_path / "a.json", "--output", tmp_path / "config.json") == 0
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert rope["short_mscale"] == rope["long_mscale"] == rope["attention_factor"] == 1.3


def test_a_path_with_an_equals_sign_has_no_window(tmp_path):
    folder = tmp_path / "lr=2e-5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config().to_hf()))
    (folder / "x.csv").write_text("1,2\n")
    for source, more in ((folder / "config.json", ()), (f"8k={folder}/x.csv", MODEL)):
        output = tmp_path / "o.json"
        assert run("import", source, *more, "--output", output, "--overwrite") == 0
    assert LongRopeConfig.load(output).max_length == 8192


@pytest.mark.parametrize("kind", ["csv", "list"])
def test_a_published_vector_goes_out_and_comes_back_to_the_last_digit(tmp_path, kind):
    published = LongRopeConfig.load("published:llama2-256k")
    export = ("--format", kind, "--window", "256k", "--output", tmp_path / "v.txt")
    assert run("export", "published:llama2-256k", *export) == 0
    back = import_factors([(tmp_path / "v.txt", 262144)], GEOMETRY)
    expected = published.factor_set_for(262144).rescale_factors
    assert back.factor_sets[0].rescale_factors == expected
    if kind == "csv":
        assert len(set((tmp_path / "v.txt").read_text().splitlines())) == 1
        assert (tmp_path / "v.txt").read_text().count("\n") == 32


@pytest.mark.parametrize(
    ("text", "sources", "message"),
    [
        ("1,2\n1,3\n", "8k={}", "layers have different factors"),
        ("1,2,x\n", "8k={}", "holds no numbers alone"),
        ("", "8k={}", "expected a list of numbers|needs|dim"),
        ('{"weights": 1}', "8k={}", "no factors here; expected rope_scaling"),
        ("1,2\n", "{}", "does not say which window it is for; write WINDOW="),
        ("1,2\n", "many={}", "many=.*write WINDOW=FILE"),
    ],
)
def test_a_file_that_holds_no_vector_is_refused(tmp_path, capsys, text, sources, message):
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert run("import", sources.format(path), *MODEL, "--output", tmp_path / "o.json") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "o.json").exists()


def test_a_bare_vector_needs_the_geometry_and_a_config_json_must_not_get_one(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match="holds factors alone; give the model's --rotary-base"):
        import_factors([(tmp_path / "a.csv", 8192)])
    (tmp_path / "config.json").write_text(json.dumps(config().to_hf()))
    with pytest.raises(ValueError, match="leave the window and the flags of the geometry out"):
        import_factors([(tmp_path / "config.json", None)], GEOMETRY)


def test_differences_are_named_by_window_and_largest_index(capsys, tmp_path):
    other = config(
        FactorSet(4096, (1.0,) * 4, 8), FactorSet(131072, (1.0, 1.5, 2.5, 32.0)),
        FactorSet(262144, VECTOR), attention_factor=None,
    )  # fmt: skip
    assert differences(config(), other) == [
        "4096 tokens: attention factor 1.19 and 1.0",
        "131072 tokens: attention factor 1.19 and 1.1902380714238083",
        "131072 tokens: 2 of 4 factors differ, most at index 2: 2.25 and 2.5 (0.111 apart)",
        "262144 tokens: in the second only",
    ]
    config().save(tmp_path / "a.json")
    other.save(tmp_path / "b.json")
    assert run("diff", tmp_path / "a.json", tmp_path / "b.json") == 1
    assert capsys.readouterr().out.count("\n") == 4


def test_start_tokens_differ_where_they_rotate_differently():
    two, four = (config(FactorSet(4096, (value,) * 4, 8)) for value in (2.0, 4.0))
    scaled = replace(two, base_frequencies=LINEAR)
    assert differences(four, scaled) == [
        "4096 tokens, start tokens: 4 of 4 factors differ, most at index 0: 1.0 and 2.0 (1 apart)"
    ]
    ones, started = (config(FactorSet(4096, (1.0,) * 4, count)) for count in (0, 8))
    assert differences(ones, started) == []
    assert differences(config(FactorSet(4096, (2.0,) * 4)), two) == [
        "4096 tokens: start tokens 0 and 8"
    ]
    assert export_factors(started, "list") == export_factors(ones, "list")
    assert merge_configs({"a": ones, "b": started}).factor_sets[0].rescale_factors == (1.0,) * 4


@pytest.mark.parametrize(
    "words",
    [
        ("import", "{a}"),
        ("export", "{a}"),
        ("export", "{a}", "--format", "json"),
        ("merge", "{a}", "{b}"),
        ("make", "pi", "--hf", "{plain}", "--target-length", 256),
    ],
)
def test_no_file_is_replaced_unless_asked_for(tmp_path, capsys, words):
    if words[0] == "make":
        make_hf_folder(tmp_path / "plain", "llama")
    config().save(tmp_path / "a.json")
    config(FactorSet(262144, VECTOR)).save(tmp_path / "b.json")
    if words[0] == "import":
        run("export", tmp_path / "a.json", "--output", tmp_path / "config.json")
    names = {"a": "config.json" if words[0] == "import" else "a.json", "b": "b.json"}
    paths = {"plain": tmp_path / "plain", **{key: tmp_path / name for key, name in names.items()}}
    words = [str(word).format(**paths) for word in words]
    precious = tmp_path / "precious.json"
    precious.write_text("days of search")
    assert run(*words, "--output", precious) == 2
    assert "precious.json exists; outputs are not replaced" in capsys.readouterr().err
    assert precious.read_text() == "days of search"
    assert run(*words, "--output", precious, "--overwrite") == 0
    assert precious.read_text() != "days of search"
    assert run(*words, "--output", tmp_path, "--overwrite") == 2
    assert f"{tmp_path} is a directory; give the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format json --window 4k", "--window has no meaning with --format json"),
        ("--format list --layers 4", "--layers has no meaning with --format list"),
        ("--window 2k", "long_length 2048 is below the original window 4096"),
        ("--window 8k", "sequence length 8192 exceeds 4096"),
    ],
)
def test_a_flag_that_an_export_would_ignore_is_refused(tmp_path, capsys, flags, message):
    identity_config(10000.0, 8, 4096, LINEAR).save(tmp_path / "a.json")
    assert run("export", tmp_path / "a.json", "--output", tmp_path / "o", *flags.split()) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_csv_has_rows(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("export", "published:llama2-256k", "--format", "csv", "--layers", 0, "--output", "x")
    assert "--layers: '0' is not a positive integer" in capsys.readouterr().err


def test_show_prints_every_factor_on_demand_and_json(capsys):
    assert run("show", "published:phi-4-mini", "--all") == 0
    assert "1.118320672" in capsys.readouterr().out
    assert run("show", "published:phi-4-mini", "--json", "--all") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (
        LongRopeConfig.load("published:phi-4-mini").to_dict()["factor_sets"][1]["rescale_factors"]
        == shown["factor_sets"][1]["rescale_factors"]
    )
    assert shown["factor_sets"][1]["attention_factor"] == pytest.approx(1.190238, abs=5e-7)
    assert run("show", "published:phi-4-mini", "--json") == 0
    (short,) = json.loads(capsys.readouterr().out)
    assert len(short["factor_sets"][1]["rescale_factors"]) == 3


def test_show_names_the_score_that_a_search_went_by(tmp_path, capsys):
    found = {"stage": "first", "search_perplexity": 23.66, "method": "longrope-cma"}
    for objective, shown in (
        ({}, "perplexity"),  # of older files, which had no other
        ({"objective": "ppl"}, "perplexity"),
        ({"objective": "joint"}, "score by joint"),
    ):
        file = tmp_path / "factors.json"
        LongRopeConfig(
            10000.0, 8, 64, (FactorSet(256, (1.0, 2.0, 3.0, 4.0), origin={**found, **objective}),)
        ).save(file)
        assert run("show", file) == 0
        assert f"first search, {shown} 23.66 (longrope-cma)" in capsys.readouterr().out


def test_the_published_factors_are_listed_with_their_licence(capsys):
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith("MIT)") for line in lines)


def test_a_published_method_is_made_for_a_model_and_multiplies_the_factors_it_has(tmp_path, capsys):
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    # A sliding window says nothing of the factors.
    make_hf_folder(plain, "mistral", sliding_window=16)
    assert (
        run("make", "yarn", "--hf", plain, "--target-length", 256, "--output", tmp_path / "y.json")
        == 0
    )
    made = LongRopeConfig.load(tmp_path / "y.json")
    assert made == extended_config("yarn", identity_config(10000.0, 8, WINDOW), 256, "yarn")
    # transformers' own rule for its temperature, and its YaRN in every window of an export
    assert made.attention_factor_for(256) == pytest.approx(0.1 * math.log(4) + 1)
    exported = made.to_hf(short_length=256)["rope_scaling"]
    assert exported["short_factor"] == list(made.factor_sets[-1].rescale_factors)
    make_hf_folder(tuned, "mistral", sliding_window=16, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0],
        "original_max_position_embeddings": WINDOW,
    }, max_position_embeddings=256)  # fmt: skip
    assert (
        run("make", "pi", "--hf", tuned, "--target-length", 512, "--output", tmp_path / "p.json")
        == 0
    )
    twice = LongRopeConfig.load(tmp_path / "p.json").factor_sets
    assert [item.max_length for item in twice] == [WINDOW, 256, 512]
    assert twice[-1].rescale_factors == (2.0, 3.0, 4.0, 8.0)
    # And its own alone, as a file.
    assert run("export", tuned, "--format", "json", "--output", tmp_path / "own.json") == 0
    assert LongRopeConfig.load(tmp_path / "own.json").factor_sets == twice[:-1]
    assert main(["factors", "show", str(plain)]) == 2
    assert "carries no factors" in capsys.readouterr().err
    assert (
        run("make", "pi", "--hf", tuned, "--target-length", 256, "--output", tmp_path / "p.json")
        == 2
    )
    assert "within the model's window of 256 tokens" in capsys.readouterr().err
