"""Recipes whose runs are killed at any point, and whose jobs run somewhere else."""

import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes import Workshop, exit_code, in_a_process, tool, wait_for

from megatron_longrope.recipe.document import Recipe
from megatron_longrope.recipe.status import read_status

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Appends a line at a time to what an earlier run left, and says all the while that it is at work.
WORKER = """
import os, pathlib, sys, time
target, lines, *sources = sys.argv[1:]
target = pathlib.Path(target)
part = target.with_suffix(".part")
seed = "".join(pathlib.Path(source).read_text() for source in sources)
beats = open(pathlib.Path(__file__).with_name("beats"), "a", buffering=1)
done = part.read_text().count("\\n") if part.exists() else 0
with part.open("a", buffering=1) as file:
    for number in range(done, int(lines)):
        beats.write(f"{os.getpid()} {time.time()}\\n")
        file.write(f"{number} {sum(map(ord, seed)) * number}\\n")
        time.sleep(0.02)
beats.write(f"{os.getpid()} {time.time()}\\n")
os.replace(part, target)
"""


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def worker(name, *sources, lines=12):
    inputs = [f"${{output}}/{source}" for source in sources]
    return {
        "run": "python ${recipe}/worker.py",
        "args": [f"${{output}}/{name} {lines} {' '.join(inputs)}"],
        "reads": ["${recipe}/worker.py", *inputs],
        "writes": [f"${{output}}/{name}"],
    }


def small_graph():
    two = worker("b1", "a")
    return {
        "a": worker("a"),
        "b": {
            "commands": [
                {"run": two["run"], "args": [f"${{output}}/b{n} 10 ${{output}}/a"]} for n in (1, 2)
            ],
            "reads": two["reads"],
            "writes": ["${output}/b1", "${output}/b2"],
        },
        "c": worker("c", "a"),
        "d": worker("d", "b1", "b2", "c"),
    }


def artifacts(workshop):
    return {name: workshop.text(name) for name in ("a", "b1", "b2", "c", "d")}


def lives(path):
    """From when to when each process was at work, in order."""
    found = {}
    for line in path.read_text().splitlines():
        pid, when = line.split()
        first, _ = found.get(pid, (float(when), 0))
        found[pid] = (first, float(when))
    return sorted(found.values())


def test_killed_at_any_point_the_same_command_goes_on_to_the_same_artifacts(tmp_path):
    (tmp_path / "still").mkdir()
    (tmp_path / "killed").mkdir()
    undisturbed, killed = Workshop(tmp_path / "still"), Workshop(tmp_path / "killed")
    for workshop in (undisturbed, killed):
        (workshop.folder / "worker.py").write_text(WORKER)
    assert exit_code(in_a_process(undisturbed.load(small_graph()))) == 0
    recipe = killed.load(small_graph())
    chance = random.Random(0)
    kills = 0
    while kills < 14:
        pid = in_a_process(recipe)
        time.sleep(chance.uniform(0.02, 0.9))
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == -signal.SIGKILL:
            kills += 1
        else:  # it was done before; once more from the beginning
            assert artifacts(killed) == artifacts(undisturbed)
            shutil.rmtree(killed.output)
    assert exit_code(in_a_process(recipe)) == 0
    assert artifacts(killed) == artifacts(undisturbed)
    assert not (killed.output / "stale").exists()
    assert all(
        one[1] <= other[0] for one, other in itertools.pairwise(lives(killed.folder / "beats"))
    )
    assert {line.state for line in read_status(recipe).lines} == {"done"}


