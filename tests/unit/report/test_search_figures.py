"""Figures of a search hold what its journal says, and leave out what it does not."""

import csv
import json
import math
from dataclasses import replace

import pytest
from strict_page import StrictPage

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.factor_search.journal import Evaluation, Journal, read_records
from megatron_longrope.factor_search.problem import make_problem
from megatron_longrope.report.search_figures import (
    draw_search,
    draw_search_figures,
    draw_start_tokens,
)
from megatron_longrope.report.search_history import (
    SearchHistory,
    StartTokenCurve,
    find_factor_sets,
    find_search_histories,
    reference_factors,
    start_token_curve,
)
from megatron_longrope.report.style import style_of

PROBLEM = make_problem(identity_config(10000.0, 16, 256), 2048)
PI, NTK, YARN = (PROBLEM.factor_set(item).rescale_factors for item in PROBLEM.seeds.values())
OTHER = (1.0, 1.1, 1.5, 2.5, 4.5, 8.0, 8.0, 9.0)


def record(index, score, factors=OTHER, start_tokens=0, nlls=None, stopped=None):
    nlls = ((math.log(score),) * 5 if math.isfinite(score) else ()) if nlls is None else nlls
    return Evaluation(factors, start_tokens, score, tuple(nlls), 1.0, index=index, stopped=stopped)


def save_config(path, factors=OTHER, **origin):
    sets = (FactorSet(256, (1.0,) * 8), FactorSet(2048, factors, 4, origin))
    LongRopeConfig(10000.0, 16, 256, sets).save(path)


def save_journal(path, records):
    settings = {"target_length": 2048, "data_sha256": "a", "checkpoint_sha256": "b"}
    with Journal(path, settings) as journal:
        for item in records:
            journal.append(item)


def draw(records, directory):
    """The files that are drawn of a search with these records."""
    factors, journal = directory / "eight.json", directory / "eight.journal.jsonl"
    save_config(factors)
    save_journal(journal, records)
    return draw_search_figures(factors, journal, 2048)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SEEDED = [
    record(0, 61.0, PI),
    record(1, 71.0, NTK),
    record(2, 43.0, YARN),
    record(3, 38.0, (*OTHER[:-1], 9.5), nlls=(3.6, 3.6), stopped="exact"),
    record(4, math.inf, (*OTHER[:-1], 9.6)),
    record(5, 39.0),
]


