"""Records are read whole, named apart, and compared only where that is fair."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from evaluated import needle, passkey, ppl, ruler, save, short, whose
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.evaluation.kind import Section
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.series import Identity, name_series
from megatron_longrope.evaluation.statistics import Tally, wilson_interval
from megatron_longrope.evaluation.table import ABSENT, Column, Table, Value
from megatron_longrope.report.page import sections_of, write_report
from megatron_longrope.report.reading import read_measurements
from megatron_longrope.report.style import series_styles, spread_labels, style_of


def refusal(*directories) -> str:
    with pytest.raises(ValueError) as caught:
        read_measurements(directories)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names_of(*directories) -> list[str]:
    return [series.name for series in read_measurements(directories).series]


def tables(*directories) -> list[Table]:
    """Every table of the report."""
    sections = sections_of(read_measurements(directories))
    return [table for section in sections for table in section.tables]


def cells(table) -> dict[str, dict[str, float]]:
    """Numbers of a table by row and column, in which small print tells benchmarks apart."""
    heads = [column.title for column in table.columns]
    if len(set(heads)) < len(heads):
        heads = [column.below for column in table.columns]
    return {
        name: {head: value.rank for head, value in zip(heads, values, strict=True) if value}
        for name, values in table.rows.items()
    }


def perplexities(*directories) -> dict[str, dict[str, float]]:
    """Of the first table."""
    table, *_ = tables(*directories)
    return cells(table)


# Reading


def test_a_model_has_the_name_that_its_last_records_have(tmp_path):
    first, second = ppl(4096, 3.0), ppl(8192, 4.0)
    renamed = [{**row, "model": "tuned"} for row in (first, second)]
    save(tmp_path, "ppl", [first, second, *renamed])
    assert len(names_of(tmp_path)) == 1
    assert len(read_measurements([tmp_path]).rows["ppl"]) == 2


def test_records_are_found_at_any_depth_and_read_once(tmp_path):
    save(tmp_path / "a" / "deep" / "er", "ppl", [ppl(4096, 3.0)])
    save(tmp_path / "a", "short", [short("arc", 0.5)])
    save(tmp_path / "a" / ".hidden", "ppl", [ppl(4096, 9.0)])
    found = read_measurements([tmp_path, tmp_path / "a", tmp_path / "a" / "deep"])
    assert {kind: len(rows) for kind, rows in found.rows.items() if rows} == {"ppl": 1, "short": 1}
    assert len(found.series) == 1 and found.window == 4096


@pytest.mark.parametrize(
    "tail", ['{"length": 8192, "proto', "\n \n{", b"\xff\xfe".decode("latin-1")]
)
def test_what_a_crash_left_of_the_last_line_is_passed_over(tmp_path, tail):
    path = save(tmp_path, "ppl", [ppl(4096, 3.0)], tail)
    before = path.read_bytes()
    assert perplexities(tmp_path) == {"base": {"4k": 3.0}}
    assert path.read_bytes() == before  # a report changes nothing it reads


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("ppl", [1], "a record must be a JSON object, got list"),
        (
            "ppl",
            {"length": 4096},
            "lacks 'protocol'; move the file away and measure again with `longrope eval ppl`",
        ),
        ("ppl", ppl(4096, 3.0) | {"checkpoint_sha256": None}, "checkpoint_sha256 is None; it must"),
        ("ppl", ppl(4096, 3.0) | {"length": "4k"}, "length is '4k'; it must be a positive integer"),
        ("ppl", ppl(4096, 3.0, ppl_window_mean=-1), "ppl_window_mean is -1"),
        ("passkey", passkey(4096, 1), "correct is 1; it must be true or false"),
        ("needle", needle(4096, 1.5), "recall is 1.5; it must be a number from 0 to 1"),
        ("needle", needle(4096, 1.0, documents_sha256=None), "documents_sha256 is None"),
        ("short", short("arc", "0.5"), "value is '0.5'; it must be a number"),
        ("short", short("", 0.5), "task is ''"),
    ],
)
def test_a_malformed_record_is_refused_by_place_value_and_rule(tmp_path, kind, row, message):
    save(tmp_path, kind, [row])
    assert f"{kind}.jsonl, line 1: " in refusal(tmp_path) and message in refusal(tmp_path)


def test_a_directory_without_records_is_refused(tmp_path):
    assert "no record in ppl.jsonl" in refusal(tmp_path)
    save(tmp_path / "torn", "ppl", [], '{"length": 81')
    assert "no record in ppl.jsonl" in refusal(tmp_path / "torn")
    assert "absent is no directory" in refusal(tmp_path / "absent")
    save(tmp_path / "good", "ppl", [ppl(4096, 3.0)])
    (tmp_path / "empty").mkdir()
    assert "empty has no record" in refusal(tmp_path / "good", tmp_path / "empty")


@pytest.mark.parametrize(
    ("metric", "higher", "best", "text"),
    [
        ("acc_bytes", True, "highest", "50.0"),
        ("ter", False, "lowest", "0.500"),
        ("acc", None, "highest", "50.0"),  # where nothing is said the name tells
        ("bits_per_byte", None, "lowest", "0.500"),
        ("bleu", True, "highest", "0.500"),
        ("bleu_acc", True, "highest", "50.0"),  # a share of questions
    ],
)
def test_which_scores_are_good_is_what_the_harness_says(metric, higher, best, text):
    row = short("task", 0.5, metric=metric, higher_is_better=higher)
    table = KINDS["tasks"].sections_of([row])[0].tables[0]
    assert table.columns[0].best == best and table.rows["base"][0].text == text


def test_a_column_has_one_scale_though_one_model_of_it_is_lost():
    rows = [short("task", value, metric="f1") | whose(f"m{value}") for value in (12.3, 0.8, 1.0)]
    (table,) = KINDS["tasks"].sections_of(rows)[0].tables
    assert [row[0].text for row in table.rows.values()] == ["12.300", "0.800", "1.000"]


def test_a_baseline_of_two_original_lengths_is_two_tables(tmp_path):
    save(tmp_path, "ppl", [
        ppl(4096, 3.0, label="pi", policy="su", config_sha256=f"{n}", original_length=n)
        for n in (1024, 2048)
    ])  # fmt: skip
    assert [table.title.split(", ")[-1] for table in tables(tmp_path)] == [
        "original length 1024)", "original length 2048)",
    ]  # fmt: skip


SAMPLES = {
    "ppl": ppl(4096, 3.0),
    "passkey": passkey(4096, True, requested=0.5),
    "needle": needle(4096, 1.0, nll=None),
    "short": short("arc", 0.5, requests_sha256="r0"),
    "tasks": short("arc", 0.5, window=None, long_prompts="error", requests_sha256="r0"),
    "ruler": ruler("vt", 4096, 0.5),
}
POOLED = ("passkey", "needle", "ruler")  # cells share a value, which says how many they are


@pytest.mark.parametrize(("kind", "field"), [
    (kind, field) for kind in KINDS for field in KINDS[kind].cell_fields
])  # fmt: skip
def test_no_field_of_a_key_can_be_lost_in_the_tables(tmp_path, kind, field):
    one = SAMPLES[kind]
    other = 0.25 if field.endswith("depth") else 7 if isinstance(one.get(field), int) else "other"
    if (kind, field) == ("ruler", "task"):
        other = "cwe"
    save(tmp_path, kind, [one, one | {field: other}])
    # RULER's averages are those of the table by task.
    shown = [value for table in tables(tmp_path) if kind != "ruler" or "by task" in table.title
             for values in table.rows.values() for value in values if value]  # fmt: skip
    pooled = [int(value.below[0].split(" ")[-1]) for value in shown if kind in POOLED]
    assert (sum(pooled) if pooled else len(shown)) == 2


def test_another_tokenizer_of_another_model_splits_nothing(tmp_path):
    save(tmp_path, "passkey", [
        passkey(4096, True, tokenizer_sha256=model) | whose(model) for model in ("a", "b")
    ])  # fmt: skip
    (table,) = tables(tmp_path)
    assert table.title == "Passkey retrieval, teacher-forced" and list(table.rows) == ["a", "b"]


# Names


def test_names_hold_only_what_tells_the_series_apart(tmp_path):
    one = tmp_path / "one"
    save(one, "ppl", [
        ppl(4096, 3.0) | whose("llama", "yarn", "su"), ppl(4096, 3.0) | whose("llama", "pi", "su"),
        ppl(4096, 3.0) | whose("llama", "pi", "none"), ppl(4096, 3.0) | whose("llama"),
        ppl(4096, 3.0) | whose("llama", "search", config="s.json"),
    ])  # fmt: skip
    assert names_of(one) == ["YaRN", "PI (su)", "PI (none)", "own factors", "search"]
    save(tmp_path / "two", "ppl", [ppl(4096, 3.0) | whose("a"), ppl(4096, 3.0) | whose("b")])
    assert names_of(tmp_path / "two") == ["a", "b"]
    assert names_of(tmp_path / "two", one)[:3] == [
        "a, own factors",
        "b, own factors",
        "llama, YaRN",
    ]


def test_a_baseline_is_one_line_though_its_factors_change_with_the_length(tmp_path):
    rows = [ppl(n, 3.0) | whose(label="yarn", policy="su") | {"config_sha256": f"{n}"}
            for n in (4096, 8192)]  # fmt: skip
    save(tmp_path, "ppl", rows)
    assert perplexities(tmp_path) == {"base, YaRN": {"4k": 3.0, "8k": 3.0}}


def test_models_of_one_label_in_two_directories_are_told_apart_by_them(tmp_path):
    for folder, value in (("first", 3.0), ("second", 4.0)):
        save(tmp_path / folder / "eval", "ppl", [ppl(4096, value)])
        save(tmp_path / folder / "more", "passkey", [passkey(4096, value > 3)])
    expected = {"base (first)": {"4k": 3.0}, "base (second)": {"4k": 4.0}}
    assert perplexities(tmp_path) == expected
    assert perplexities(tmp_path / "first", tmp_path / "second") == expected
    assert names_of(tmp_path) == ["base (first)", "base (second)"]


def test_parts_of_one_evaluation_in_two_directories_belong_together(tmp_path):
    save(tmp_path / "a", "ppl", [ppl(4096, 3.0)])
    save(tmp_path / "b", "ppl", [ppl(8192, 4.0)])
    save(tmp_path / "c", "ppl", [ppl(8192, 4.0)])  # a copy
    assert perplexities(tmp_path) == {"base": {"4k": 3.0, "8k": 4.0}}


def test_one_factor_file_under_two_paths_is_one_series(tmp_path):
    rows = [whose(label="s", config=path) | {"config_sha256": "ab"} for path in ("s", "./s")]
    save(tmp_path, "ppl", [ppl(n, 3.0) | row for n, row in zip((4096, 8192), rows, strict=True)])
    assert perplexities(tmp_path) == {"base, s": {"4k": 3.0, "8k": 3.0}}


def test_checkpoints_of_one_label_are_told_apart_by_iteration_or_factors(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0, iteration=n) for n in (100, 200)])
    assert names_of(tmp_path) == ["base (iteration 100)", "base (iteration 200)"]
    save(tmp_path / "b", "ppl", [
        ppl(4096, 3.0, label="s", config="s.json", config_sha256=sha * 8) for sha in ("ab", "cd")
    ])  # fmt: skip
    assert names_of(tmp_path / "b") == ["base, s (factors abababab)", "base, s (factors cdcdcdcd)"]


def test_a_factor_file_called_checkpoint_is_not_the_checkpoints_own_factors(tmp_path):
    own, file = whose(), whose(config="runs/checkpoint.json")
    save(tmp_path, "ppl", [ppl(4096, 3.0) | own, ppl(4096, 2.0) | file])
    assert names_of(tmp_path) == ["own factors", "checkpoint"]
    save(tmp_path / "file", "ppl", [ppl(4096, 2.0) | file])
    assert names_of(tmp_path / "file") == ["base, checkpoint"]


words = st.sampled_from(["a", "b", "checkpoint", "yarn", None])
identities = st.builds(
    Identity, model=st.sampled_from(["m", "n"]), label=words, policy=st.sampled_from([None, "su"]),
    checkpoint=words, iteration=words, config=words,
)  # fmt: skip
entries = st.tuples(
    identities, st.sampled_from(["/x", "/x/a", "/x/b", "/x/a/c", "/y"]).map(Path),
    st.integers(0, 2), st.integers(0, 1).map(lambda value: {"value": value}),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(entries, min_size=1, max_size=12))
def test_every_series_has_a_name_of_its_own_and_no_cell_holds_two_values(records):
    owners = name_series(records)
    whose_name = {}
    for owner, (identity, *_) in zip(owners, records, strict=True):
        assert owner.identity == identity
        assert whose_name.setdefault(owner.name, owner) == owner
    values = {}
    for owner, (_, folder, cell, row) in zip(owners, records, strict=True):
        values.setdefault((owner.name, cell), {})[folder] = row["value"]
    assert all(len(set(found.values())) == 1 for found in values.values())


def test_thirty_series_look_different_and_baselines_as_everywhere():
    rows = [(Identity("m", f"l{i}", config="f"), Path("/x"), 0, {}) for i in range(30)]
    rows += [(Identity("m", "pi"), Path("/x"), 0, {})]
    styles = series_styles(name_series(rows))
    assert len({style[1:] for style in styles.values()}) == 31
    assert list(styles.values())[-1] == style_of("pi")


# Comparing


def test_protocols_and_strides_are_never_compared(tmp_path):
    save(tmp_path, "ppl", [
        ppl(4096, 3.0, "sliding", 256), ppl(4096, 3.1, "sliding", "disjoint"), ppl(4096, 3.2),
    ])  # fmt: skip
    found = tables(tmp_path)
    assert [(table.name, table.title.split("(")[1]) for table in found] == [
        ("perplexity", "truncated)"), ("perplexity_sliding", "sliding, stride 256)"),
        ("perplexity_sliding_2", "sliding, stride disjoint)"),
    ]  # fmt: skip


def test_windows_side_by_side_are_ranked_by_the_mean_over_tokens(tmp_path):
    """The last of them may hold a few tokens, which the mean over windows would overrate."""
    save(tmp_path, "ppl", [ppl(4096, 3.0, "sliding", "disjoint", ppl_token_weighted=2.5)])
    ((value,),) = tables(tmp_path)[0].rows.values()
    assert (value.text, value.rank, value.below) == ("2.50", 2.5, ("3.00",))


def test_one_stride_is_one_line_though_short_windows_leave_gaps(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0, "sampled", 8192), ppl(16384, 2.0, "sliding", 8192)])
    assert perplexities(tmp_path) == {"base": {"4k": 3.0, "16k": 2.0}}
    assert "(sampled and sliding, stride 8192)" in tables(tmp_path)[0].title


def test_needles_of_other_numbers_are_not_pooled(tmp_path):
    rows = [needle(4096, 1.0, task="multi_key", num_needles=n, nll=None) for n in (4, 8)]
    save(tmp_path, "needle", [*rows, needle(4096, 1.0, nll=None)])
    titles = [table.title.removeprefix("Needle retrieval, ") for table in tables(tmp_path)]
    assert titles == ["single", "multi key, 4 needles", "multi key, 8 needles"]


def test_no_row_leads_over_two_corpora_though_no_length_was_measured_on_both(tmp_path):
    far = {"sources": "books:20", "documents_sha256": "d1"}
    save(tmp_path / "far", "ppl", [ppl(524288, 6.2, **far), ppl(1048576, 6.3, **far)])
    save(tmp_path / "near", "ppl", [ppl(4096, 3.7), ppl(262144, 1.9)])
    found = [(table.title.split("(")[1], cells(table)["base"]) for table in tables(tmp_path)]
    assert found == [
        ("truncated, proof.jsonl:10)", {"4k": 3.7, "256k": 1.9}),
        ("truncated, books:20)", {"512k": 6.2, "1024k": 6.3}),
    ]


@pytest.mark.parametrize(
    ("one", "other", "parts"),
    [
        # A longer window chose other documents of one file.
        ({"documents_sha256": "a"}, {"documents_sha256": "b"}, 2),
        ({"sources": "here:10"}, {"sources": "/there:10"}, 1),  # the same ones
    ],
)
def test_documents_are_known_by_their_content(tmp_path, one, other, parts):
    save(tmp_path, "ppl", [ppl(4096, 3.0, **one), ppl(8192, 2.0, **other)])
    assert len(tables(tmp_path)) == parts


def test_every_corpus_of_every_tokenizer_has_a_table(tmp_path):
    save(tmp_path, "ppl", [
        ppl(length, 3.0, sources=f"{corpus}_{model}:9", documents_sha256=f"{corpus} {model}")
        | whose(model)
        for model in ("a", "b") for corpus, length in (("near", 4096), ("far", 524288))
    ])  # fmt: skip
    shown = [(table.title.split(", ")[1], list(table.rows)) for table in tables(tmp_path)]
    assert shown == [
        ("near_a:9)", ["a"]), ("near_b:9)", ["b"]), ("far_a:9)", ["a"]), ("far_b:9)", ["b"])
    ]  # fmt: skip


def test_passkey_trials_are_pooled_by_scoring_length_and_depth(tmp_path):
    rows = [passkey(4096, trial < 2, trial, depth) for depth in (0.0, 1.0) for trial in range(3)]
    rows += [passkey(4096, False, 7), passkey(4096, True, 0, 0.0, scoring="generate")]
    save(tmp_path, "passkey", rows)
    forced, generated = sections_of(read_measurements([tmp_path]))
    ((value,),) = forced.tables[0].rows.values()
    assert value.rank == 4 / 7 and value.below[0] == "4 of 7"
    assert value.below[-1] == f"loss {(4 * 0.1 + 3 * 2.0) / 7:.3g}"
    grid, bars = forced.figures  # trials on a grid, and those at random depths
    ((by_depth,), (by_length,)) = (grid.cells.values(), bars.bars.values())
    assert {key: (tally.hits, tally.trials) for key, tally in by_depth.items()} == {
        (4096, 0.0): (2, 3), (4096, 1.0): (2, 3)
    }  # fmt: skip
    assert by_length[4096].trials == 7 and generated.title == "Passkey retrieval, generate"


def test_an_interval_needs_trials_that_find_all_or_nothing():
    tally = Tally()
    tally.add(1.0, 0.5)
    tally.add(0.0, 0.7)
    assert tally.interval == wilson_interval(0.5, 2) and tally.nll == 0.6
    tally.add(0.5, math.nan)
    assert tally.interval is None and tally.share == 0.5
    assert math.isnan(tally.nll)  # a mean without the trials that were lost would flatter
    tally.add(0.5, None)
    assert tally.nll is None


def test_the_wilson_interval_matches_published_values():
    # 10 of 10 and 0 of 10: 1 / (1 + z^2 / 10) and its mirror image.
    assert wilson_interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(0.5, 100) == pytest.approx((0.403832, 0.596168), abs=1e-6)


# Tables


def table(best, **ranks):
    """One column."""
    rows = {name: [Value(f"{rank:g}", rank)] for name, rank in ranks.items()}
    return Table("t", "T", [Column("4k", "", best)], rows)


def test_the_best_is_finite_and_not_shared_by_all():
    def best(which, **ranks):
        return {name for name, _ in table(which, **ranks).best}

    assert best("lowest", a=2.0, b=3.0, c=2.0) == {"a", "c"}
    assert best("highest", a=2.0, b=3.0) == {"b"}
    assert best("highest", a=2.0, b=math.inf) == {"a"}
    assert best("lowest", a=2.0, b=2.0) == best("lowest", a=2.0) == best("", a=2.0, b=3.0) == set()


def test_a_table_is_one_for_terminal_and_csv():
    columns = [Column("4k", "1x", "lowest"), Column("8k", "2x", "lowest")]
    three, four = Value("3.00", 3.0, ("3.03",)), Value("4.00", 4.0, ("4.04",))
    both = Table("t", "Perplexity", columns, {"a": [three, None], "b": [four, None]})
    assert both.text(details=True).splitlines() == [
        "Perplexity", "     4k   8k", "------------", f"a  3.00*   {ABSENT}", "   3.03",
        f"b  4.00    {ABSENT}", "   4.04", "* lowest of its column",
    ]  # fmt: skip
    assert both.csv() == "model,column,value,details\na,4k 1x,3.0,3.03\nb,4k 1x,4.0,4.04\n"


def test_what_must_not_be_overlooked_stands_once_below_the_tables_of_its_section():
    two = [Table(name, name, [Column("4k")], {"a": [Value("1")]}) for name in ("first", "second")]
    assert Section("S", two, warnings=["mind this"]).text().count("mind this") == 1


def test_labels_move_apart_as_little_as_possible():
    assert spread_labels([], 0.1) == []
    assert spread_labels([0.2, 0.9, 0.5], 0.1) == pytest.approx([0.2, 0.9, 0.5])
    assert spread_labels([0.52, 0.5], 0.1) == pytest.approx([0.56, 0.46])
    assert spread_labels([1.0, 1.0, 0.0], 0.1) == pytest.approx([0.9, 1.0, 0.0])
    places = sorted(spread_labels([0.5, 0.5, 0.59, 0.7, 0.31], 0.1))
    assert all(b - a > 0.0999 for a, b in pairwise(places))


@pytest.mark.parametrize(
    ("row", "field", "value", "null"),
    [
        (ppl(4096, 3.0), "ppl_window_mean", math.nan, math.inf),
        (ppl(4096, 3.0), "nll_per_document", [1.0, math.nan], [1.0, math.inf]),
        (ppl(4096, 3.0), "nll_by_position", [{"nll": math.nan}], [{"nll": math.inf}]),
        (ppl(4096, 3.0), "ppl_window_mean_interval", [2.0, math.inf], [2.0, math.inf]),
        (needle(4096, 1.0), "nll", math.nan, None),
        (short("arc", 0.5), "value", -math.inf, math.nan),
    ],
)
def test_what_is_not_finite_is_the_same_number_once_recorded(tmp_path, row, field, value, null):
    """And null, in records of before, is what it was."""
    names = {"ppl_window_mean": "ppl", "recall": "needle", "value": "tasks"}
    kind = next(KINDS[name] for known, name in names.items() if known in row)
    path = tmp_path / f"{kind.name}.jsonl"
    records = Records(path, kind.cell_fields, kind.check)
    records.append(row | {field: value})
    (again,) = Records(path, kind.cell_fields, kind.check).rows
    assert repr(again[field]) == repr(records.rows[0][field]) == repr(value)
    path.write_text(re.sub('"(NaN|-?Infinity)"', "null", path.read_text()))
    ((_, old),) = read_measurements([tmp_path]).rows[kind.name]
    assert repr(old[field]) == repr(null)


@pytest.mark.parametrize("kind", ["short", "tasks"])
def test_a_benchmark_that_was_recorded_as_not_finite_is_shown_as_such(tmp_path, kind):
    records = Records(tmp_path / f"{kind}.jsonl", KINDS[kind].cell_fields, KINDS[kind].check)
    records.append(short("texts", math.inf, math.nan, metric="bits_per_byte"))
    ((value,),) = tables(tmp_path)[0].rows.values()
    assert value.text == "not finite"
    (section,) = KINDS[kind].sections_of(records.rows)  # as at the end of a command
    assert "not finite" in section.tables[0].text()
    assert write_report(tmp_path)[0].is_file()