# A batch system of three small programs. A job is a process that nobody waits for.
SBATCH = """
import os, pathlib, subprocess, sys, time
fake = pathlib.Path(os.environ["FAKE"])
mode = os.environ.get("FAKE_MODE", "")
if mode == "refuse":
    sys.exit("sbatch: error: no such partition")
time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
number = len(list(fake.glob("*.pid"))) + 1
job = subprocess.Popen([sys.executable, str(fake / "job.py"), str(number), *sys.argv[1:]],
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
(fake / f"{number}.pid").write_text(str(job.pid))
print("some greeting\\n%d;cluster" % number)
"""
JOB = """
import os, subprocess, sys, time
number, *command = sys.argv[1:]
with open(os.environ["LONGROPE_LOG_FILE"], "a") as log:
    code = subprocess.run(command, stdout=log, stderr=log).returncode
if os.environ.get("FAKE_MODE") == "vanish" and number == "1":
    sys.exit()
if os.environ.get("FAKE_MODE") == "fail" and number == "1":
    code = 3
if os.environ.get("FAKE_MODE") == "preempt":  # leaves a code, waits, and is started again
    with open(os.environ["LONGROPE_STATUS_FILE"], "w") as file:
        file.write("143")
    time.sleep(2)
with open(os.environ["LONGROPE_STATUS_FILE"], "w") as file:
    file.write(str(code))
"""
SQUEUE = """
import os, pathlib, sys
pid = (pathlib.Path(os.environ["FAKE"]) / f"{sys.argv[-1]}.pid").read_text()
try:
    if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
        print(sys.argv[-1], "RUNNING")
except FileNotFoundError:
    pass
"""


@pytest.fixture
def cluster(workshop, monkeypatch):
    """Puts sbatch and squeue on the path; gives the folder with a .pid for each job."""
    fake = workshop.folder / "fake"
    fake.mkdir()
    (fake / "job.py").write_text(JOB)
    for name, code in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (fake / name).write_text(f"#!{sys.executable}\n{code}")
        (fake / name).chmod(stat.S_IRWXU)
    (workshop.folder / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    return fake


def submitted(workshop, *, lines=40, **stage):
    return workshop.load(
        {"a": {**worker("a", lines=lines), "launch": "slurm", **stage}},
        launch={
            "slurm": {
                "submit": "sbatch ${command}",
                "alive": "squeue --noheader --jobs ${job}",
                "grace": "1.5",
            }
        },
    )


def jobs(cluster):
    return len(list(cluster.glob("*.pid")))


def state(workshop):
    return json.loads(workshop.text(".recipe/stages/a.json"))


def test_a_job_survives_the_death_of_its_run_and_is_not_submitted_again(workshop, cluster, capfd):
    recipe = submitted(workshop)
    pid = in_a_process(recipe)
    wait_for(lambda: (workshop.output / "a.part").exists())
    assert read_status(recipe).lines[0].state == "running"
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    line = read_status(recipe).lines[0]
    assert (line.state, line.job) == ("interrupted", "1")
    assert exit_code(in_a_process(recipe)) == 0
    assert jobs(cluster) == 1 and workshop.text("a").count("\n") == 40
    assert len(lives(workshop.folder / "beats")) == 1
    assert "waiting for job 1" in capfd.readouterr().out
    assert state(workshop)["job"] is None and state(workshop)["attempts"] == 1


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2, 0.4])
def test_a_run_that_is_killed_while_it_submits_leaves_one_job(
    workshop, cluster, monkeypatch, moment
):
    monkeypatch.setenv("FAKE_DELAY", "0.4")
    recipe = submitted(workshop, lines=10)
    pid = in_a_process(recipe)
    records = workshop.output / ".recipe/status"
    wait_for(lambda: list(records.glob("*.submitted")))
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    assert exit_code(in_a_process(recipe)) == 0
    assert jobs(cluster) == 1 and len(lives(workshop.folder / "beats")) == 1


def test_a_job_goes_on_when_its_run_is_told_to_stop(workshop, cluster, capfd):
    recipe = submitted(workshop)
    pid = in_a_process(recipe)
    wait_for(lambda: (workshop.output / "a.part").exists())
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 143
    assert "job 1 goes on by itself" in capfd.readouterr().out
    wait_for(lambda: (workshop.output / ".recipe/status/a.0.1").exists())
    assert exit_code(in_a_process(recipe)) == 0 and jobs(cluster) == 1


@pytest.mark.parametrize("mode", ["vanish", "fail"])
def test_a_job_that_fails_or_vanishes_without_a_word_is_submitted_again_while_retries_are_left(
    workshop, cluster, monkeypatch, capfd, mode
):
    monkeypatch.setenv("FAKE_MODE", mode)
    said = {
        "vanish": "job 1 is gone and left no exit code",
        "fail": "a failed with exit code 3; again (1 of 1)",
    }[mode]
    assert exit_code(in_a_process(submitted(workshop, lines=2, retries="1"))) == 0
    assert jobs(cluster) == 2 and said in capfd.readouterr().out


