"""Records of several models are read once, told apart, and compared only where that is fair."""

import math
from pathlib import Path

import pytest
from evaluated import needle, passkey, ppl, save, short, whose
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.statistics import wilson_interval
from megatron_longrope.report.comparison import (
    Tally,
    benchmark_table,
    best_of,
    needle_groups,
    passkey_groups,
    perplexity_groups,
)
from megatron_longrope.report.naming import Identity, name_subjects, subject_styles
from megatron_longrope.report.reading import read_measurements
from megatron_longrope.report.report import write_report
from megatron_longrope.report.style import METHODS


def refusal(*directories) -> str:
    with pytest.raises(ValueError) as caught:
        read_measurements(directories)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names_of(*directories) -> list[str]:
    return [subject.name for subject in read_measurements(directories).subjects]


def perplexities(*directories) -> dict[str, dict[int, float]]:
    """Of the only group."""
    (group,) = perplexity_groups(read_measurements(directories))
    return {subject.name: row for subject, row in group.values().items()}


# Reading


def test_records_are_found_at_any_depth_and_read_once(tmp_path):
    save(tmp_path / "a" / "deep" / "er", "ppl", [ppl(4096, 3.0)])
    save(tmp_path / "a", "short", [short("arc", 0.5)])
    save(tmp_path / "a" / ".hidden", "ppl", [ppl(4096, 9.0)])
    found = read_measurements([tmp_path, tmp_path / "a", tmp_path / "a" / "deep"])
    assert {kind: len(rows) for kind, rows in found.rows.items() if rows} == {"ppl": 1, "short": 1}
    assert len(found.subjects) == 1 and found.original_length == 4096


def test_the_last_record_of_a_cell_wins(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 9.0), ppl(8192, 4.0), ppl(4096, 3.0, sha256="other")])
    assert perplexities(tmp_path) == {"base": {4096: 3.0, 8192: 4.0}}


@pytest.mark.parametrize(
    "tail", ['{"length": 8192, "proto', "\n \n{", b"\xff\xfe".decode("latin-1")]
)
def test_what_a_crash_left_of_the_last_line_is_passed_over(tmp_path, tail):
    path = save(tmp_path, "ppl", [ppl(4096, 3.0)], tail)
    before = path.read_bytes()
    assert perplexities(tmp_path) == {"base": {4096: 3.0}}
    assert path.read_bytes() == before  # a report changes nothing it reads


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    path = save(tmp_path, "ppl", [ppl(4096, 3.0)], '{"length": 8192, "proto\n')
    with path.open("a") as file:
        file.write("\n")
    assert "ppl.jsonl, line 2: not JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("ppl", [1], "a record must be a JSON object, got list"),
        ("ppl", {"length": 4096}, "lacks 'protocol'; measure again with `longrope eval ppl`"),
        ("ppl", ppl(4096, 3.0) | {"length": "4k"}, "length is '4k'; it must be a positive integer"),
        ("ppl", ppl(4096, 3.0, ppl_window_mean=-1), "ppl_window_mean is -1"),
        ("ppl", ppl(4096, 3.0, nll_by_position=[3]), "nll_by_position is [3]"),
        ("ppl", ppl(4096, 3.0, original_length=0), "original_length is 0"),
        ("passkey", passkey(4096, 1), "correct is 1; it must be true or false"),
        ("passkey", passkey(4096, True, requested=2), "requested_depth is 2"),
        ("needle", needle(4096, 1.5), "recall is 1.5; it must be a number from 0 to 1"),
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
    assert "empty has no results.json" in refusal(tmp_path / "good", tmp_path / "empty")


