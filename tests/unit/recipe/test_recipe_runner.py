import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from recipes import chain, in_a_process, tool, wait_for

from megatron_longrope.recipe import fingerprint, launch, lock
from megatron_longrope.recipe.lock import held
from megatron_longrope.recipe.runner import run_recipe, show_commands
from megatron_longrope.recipe.state import Records

pytestmark = pytest.mark.slow  # starts processes


def state(workshop, name):
    return json.loads(workshop.text(f".recipe/stages/{name}.json"))


def test_stages_run_in_the_order_of_their_files_and_only_once(workshop, capsys):
    assert run_recipe(workshop.load(chain())) == 0
    assert workshop.text("second") == "X"
    assert run_recipe(workshop.load(chain())) == 0
    assert workshop.text("first") == "x"
    said = capsys.readouterr().out
    assert said.count("done before") == 2 and "[1/2] one: done before" in said
    saved = state(workshop, "one")
    assert saved["finished"] and saved["seconds"] > 0 and saved["exit_code"] == 0
    assert saved["attempts"] == saved["commands_done"] == 1


def test_a_finished_recipe_of_twelve_stages_is_checked_without_reading_a_file(
    workshop, monkeypatch
):
    stages = {"s0": tool("append ${output}/f0 x", writes=["${output}/f0"])}
    for n in range(1, 12):
        stages[f"s{n}"] = tool(
            f"upper ${{output}}/f{n} ${{output}}/f{n - 1}",
            reads=[f"${{output}}/f{n - 1}", "${recipe}/tool.py"],
            writes=[f"${{output}}/f{n}"],
        )
    assert run_recipe(workshop.load(stages)) == 0
    read = []
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: read.append(path))
    assert run_recipe(workshop.load()) == 0
    assert read == []


def test_a_changed_flag_moves_the_outputs_away_and_is_named(workshop, capsys):
    run_recipe(workshop.load(chain("x")))
    capsys.readouterr()
    run_recipe(workshop.load(chain("y")))
    said = capsys.readouterr().out
    assert "one starts clean: append ${output}/first x became append ${output}/first y" in (
        said.replace("python ${recipe}/tool.py ", "")
    )
    assert "two starts clean: ${output}/first has another content" in said
    assert workshop.text("first") == "y" and workshop.text("second") == "Y"
    (stale,) = (workshop.output / "stale").glob("one-*")
    assert (stale / "first").read_text() == "x" and f"is in {stale}" in said


def test_what_is_made_again_with_the_same_content_changes_nothing_behind_it(workshop, capsys):
    run_recipe(workshop.load(chain()))
    (workshop.output / "first").unlink()
    capsys.readouterr()
    run_recipe(workshop.load())
    said = capsys.readouterr().out
    assert "one starts clean: " in said and "first is missing" in said
    assert "two: done before" in said


def test_changing_how_it_is_computed_runs_nothing_again(workshop, capsys):
    stages = chain()
    run_recipe(workshop.load(stages))
    stages["one"] |= {"how": ["--workers 7"], "environment": {"A": "b"}, "minutes": "9"}
    run_recipe(workshop.load(stages))
    assert capsys.readouterr().out.count("done before") == 2


def test_outputs_of_unknown_origin_are_moved_away_and_not_deleted(workshop, capsys):
    workshop.output.mkdir()
    (workshop.output / "first").write_text("precious")
    run_recipe(workshop.load(chain()))
    assert workshop.text("first") == "x"
    (stale,) = (workshop.output / "stale").rglob("first")
    assert stale.read_text() == "precious"
    assert "nothing says how its outputs were made" in capsys.readouterr().out


def test_intermediate_saves_of_a_checkpoint_do_not_matter(workshop, capsys):
    stages = {
        "train": {
            "commands": [
                tool("save ${output}/ckpt 200 a"),
                tool("save ${output}/ckpt 400 b"),
            ],
            "writes": ["${output}/ckpt"],
        },
        "use": tool(
            "upper ${output}/used ${output}/ckpt/iter_0000400/weights",
            reads=["${output}/ckpt"],
            writes=["${output}/used"],
        ),
    }
    run_recipe(workshop.load(stages))
    (workshop.output / "ckpt/iter_0000200/weights").write_text("thrown away")
    run_recipe(workshop.load())
    assert capsys.readouterr().out.count("done before") == 2