def test_a_preempted_job_is_waited_for_whatever_code_it_has_left(workshop, cluster, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "preempt")
    assert exit_code(in_a_process(submitted(workshop, lines=2))) == 0
    assert jobs(cluster) == 1


def test_a_job_that_vanishes_fails_the_stage_without_retries(workshop, cluster, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_MODE", "vanish")
    recipe = submitted(workshop, lines=2)
    assert exit_code(in_a_process(recipe)) == 1
    assert "job 1 is gone and left no exit code" in capfd.readouterr().err
    assert read_status(recipe).lines[0].state == "failed"
    assert exit_code(in_a_process(recipe)) == 0 and jobs(cluster) == 2


def test_a_refused_job_fails_the_stage_and_shows_what_was_said(
    workshop, cluster, monkeypatch, capfd
):
    monkeypatch.setenv("FAKE_MODE", "refuse")
    recipe = submitted(workshop, lines=2)
    assert exit_code(in_a_process(recipe)) == 1
    said = capfd.readouterr().err
    assert "submitting failed with exit code 1" in said and "no such partition" in said
    monkeypatch.delenv("FAKE_MODE")
    assert exit_code(in_a_process(recipe)) == 0


def test_a_changed_stage_does_not_start_beside_its_old_job(workshop, cluster, capfd):
    pid = in_a_process(submitted(workshop, lines=200))
    wait_for(lambda: (workshop.output / "a.part").exists())
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    changed = submitted(workshop, lines=3)
    assert exit_code(in_a_process(changed)) == 1
    assert "its job 1 from before still waits or runs" in capfd.readouterr().err
    wait_for(lambda: (workshop.output / "a").exists())
    time.sleep(0.5)
    assert exit_code(in_a_process(changed)) == 0
    assert workshop.text("a").count("\n") == 3 and jobs(cluster) == 2


def test_a_job_is_waited_for_although_it_would_now_start_otherwise(workshop, cluster):
    pid = in_a_process(submitted(workshop))
    wait_for(lambda: (workshop.output / "a.part").exists())
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    plain = submitted(workshop, launch="process")
    assert exit_code(in_a_process(plain)) == 0
    assert jobs(cluster) == 1 and len(lives(workshop.folder / "beats")) == 1


def test_status_shows_a_run_under_way_without_disturbing_it(workshop):
    stages = {
        "a": tool("interval ${output}/a 2", writes=["${output}/a"]),
        "b": tool("append ${output}/b x", reads=["${output}/a"], writes=["${output}/b"]),
    }
    recipe = workshop.load(stages)
    pid = in_a_process(recipe)
    wait_for(lambda: (workshop.output / "logs/a.log").exists())
    status = read_status(recipe)
    assert [(line.stage, line.state) for line in status.lines] == [
        ("a", "running"), ("b", "waiting"),
    ]  # fmt: skip
    assert status.running == pid and f"process {pid} is running" in status.text()
    assert exit_code(pid) == 0
    status = read_status(recipe)
    assert [line.state for line in status.lines] == ["done", "done"] and status.running is None


def test_the_command_line_runs_a_recipe_and_goes_on_after_kill(workshop):
    (workshop.folder / "worker.py").write_text(WORKER)
    workshop.write({"a": worker("a", lines=100)})
    command = [
        sys.executable, "-m", "megatron_longrope", "recipe", "run", str(workshop.path),
        "--output", str(workshop.output),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        wait_for(lambda: (workshop.output / "a.part").exists())
        first.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a goes on: it was interrupted" in done.stdout
    assert workshop.text("a").count("\n") == 100
    one, two = lives(workshop.folder / "beats")
    assert one[1] <= two[0]


def test_the_recipe_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    page = ROOT / "docs" / "recipes.md"
    text = page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "small.yaml"
    path.write_text(text)
    monkeypatch.chdir(ROOT)
    recipe = Recipe.load(path, output=tmp_path / "small")
    assert exit_code(in_a_process(recipe)) == 0, capfd.readouterr()
    assert (tmp_path / "small/data/search.bin").exists()
    capfd.readouterr()
    longer = Recipe.load(path, ["long"], {"workers": "2"}, tmp_path / "small")
    assert exit_code(in_a_process(longer)) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 2
    assert "--min-length 4k became --min-length 8k" in said
