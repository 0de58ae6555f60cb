"""The search benchmark at a tiny size: its result, its resumption, and what its curves tell."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import launching
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from search_curves import ArmRun, draw_curves, forwards_to_reach, summarise, value_at

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def model(untied_gqa, data, tmp_path):
    """A directory as the quickstart leaves it, with a model that has learned nothing."""
    shutil.copytree(untied_gqa.path, tmp_path / "model/checkpoints/base")
    shutil.copytree(Path(data["search"]).parent, tmp_path / "model/data")
    return tmp_path / "model"


def run(*options):
    done = launching.python(BENCHMARKS / "search.py", "--quick", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def result_of(*options):
    return json.loads(run(*options).stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.release  # it starts the benchmark four times
@pytest.mark.usefixtures("benchmark_results_stay")
def test_the_search_benchmark_ends_with_its_result_however_it_is_split(model, tmp_path):
    half = ("--model", model, "--budget", 48, "--budget-fraction", 1)
    small = (*half, "--arms", "released,evolution")
    result = result_of(*small, "--output", tmp_path / "whole")
    assert result["benchmark"] == "search"
    assert result["ratio"] is None or 0 < result["ratio"] <= 1
    released, evolution = result["rows"]
    assert (released["arm"], released["forwards"], released["evaluations"]) == (
        "released",
        [48],
        [24],
    )
    assert released["ratio_search"] <= 1 and released["ratio_held_out"] <= 1
    assert evolution["forwards"] == [48]
    assert result["orientation"].keys() == {"pi", "ntk", "yarn", "released_seed"}

    # Half of the budget first, then one arm after the other, then all of it: the same result.
    split = ("--output", tmp_path / "split")
    run(*small[:2], "--budget", 24, "--arms", "released", *split)
    run(*half, "--arms", "evolution", *split)
    again = result_of(*small, *split)
    assert again["rows"] == result["rows"]
    for name in ("released-0.jsonl", "evolution-0.jsonl"):
        runs = [tmp_path / way / "quick" / name for way in ("whole", "split")]
        scores = [
            [json.loads(line).get("score") for line in path.read_text().splitlines()]
            for path in runs
        ]
        assert scores[0] == scores[1] and len(scores[0]) == 1 + 24


def test_a_quick_run_without_a_model_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search.py", "--quick"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(BENCHMARKS / "search.py"), run_name="__main__")
    assert "--quick needs --model DIR" in capsys.readouterr().err


@pytest.mark.usefixtures("benchmark_results_stay")
def test_scores_of_other_settings_are_refused_in_one_sentence_until_they_are_overwritten(
    model, tmp_path, monkeypatch, capsys
):
    scores = tmp_path / "out/quick/cma-0.jsonl"
    scores.parent.mkdir(parents=True)
    scores.write_text('{"journal": 3, "settings": {"operators": "of an earlier version"}}\n')

    def start(*more):
        words = ["--quick", "--model", model, "--output", tmp_path / "out", "--arms", "cma",
                 "--budget", 48, "--threads", torch.get_num_threads(), *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        runpy.run_path(str(BENCHMARKS / "search.py"), run_name="__main__")

    with pytest.raises(SystemExit) as refused:
        start()
    sentence = f"search benchmark: {scores} was written with other settings: "
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).endswith("discard the journal with --overwrite")
    start("--overwrite")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["arm"] == "cma"
    assert "earlier version" not in scores.read_text()


def arm_run(arm, seed, *held_out, search=((5, 30.0),)):
    return ArmRun(arm, seed, list(search), list(held_out), forwards=held_out[-1][0])


def test_a_target_that_is_touched_and_left_again_is_not_reached_yet():
    curve = [(5, 30.0), (10, 20.0), (20, 25.0), (40, 19.0), (80, 18.0)]
    assert forwards_to_reach(curve, 20.0) == 40
    assert forwards_to_reach(curve, 25.0) == 10
    assert forwards_to_reach(curve, 30.0) == 5
    assert forwards_to_reach(curve, 17.0) == math.inf


def test_a_curve_holds_its_value_until_the_next_point():
    curve = [(5, 30.0), (10, 20.0)]
    assert [value_at(curve, n) for n in (4, 5, 9, 10, 99)] == [None, 30.0, 30.0, 20.0, 20.0]


def test_the_ratio_is_the_best_arms_median_over_what_the_released_operators_spent():
    finished = [
        arm_run("released", 0, (5, 30.0), (100, 20.0)),
        arm_run("released", 1, (5, 30.0), (100, 22.0)),
        arm_run("released", 2, (5, 30.0), (100, 26.0)),
        arm_run("ours", 0, (5, 30.0), (10, 21.0)),
        arm_run("ours", 1, (5, 30.0), (20, 21.0)),
        arm_run("ours", 2, (5, 30.0), (40, 29.0)),
        arm_run("worse", 0, (5, 30.0), (60, 21.0)),
    ]
    summary = summarise(finished, "released")
    assert summary["target_held_out_perplexity"] == 22.0
    assert summary["baseline_forwards"] == 100
    assert summary["ratio"] == 0.2
    rows = {row["arm"]: row for row in summary["rows"]}
    assert rows["ours"]["forwards_to_reach_held_out_by_seed"] == [10, 20, None]
    assert rows["worse"]["ratio_held_out"] == 0.6


def test_nothing_reached_and_nothing_to_reach_have_no_ratio():
    released = arm_run("released", 0, (5, 30.0), (100, 20.0))
    ours = arm_run("ours", 0, (5, 30.0), (100, 21.0))
    assert summarise([released, ours], "released")["ratio"] is None
    assert summarise([ours], "released")["ratio"] is None


def test_the_figure_comes_with_the_points_behind_it():
    finished = [
        arm_run(arm, seed, (5, 30.0 + seed), (100, 20.0 + seed))
        for arm in ("released", "evolution", "cma")
        for seed in (0, 1)
    ]
    drawing = draw_curves(finished, yarn=40.0)
    assert drawing.png.startswith(b"\x89PNG")
    lines = drawing.csv.splitlines()
    assert lines[0] == "arm,seed,text,sample_forwards,perplexity"
    assert "cma,1,held_out,100,21.0" in lines and "released,0,search,5,30.0" in lines