def test_an_interrupted_stage_goes_on_with_its_command_and_keeps_its_partial_output(
    workshop, capsys
):
    stages = {
        "a": {
            "commands": [
                tool("append ${output}/before x"),
                tool("unless ${output}/part ${recipe}/allowed"),
            ],
            "writes": ["${output}/before", "${output}/part"],
        }
    }
    assert run_recipe(workshop.load(stages)) == 1
    said = capsys.readouterr()
    assert "stage a failed with exit code 3; its log is" in said.err
    assert "logs/a.log" in said.err and "what went wrong" in said.err
    assert state(workshop, "a")["exit_code"] == 3
    (workshop.folder / "allowed").touch()
    assert run_recipe(workshop.load()) == 0
    assert "a goes on: it failed with exit code 3" in capsys.readouterr().out
    assert workshop.text("part") == "zz" and workshop.text("before") == "x"


def test_a_failed_command_is_tried_again_as_often_as_its_retries(workshop, capsys):
    stages = {"a": tool("unless ${output}/part ${recipe}/no", retries="2")}
    assert run_recipe(workshop.load(stages)) == 1
    assert workshop.text("part") == "zzz"
    assert "again (2 of 2)" in capsys.readouterr().out


def test_a_stage_that_does_not_write_its_output_fails(workshop, capsys):
    stages = {"a": tool("append ${output}/x x", writes=["${output}/y"])}
    assert run_recipe(workshop.load(stages)) == 1
    assert "stage a ended without its output" in capsys.readouterr().err
    assert not state(workshop, "a")["finished"]


def test_an_input_that_a_finished_stage_did_not_leave_is_named(workshop, capsys):
    stages = {
        "folder": tool("save ${output}/ckpt 1 a", writes=["${output}/ckpt"]),
        "reader": {"run": "true", "reads": ["${output}/ckpt/nothing"]},
    }
    assert run_recipe(workshop.load(stages)) == 1
    assert "stage reader reads" in (said := capsys.readouterr().err)
    assert "ckpt/nothing, which is not there" in said


def test_all_missing_inputs_are_listed_before_anything_runs(workshop):
    stages = {
        **chain(),
        "a": {"run": "true", "reads": ["no/where", "no/thing"], "requires": ["no/script"]},
        "b": {"run": "true", "reads": ["no/one"]},
    }
    with pytest.raises(ValueError, match=r"a needs no/where, no/thing, no/script; b needs no/one"):
        run_recipe(workshop.load(stages))
    assert not workshop.output.exists()
    assert run_recipe(workshop.load(stages), until="two") == 0


def test_a_stage_can_be_run_again_with_all_that_reads_it(workshop, capsys):
    stages = {**chain(), "other": tool("append ${output}/other x", writes=["${output}/other"])}
    run_recipe(workshop.load(stages))
    capsys.readouterr()
    assert run_recipe(workshop.load(), again="one") == 0
    said = capsys.readouterr().out
    assert "one starts clean: asked for" in said and "two starts clean: asked for" in said
    assert "other: done before" in said and workshop.text("first") == "x"
    with pytest.raises(ValueError, match="--again other is not needed --until two"):
        run_recipe(workshop.load(), until="two", again="other")


def test_a_dry_run_tells_what_would_happen_and_why_and_starts_nothing(workshop, capsys):
    show_commands(workshop.load(chain()))
    said = capsys.readouterr().out
    assert "[1/2] one: to do\n" in said and "[2/2] two: to do, after one" in said
    assert "  $ python" in said and not workshop.output.exists()
    run_recipe(workshop.load())
    capsys.readouterr()
    show_commands(workshop.load(chain("y")))
    said = capsys.readouterr().out
    assert "one: to do, python ${recipe}/tool.py append ${output}/first x became" in said
    assert "two: to do, if what it reads changes, after one" in said
    show_commands(workshop.load(), again="one")
    assert "two: to do, asked for" in capsys.readouterr().out


def test_only_chosen_lines_are_shown_and_the_log_has_all(workshop, capsys):
    code = "print('loss 1'); print('noise'); print('loss 2')"
    run_recipe(workshop.load({"a": {"run": "python -c", "args": [f'"{code}"'], "show": "^loss"}}))
    said = capsys.readouterr().out
    assert "  loss 1\n  loss 2\n" in said and "  noise\n" not in said
    assert said.count("$ python") == 1
    log = workshop.text("logs/a.log").splitlines()
    assert "] $ python -c 'print(" in log[0] and log[1:] == ["loss 1", "noise", "loss 2"]


