import argparse
import json

import pytest
from recipes import chain, tool

from megatron_longrope.cli import recipe as command
from megatron_longrope.recipe import fingerprint
from megatron_longrope.recipe.runner import run_recipe
from megatron_longrope.recipe.status import read_status
from megatron_longrope.recipe.survey import time_left

pytestmark = pytest.mark.slow  # starts processes

MEGATRON = (
    " [2026-11-24 12:00:00] iteration       20/     600 | consumed samples:          640 | "
    "elapsed time per iteration (ms): 3000.0 | learning rate: 1.0E-03 | lm loss: 7.642340E+00 |"
)


def states(recipe):
    return {line.stage: line.state for line in read_status(recipe).lines}


def longrope(*words):
    """What `longrope recipe ...` does; its exit code."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["recipe", *map(str, words)])
    return args.run(args)


def test_every_state_is_told_from_the_files(workshop):
    stages = {
        **chain(),
        "bad": tool("unless ${output}/part ${recipe}/allowed", reads=["${output}/second"]),
    }
    assert states(workshop.load(stages)) == {"one": "ready", "two": "waiting", "bad": "waiting"}
    assert not workshop.output.exists()
    run_recipe(workshop.load())
    assert states(workshop.load()) == {"one": "done", "two": "done", "bad": "failed"}
    (workshop.output / "first").write_text("changed by hand")
    assert states(workshop.load()) == {"one": "done", "two": "stale", "bad": "failed"}
    lines = read_status(workshop.load({**stages, **chain("y")})).lines
    assert [line.state for line in lines] == ["stale", "stale", "failed"]
    assert "append ${output}/first x became" in lines[0].note and lines[1].note == "after one"


def test_looking_writes_nothing(workshop):
    run_recipe(workshop.load(chain()))
    (workshop.output / "first").write_text("new content")
    before = {path: path.stat().st_mtime_ns for path in workshop.output.rglob("*")}
    read_status(workshop.load())
    assert {path: path.stat().st_mtime_ns for path in workshop.output.rglob("*")} == before


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        (f"{MEGATRON}\nsome warning\n", "iteration 20/600, lm loss 7.642, about 29 min left"),
        ("ppl: 3/322 windows, 12 s, about 20 min left; base\nnoise\n",
         "ppl: 3/322 windows, 12 s, about 20 min left; base"),
        ("first\n\nlast words\n", "last words"),
    ],
)  # fmt: skip
def test_the_last_line_of_progress_is_told(workshop, printed, told):
    stages = {"bad": tool("unless ${output}/part ${recipe}/allowed")}
    run_recipe(workshop.load(stages))
    with (workshop.output / "logs/bad.log").open("a") as log:
        log.write(printed)
    assert read_status(workshop.load()).lines[0].note == told


def test_the_time_left_follows_the_pace_so_far(workshop):
    stages = {name: {"run": "true", "minutes": "10"} for name in "abc"}
    stages = workshop.load(stages).stages
    assert time_left(stages, {}, set()) == 1800
    assert time_left(stages, {"a": 300.0}, {"a"}) == 600  # twice as fast as expected
    assert time_left(stages, {"a": 300.0, "b": 200.0}, {"a"}) == 400
    assert time_left(stages, {"a": 300.0, "b": 999.0}, {"a"}) == 300


def test_status_is_a_table_or_json(workshop, capsys):
    run_recipe(workshop.load(chain(), about="Two steps."))
    capsys.readouterr()
    flags = (workshop.path, "--output", workshop.output)
    longrope("status", *flags)
    said = capsys.readouterr().out
    assert said.startswith("Two steps.\n\nstage  state") and "2 of 2 stages done" in said
    longrope("status", *flags, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [stage["state"] for stage in found["stages"]] == ["done", "done"]
    assert found["seconds"] > 0 and found["seconds_left"] == 0 and found["running"] is None


def test_the_command_line_chooses_profiles_values_stages_and_jobs(workshop, capsys):
    workshop.write(
        {**chain("${text}"), "other": {"run": "false"}},
        values={"text": "x"},
        profiles={"loud": {"text": "y"}},
    )
    flags = (workshop.path, "--output", workshop.output, "--profile", "loud,loud")
    assert longrope("run", *flags, "--dry-run") is None
    assert longrope("run", *flags, "--until", "two", "--jobs", "2") == 0
    assert workshop.text("second") == "Y"
    assert longrope("run", *flags, "--set", "text=a b", "--again", "one") == 1  # other fails
    assert workshop.text("first") == "a b"
    with pytest.raises(SystemExit):
        longrope("run", *flags, "--set", "text")
    assert "'text' is not NAME=VALUE" in capsys.readouterr().err


def test_inputs_of_stages_that_never_ran_are_not_read(workshop, monkeypatch):
    (workshop.folder / "large").write_text("x")
    recipe = workshop.load({"a": {"run": "true", "reads": ["${recipe}/large"]}})
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: pytest.fail(f"{path} was read"))
    assert read_status(recipe).lines[0].state == "ready"