def test_curated_numbers_stand_for_the_directorys_own_records(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(
        '{"original_length": 256, "perplexity": {"pi": {"512": 7.0}}, "passkey": {"512": 0.5},'
        ' "passkey_trials": 4, "attention_factor_policy": {"pi": {"512": "su"}}}'
    )
    save(tmp_path / "run" / "deep", "ppl", [ppl(512, 1.0)])
    save(tmp_path / "run" / "deep", "passkey", [passkey(512, True)])
    save(tmp_path / "run" / "deep", "short", [short("arc", 0.5)])
    found = read_measurements([tmp_path / "run"])
    (group,) = perplexity_groups(found)
    assert group.protocol == "results.json"
    assert {s.identity.label: row for s, row in group.values().items()} == {"pi": {512: 7.0}}
    ((tally,),) = [row.values() for row in passkey_groups(found)[0].by_length.values()]
    assert (tally.share, tally.trials) == (0.5, 4)
    assert len(found.of("short")) == 1


def shown_in(directory, kind):
    """Every value of a report's tables, with the name of its table or column."""
    found = read_measurements([directory])
    if kind == "short":
        _, rows = benchmark_table(found)
        return [(column.detail, row["value"]) for by in rows.values() for column, row in by.items()]
    if kind == "ppl":
        return [(group.detail, value) for group in perplexity_groups(found)
                for row in group.values().values() for value in row.values()]  # fmt: skip
    groups = {"passkey": passkey_groups, "needle": needle_groups}[kind](found)
    return [(group.kind, tally.share, tally.trials) for group in groups
            for row in group.by_length.values() for tally in row.values()]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rows", "shown"),
    [
        ("ppl", [ppl(4096, 3.0), ppl(4096, 2.0, documents_sha256="changed under one path")],
         [("documents d0", 3.0), ("documents changed ", 2.0)]),
        ("ppl", [ppl(4096, 3.0, label="pi", policy="su", config_sha256=f"{n}", original_length=n)
                 for n in (1024, 2048)],
         [("original length 1024", 3.0), ("original length 2048", 3.0)]),
        ("passkey", [passkey(4096, True), passkey(4096, False, tokenizer_sha256="another")],
         [("teacher-forced, tokenizer t0", 1.0, 1), ("teacher-forced, tokenizer another", 0.0, 1)]),
        ("needle", [needle(4096, 1.0), needle(4096, 0.0, document_sha256="another")],
         [("single", 0.5, 2)]),
        ("needle", [needle(4096, 1.0), needle(4096, 0.0, tokenizer_sha256="another")],
         [("single, tokenizer t0", 1.0, 1), ("single, tokenizer another", 0.0, 1)]),
        ("short", [short("arc", 0.5), short("arc", 0.4, seed=7)],
         [("seed 1234", 0.5), ("seed 7", 0.4)]),
        ("short", [short("arc", 0.5), short("arc", 0.4, limit=20)],
         [("no limit", 0.5), ("limit 20", 0.4)]),
        ("short", [short("arc", 0.5), short("arc", 0.4, metric="acc")], [("", 0.5), ("", 0.4)]),
    ],
)  # fmt: skip
def test_the_report_shows_every_cell_that_the_recorder_keeps(tmp_path, kind, rows, shown):
    records = Records(tmp_path / f"{kind}.jsonl", KINDS[kind].cell_fields)
    for row in rows:
        assert records.find(row) is None
        records.append(row)
    assert len(records.rows) == len(read_measurements([tmp_path]).of(kind)) == len(rows)
    assert shown_in(tmp_path, kind) == shown


def test_another_tokenizer_of_another_model_splits_nothing(tmp_path):
    save(tmp_path, "passkey", [
        passkey(4096, True, tokenizer_sha256=model) | whose(model) for model in ("a", "b")
    ])  # fmt: skip
    assert [kind for kind, *_ in shown_in(tmp_path, "passkey")] == ["teacher-forced"] * 2


# Names


def test_names_hold_only_what_tells_the_subjects_apart(tmp_path):
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
    assert perplexities(tmp_path) == {"base, YaRN": {4096: 3.0, 8192: 3.0}}


def test_models_of_one_label_in_two_directories_are_told_apart_by_them(tmp_path):
    for folder, value in (("first", 3.0), ("second", 4.0)):
        save(tmp_path / folder / "eval", "ppl", [ppl(4096, value)])
        save(tmp_path / folder / "more", "passkey", [passkey(4096, value > 3)])
    expected = {"base (first)": {4096: 3.0}, "base (second)": {4096: 4.0}}
    assert perplexities(tmp_path) == expected
    assert perplexities(tmp_path / "first", tmp_path / "second") == expected
    assert names_of(tmp_path) == ["base (first)", "base (second)"]