def test_every_figure_is_a_png_with_its_data(tmp_path):
    records = [*SEEDED, record(6, 38.5, start_tokens=4)]
    paths = draw(records, tmp_path)
    stems = ("search_progress", "rescale_factors", "start_tokens")
    assert [path.name for path in paths] == [
        f"eight_{stem}.{kind}" for stem in stems for kind in ("png", "csv")
    ]
    assert set(paths) == set((tmp_path / "eight_figures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[::2])


def test_progress_follows_the_order_of_asking_and_counts_complete_candidates_only(tmp_path):
    data = rows(draw(SEEDED[::-1], tmp_path)[1])
    assert [row["best_score"] for row in data] == ["61.0", "61.0", "43.0", "43.0", "43.0", "39.0"]
    assert [row["stopped"] for row in data] == ["", "", "", "exact", "", ""]
    assert [row["sample_forwards"] for row in data] == ["5", "10", "15", "17", "17", "22"]
    assert data[4]["score"] == ""


def test_factors_stand_against_the_published_methods(tmp_path):
    data = rows(draw(SEEDED, tmp_path)[3])
    ours = [float(row["rescale_factor"]) for row in data if row["method"] == "longrope"]
    assert ours == list(OTHER)
    assert {row["method"] for row in data} == {"pi", "ntk", "yarn", "longrope"}


def test_the_yarn_of_a_model_that_scales_rope_itself_is_the_one_that_was_searched():
    scaling = {"rope_type": "linear", "factor": 4.0}
    problem = make_problem(identity_config(10000.0, 16, 256, scaling), 2048)
    config = problem.config(problem.seeds["pi"])
    drawn = reference_factors(config, 2048)
    assert drawn["yarn"] == problem.references["yarn"].rescale_factors


def test_one_number_of_start_tokens_is_no_curve(tmp_path):
    assert not [path for path in draw(SEEDED, tmp_path) if "start_tokens" in path.name]


def test_without_a_complete_candidate_progress_is_not_drawn(tmp_path):
    paths = draw([record(0, math.inf), record(1, 5.0, stopped="budget")], tmp_path)
    assert [path.name for path in paths] == [
        "eight_rescale_factors.png",
        "eight_rescale_factors.csv",
    ]


def test_starting_points_without_a_finite_score_have_no_line():
    history = SearchHistory("x", SEEDED, {"pi": 3.0, "none": math.inf, "yarn": None})
    assert history.seeds == {"pi": 3.0}


@pytest.mark.parametrize(("objective", "label"), [("ppl", "Perplexity"), ("joint", "Score")])
def test_the_axis_says_what_a_search_minimized(objective, label, tmp_path):
    for name, pool in (("a", None), ("rotating", 8)):
        path = tmp_path / f"{name}.journal.jsonl"
        with Journal(path, {"objective": objective, "pool": pool}) as journal:
            journal.append(record(0, 3.0))
            journal.append(record(1, 4.0, start_tokens=4))
    (history,), (note,) = find_search_histories(tmp_path, set())
    assert "rotating.journal.jsonl was left out: its candidates were scored on different" in note
    for drawing in (draw_search([history]), draw_start_tokens([start_token_curve(history)])):
        assert f"<!-- {label} -->" in drawing.svg


def test_the_curve_compares_on_the_samples_that_all_share():
    records = [
        record(0, 1.0, PI, 0, (3.0, 3.2, 9.0, 9.0)),
        record(1, 1.0, PI, 4, (2.8, 3.0), "budget"),
        record(2, 1.0, PI, 16, (3.1, 3.3, 9.0), "exact"),
        record(3, math.inf, PI, 64, ()),  # failed: no point, and no reason to drop the others
    ]
    curve = start_token_curve(SearchHistory("x", records))
    assert (curve.factors, curve.is_best, curve.num_samples) == (PI, True, 2)
    assert curve.points == pytest.approx({0: math.exp(3.1), 4: math.exp(2.9), 16: math.exp(3.2)})


def test_the_curve_takes_the_factors_with_the_most_start_token_choices():
    few = [record(n, 9.0, PI, n) for n in (0, 1)]
    many = [record(10 + n, 10.0, OTHER, n, (2.3,)) for n in (0, 4, 8)]
    curve = start_token_curve(SearchHistory("x", [*few, *many]))
    assert curve.factors == OTHER and not curve.is_best


def test_a_promoted_candidate_keeps_its_larger_number_of_samples():
    records = [
        record(0, 9.0, PI, 0, (2.0,), "budget"),
        record(1, 9.0, PI, 4, (2.1, 2.2, 2.3)),
        record(2, 9.0, PI, 0, (2.0, 2.1, 2.2)),
    ]
    history = SearchHistory("x", records)
    assert start_token_curve(history).num_samples == 3
    assert history.sample_forwards == [1, 4, 6]


# Found in a folder


def history_of(name, scores, seeds):
    return SearchHistory(
        name, [Evaluation(OTHER, 0, score, index=i) for i, score in enumerate(scores)], seeds
    )


def test_factor_sets_are_found_once_and_broken_files_are_named(tmp_path):
    save_config(tmp_path / "b.json")
    (tmp_path / "deep").mkdir()
    save_config(tmp_path / "deep" / "copy.json")
    save_config(tmp_path / "deep" / "other.json", (*OTHER[:-1], 10.0))
    first = LongRopeConfig.load(tmp_path / "b.json")
    for name, changes in {
        "attention": {"attention_factor": 1.3},
        "base": {"rotary_base": 500000.0},
        "frequencies": {"base_frequencies": {"rope_type": "linear", "factor": 2.0}},
    }.items():
        replace(first, **changes).save(tmp_path / f"{name}.json")
    broken = json.loads((tmp_path / "b.json").read_text())
    broken["factor_sets"][1]["rescale_factors"][0] = -1.0
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    (tmp_path / "list.json").write_text("[1]")
    sets, notes = find_factor_sets(tmp_path, set())
    names = ["attention.json", "b.json", "base.json", "deep/other.json", "frequencies.json"]
    assert [(name, item.max_length) for name, _, item in sets] == [(name, 2048) for name in names]
    assert len(notes) == 1 and notes[0].startswith("broken.json was left out: factor_sets[1]")


def test_starting_points_are_those_of_the_factor_file_and_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "first.journal.jsonl"
    scores = {"pi": 61.0, "ntk": 71.2, "near-yarn": 42.9, "base": None}
    save_journal(path, SEEDED)
    with path.open("a") as file:
        file.write('[]\n{"score": "x", "rescale_factors": [1]}\n{"score": 3, "resc')
    (tmp_path / "empty.journal.jsonl").write_text("")
    ((history,), _) = find_search_histories(tmp_path, set())  # the search has not ended
    assert history.name == "first" and history.seeds == {}
    assert list(history.records) == SEEDED
    search = {"target_length": 2048, "data_sha256": "a", "checkpoint_sha256": "b"}
    save_config(tmp_path / "first.json", **search, seed_perplexity=scores)
    ((history,), _) = find_search_histories(tmp_path, set())
    assert history.seeds == {"pi": 61.0, "ntk": 71.2, "near-yarn": 42.9}
    # Of an earlier search whose journal was discarded.
    for key, value in {"target_length": 4096, "data_sha256": "c", "checkpoint_sha256": "d"}.items():
        earlier = {**search, key: value}
        save_config(tmp_path / "first.json", **earlier, seed_perplexity=scores)
        assert find_search_histories(tmp_path, set())[0][0].seeds == {}


def test_a_search_that_still_runs_has_a_page(tmp_path, capsys):
    with Journal(tmp_path / "first.journal.jsonl", {}) as journal:
        for item in SEEDED:
            journal.append(item)
        assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    progress = rows(tmp_path / "figures/search_progress.csv")
    assert [row["best_score"] for row in progress][-1] == "39.0"
    assert "figures/search_progress.png" in StrictPage((tmp_path / "report.html").read_text()).links


@pytest.mark.parametrize("scores", [(5.0,), (math.inf, 4.0), (9e9, 3.0, math.inf, 2.0)])
def test_a_short_or_wild_search_can_be_drawn(scores):
    assert draw_search([history_of("x", scores, {})]).png.startswith(b"\x89PNG")


def test_a_search_without_a_complete_candidate_has_no_history(tmp_path):
    save_journal(tmp_path / "x.journal.jsonl", [record(0, 5.0, stopped="budget")])
    assert len(read_records(tmp_path / "x.journal.jsonl")) == 1
    histories, notes = find_search_histories(tmp_path, set())
    assert histories == []
    assert notes == [
        "x.journal.jsonl was left out: no candidate has been scored on every sample yet"
    ]


@pytest.mark.parametrize(
    "points", [{0: 3.0, 1: 3.0}, {4: 2.0, 256: 9e5}, {0: 1.0, 20: 1.1, 24: 1.2, 28: 1.3, 32: 1.0}]
)
def test_flat_wild_and_crowded_start_token_curves_can_be_drawn(points):
    drawing = draw_start_tokens([StartTokenCurve("x", OTHER, True, 5, points)])
    assert drawing.png.startswith(b"\x89PNG") and "over 5 samples" in drawing.caption


def test_of_many_unpublished_starting_points_only_the_best_has_a_line():
    seeds = {f"cd{index}": 39.0 - index for index in range(30)} | {"near-pi": 8.0}
    svg = [draw_search([history_of("x", (5.0, 4.0), some)]).svg
           for some in (seeds, {"cd29": 10.0, "near-pi": 8.0})]  # fmt: skip
    assert svg[0] == svg[1]
    assert style_of("near-pi") == style_of("pi")._replace(label="near PI")


def test_a_search_whose_candidates_all_fit_the_frame_is_laid_out_without_a_warning(recwarn):
    draw_search([history_of(str(i), [3.0, 2.9, 2.8], {"pi": 3.0}) for i in range(5)])
    points = {0: 3.0, 1: 2.9, 2: 2.8, 256: 90.0}
    draw_start_tokens([StartTokenCurve("x", OTHER, False, 1, points)] * 5)
    assert not [item for item in recwarn if "layout" in str(item.message)]