def test_independent_stages_overlap_as_far_as_jobs_allow(workshop, capsys):
    stages = {
        name: tool(f"interval ${{output}}/{name} 0.4", writes=[f"${{output}}/{name}"])
        for name in ("a", "b")
    }
    stages["last"] = tool(
        "append ${output}/last x", reads=["${output}/a", "${output}/b"], writes=["${output}/last"]
    )
    assert run_recipe(workshop.load(stages), jobs=2) == 0
    (began_a, ended_a), (began_b, ended_b) = (
        map(float, workshop.text(name).split()) for name in "ab"
    )
    assert max(began_a, began_b) < min(ended_a, ended_b)
    assert "a: $ python" in capsys.readouterr().out
    assert state(workshop, "last")["started"] > max(ended_a, ended_b)


def test_a_failure_lets_the_running_stages_end_and_starts_no_more(workshop, capsys):
    stages = {
        "bad": tool("unless ${output}/part ${recipe}/no"),
        "slow": tool("interval ${output}/slow 0.5", writes=["${output}/slow"]),
        "later": tool("append ${output}/later x"),
    }
    assert run_recipe(workshop.load(stages), jobs=2) == 1
    assert state(workshop, "slow")["finished"] and not (workshop.output / "later").exists()
    assert "bad failed; what runs goes on to its end" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused_at_once(workshop):
    stages = {"a": tool("interval ${output}/a 3")}
    recipe = workshop.load(stages)
    first = in_a_process(recipe)
    wait_for(lambda: (workshop.output / "logs/a.log").exists())
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"another recipe run works there \(process {first} on "):
        run_recipe(recipe)
    assert time.monotonic() - started < 10  # what was left behind would have a minute
    os.kill(first, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 143
    assert state(workshop, "a")["exit_code"] is None and state(workshop, "a")["ended"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_command_which_may_end_in_order(workshop, number, code):
    script = workshop.folder / "careful.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready')\ntime.sleep(60)\n"
    )
    stages = {"a": {"run": "python ${recipe}/careful.py", "args": ["${output}/state"]}}
    pid = in_a_process(workshop.load(stages))
    log = workshop.output / "logs/a.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text().splitlines())
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert workshop.text("state") == "saved"


def test_a_command_that_ignores_the_signal_is_killed_after_the_patience(workshop):
    around = launch.Surroundings(
        workshop.output, workshop.output / "log", None, {}, None, threading.Event(), 0.3, print
    )
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(60)"
    threading.Timer(1.0, around.stop.set).start()
    started = time.monotonic()
    assert launch.run_process([sys.executable, "-c", code], around) is None
    assert time.monotonic() - started < 10


def test_a_program_that_does_not_exist_fails_with_a_sentence(workshop, capsys):
    assert run_recipe(workshop.load({"a": {"run": "no-such-program --x"}})) == 1
    assert "no-such-program: cannot be started (No such file or directory)" in (
        capsys.readouterr().err
    )


def test_what_a_killed_run_left_behind_is_waited_for_and_then_named(workshop, tmp_path):
    path = Records(workshop.output).lock
    pid = os.fork()
    if not pid:  # takes the lock, starts something that outlives it, and is killed
        with held(path, workshop.output) as fd:
            environment = {**os.environ, lock.MARK: os.path.realpath(workshop.output)}
            subprocess.Popen(["sleep", "2"], pass_fds=(fd,), env=environment)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with (
        pytest.raises(ValueError, match=r"still works there after 0 s: process \d+ \(sleep 2\)"),
        held(path, workshop.output, patience=0.2),
    ):
        pass
    with held(path, workshop.output, patience=10):
        assert lock.workers(workshop.output) == {}


def test_a_file_system_without_locks_is_warned_about_and_used(workshop, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert run_recipe(workshop.load(chain())) == 0


def test_what_a_stage_requires_may_change_its_content(workshop, capsys):
    script = workshop.folder / "script"
    script.write_text("x")
    stages = {"a": {**tool("append ${output}/a x", writes=["${output}/a"])}}
    stages["a"]["requires"] = ["${recipe}/script"]
    assert run_recipe(workshop.load(stages)) == 0
    script.write_text("y")
    assert run_recipe(workshop.load(stages)) == 0
    assert workshop.text("a") == "x" and "done before" in capsys.readouterr().out