def test_parts_of_one_evaluation_in_two_directories_belong_together(tmp_path):
    save(tmp_path / "a", "ppl", [ppl(4096, 3.0)])
    save(tmp_path / "b", "ppl", [ppl(8192, 4.0)])
    save(tmp_path / "c", "ppl", [ppl(8192, 4.0)])  # a copy
    assert perplexities(tmp_path) == {"base": {4096: 3.0, 8192: 4.0}}


def test_one_factor_file_under_two_paths_is_one_subject(tmp_path):
    rows = [whose(label="s", config=path) | {"config_sha256": "ab"} for path in ("s", "./s")]
    save(tmp_path, "ppl", [ppl(n, 3.0) | row for n, row in zip((4096, 8192), rows, strict=True)])
    assert perplexities(tmp_path) == {"base, s": {4096: 3.0, 8192: 3.0}}


def test_checkpoints_of_one_label_are_told_apart_by_iteration_or_factors(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0, iteration=n) for n in (100, 200)])
    assert names_of(tmp_path) == ["base (iteration 100)", "base (iteration 200)"]
    save(tmp_path / "b", "ppl", [
        ppl(4096, 3.0, label="s", config="s.json", config_sha256=sha * 8) for sha in ("ab", "cd")
    ])  # fmt: skip
    assert names_of(tmp_path / "b") == ["base, s (factors abababab)", "base, s (factors cdcdcdcd)"]


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
def test_every_subject_has_a_name_of_its_own_and_no_cell_holds_two_values(records):
    owners = name_subjects(records)
    whose_name = {}
    for owner, (identity, *_) in zip(owners, records, strict=True):
        assert owner.identity == identity
        assert whose_name.setdefault(owner.name, owner) == owner
    values = {}
    for owner, (_, folder, cell, row) in zip(owners, records, strict=True):
        values.setdefault((owner.name, cell), {})[folder] = row["value"]
    assert all(len(set(found.values())) == 1 for found in values.values())


def test_thirty_subjects_look_different_and_baselines_as_everywhere():
    rows = [(Identity("m", f"l{i}", config="f"), Path("/x"), 0, {}) for i in range(30)]
    rows += [(Identity("m", "pi"), Path("/x"), 0, {})]
    styles = subject_styles(name_subjects(rows))
    assert len({style[1:] for style in styles.values()}) == 31
    assert list(styles.values())[-1] == METHODS["pi"]


# Comparing


def test_protocols_and_strides_are_never_compared(tmp_path):
    save(tmp_path, "ppl", [
        ppl(4096, 3.0, "sliding", 256), ppl(4096, 3.1, "sliding", "disjoint"), ppl(4096, 3.2),
    ])  # fmt: skip
    groups = perplexity_groups(read_measurements([tmp_path]))
    assert [(group.protocol, group.detail) for group in groups] == [
        ("truncated", ""), ("sliding", "stride 256"), ("sliding", "stride disjoint")
    ]  # fmt: skip
    assert [group.name for group in groups] == [
        "perplexity", "perplexity_sliding", "perplexity_sliding_2",
    ]  # fmt: skip


def test_one_stride_is_one_line_though_short_windows_leave_gaps(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0, "sampled", 8192), ppl(16384, 2.0, "sliding", 8192)])
    (group,) = perplexity_groups(read_measurements([tmp_path]))
    assert group.protocol == "sampled and sliding" and group.lengths == [4096, 16384]


def test_needles_of_other_numbers_are_not_pooled(tmp_path):
    rows = [needle(4096, 1.0, task="multi_key", num_needles=n) for n in (4, 8)]
    save(tmp_path, "needle", [*rows, needle(4096, 1.0)])
    kinds = [group.kind for group in needle_groups(read_measurements([tmp_path]))]
    assert kinds == ["single", "multi_key, 4 needles", "multi_key, 8 needles"]


def test_two_sources_of_one_model_are_two_groups(tmp_path):
    save(tmp_path / "pg19", "ppl", [ppl(4096, 3.0, sources="pg19", documents_sha256="a")])
    save(tmp_path / "proof", "ppl", [ppl(4096, 2.0, sources="proof", documents_sha256="b")])
    groups = perplexity_groups(read_measurements([tmp_path]))
    assert [(group.detail, list(group.values().values())) for group in groups] == [
        ("pg19", [{4096: 3.0}]), ("proof", [{4096: 2.0}])
    ]  # fmt: skip


def test_lines_measured_on_other_tokens_are_warned_of(tmp_path):
    save(tmp_path, "ppl", [
        row | whose(model)
        for model, tokens in (("a", "x"), ("b", "y"))
        for row in (ppl(4096, 3.0), ppl(8192, 3.0, tokens=tokens))
    ])  # fmt: skip
    (group,) = perplexity_groups(read_measurements([tmp_path]))
    assert group.apart == [8192] and "at 8k (their sha256 differ)" in group.warning


def test_passkey_trials_are_pooled_by_scoring_length_and_depth(tmp_path):
    rows = [passkey(4096, trial < 2, trial, depth) for depth in (0.0, 1.0) for trial in range(3)]
    rows += [passkey(4096, False, 7), passkey(4096, True, 0, 0.0, scoring="generate")]
    save(tmp_path, "passkey", rows)
    forced, generated = passkey_groups(read_measurements([tmp_path]))
    (by_length,), (grid,) = forced.by_length.values(), forced.by_depth.values()
    assert by_length[4096].hits == 4 and by_length[4096].trials == 7
    assert by_length[4096].nll == pytest.approx((4 * 0.1 + 3 * 2.0) / 7)
    assert {key: (tally.hits, tally.trials) for key, tally in grid.items()} == {
        (4096, 0.0): (2, 3), (4096, 1.0): (2, 3)
    }  # fmt: skip
    assert len(forced.scattered) == 1 and generated.kind == "generate"


def test_an_interval_needs_trials_that_find_all_or_nothing():
    tally = Tally()
    tally.add(1.0, 0.5)
    tally.add(0.0, math.nan)
    assert tally.interval == wilson_interval(0.5, 2) and tally.nll == 0.5
    tally.add(0.5, None)
    assert tally.interval is None and tally.share == 0.5
    assert Tally(0.25, None).share == 0.25 and Tally(0.25, None).interval is None


def test_benchmarks_with_other_shots_are_other_columns(tmp_path):
    save(tmp_path, "short", [short("arc", 0.5), short("arc", 0.4, num_fewshot=0)])
    columns, rows = benchmark_table(read_measurements([tmp_path]))
    assert [(column.task, column.num_fewshot) for column in columns] == [("arc", 10), ("arc", 0)]
    assert [row["value"] for row in next(iter(rows.values())).values()] == [0.5, 0.4]


def test_the_best_is_finite_and_not_shared_by_all():
    assert best_of({"a": 2.0, "b": 3.0, "c": 2.0}, lowest=True) == {"a", "c"}
    assert best_of({"a": 2.0, "b": 3.0}, lowest=False) == {"b"}
    assert best_of({"a": 2.0, "b": 2.0}, lowest=True) == set()
    assert best_of({"a": 2.0}, lowest=True) == set()
    assert best_of({"a": 2.0, "b": math.inf}, lowest=False) == {"a"}


def test_a_perplexity_that_was_recorded_as_not_finite_is_infinite_in_the_report(tmp_path):
    """`longrope eval` writes null for it: JSON has no word for infinity."""
    lost = ppl(16384, 3.0) | {"ppl_window_mean": math.inf, "ppl_token_weighted": math.nan}
    lost["nll_by_position"][0]["nll"] = math.nan
    records = Records(tmp_path / "ppl.jsonl", ("length",))
    for row in (ppl(4096, 3.0), lost):
        records.append(row)
    assert '"ppl_window_mean": null' in records.path.read_text()
    assert perplexities(tmp_path) == {"base": {4096: 3.0, 16384: math.inf}}
    assert write_report(tmp_path).is_file()
