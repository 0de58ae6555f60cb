"""What examples/workflow adds to Snakemake, on rules that take no time: half-done work stays."""

import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import kill

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[2]
# All of them start Snakemake, and kill it.
pytestmark = [pytest.mark.slow, pytest.mark.one_release, pytest.mark.timeout(600)]

SNAKEFILE = f"""
include: "{ROOT}/examples/workflow/common.smk"

rule all:
    default_target: True
    input: "end.done"

rule first:
    input: given("input"), model_files(given("model"), WEIGHTS)
    output: "first.done"
    params: seed=config["seed"]
    resources: tp=config["tp"]
    log: "logs/first.log"
    shell:
        '''
        log_to {{log}}
        begin first {{input:q}} {{params:q}}
        python {{config[worker]}} first {{params.seed}} {{resources.tp}}
        stamp {{output}}
        '''

rule end:
    input: "first.done"
    output: "end.done"
    params: seed=config["last_seed"]
    log: "logs/end.log"
    shell:
        '''
        log_to {{log}}
        begin end {{input:q}} {{params:q}}
        python {{config[worker]}} end {{params.seed}} 1
        stamp {{output}}
        '''
"""
LINES = 10
# Appends a line at a time to what an earlier run left, as a training adds checkpoints. With a file
# `hold` beside it, it waits after five; with `slow`, before each.
WORKER = f"""
import os, pathlib, sys, time
folder, seed, how = sys.argv[1:]
hold, slow = (pathlib.Path(__file__).with_name(name) for name in ("hold", "slow"))
path = pathlib.Path(folder); path.mkdir(exist_ok=True)
lines = path / "lines"
done = lines.read_text().count("\\n") if lines.exists() else 0
with lines.open("a", buffering=1) as file:
    for number in range(done, {LINES}):
        while number == 5 and hold.exists():
            time.sleep(0.02)
        if slow.exists():
            time.sleep(0.2)
        file.write(f"{{number}} {{seed}}\\n")
pathlib.Path("runs").open("a").write(f"{{folder}} from {{done}}\\n")
"""


class Workflow:
    """A folder with the two rules above."""

    def __init__(self, folder):
        self.folder, self.output = folder, folder / "out"
        (folder / "Snakefile").write_text(SNAKEFILE)
        (folder / "worker.py").write_text(WORKER)
        (folder / "input").write_text("text")
        (folder / "model").mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / "model" / name).write_text("old")
        self.config = {"seed": 1, "last_seed": 1, "tp": 1}

    def start(self, *flags):
        values = [f"{name}={value}" for name, value in self.config.items()]
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "examples/profiles/local"),
             *flags, "--config", "output=out", f"worker={self.folder}/worker.py", *values],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def start_and_hold(self):
        """Start it; its first rule has written five lines, and waits."""
        (self.folder / "hold").touch()
        process = self.start()
        self.wait_for_lines("first", 5)
        return process

    def run(self, *flags):
        process = self.start(*flags)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
        return said

    def unlock(self):
        """What --unlock does, which is another start of Snakemake."""
        locks = [*self.folder.glob("**/.snakemake/locks/*")]
        assert locks
        for lock in locks:
            lock.unlink()

    def lines(self, name):
        return (self.output / name / "lines").read_text().splitlines()

    def runs(self):
        """What has ended since the last call, and after how many lines each began."""
        path = self.output / "runs"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def wait_for_lines(self, name, number):
        path = self.output / name / "lines"
        deadline = time.monotonic() + 300
        while not path.exists() or path.read_text().count("\n") < number:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def workflow(tmp_path):
    return Workflow(tmp_path)


def workers(workflow):
    found = subprocess.run(
        ["pgrep", "-f", f"{workflow.folder}/worker.py (first|end)"], capture_output=True, text=True
    )
    return found.stdout.split()


def test_changes_of_params_and_inputs_run_what_depends_on_them_and_resources_nothing(workflow):
    workflow.run()
    assert workflow.runs() == ["first from 0", "end from 0"]
    workflow.config["tp"] = 2
    os.utime(workflow.folder / "input")  # newer, but the same
    (workflow.folder / "model/README.md").touch()  # makes only the folder newer
    assert "Nothing to be done" in workflow.run()
    workflow.config["last_seed"] = 2
    workflow.run()
    assert workflow.runs() == ["end from 0"]
    assert workflow.lines("end")[0] == "0 2"
    assert next(workflow.output.glob("stale/*/end/lines")).read_text().startswith("0 1\n")
    (workflow.folder / "input").write_text("other text")
    workflow.run()
    assert workflow.runs() == ["first from 0", "end from 0"]
    (workflow.folder / "model/model.safetensors").write_text("new")  # and the folder no newer
    workflow.run()
    assert workflow.runs() == ["first from 0", "end from 0"]


def test_killed_it_ends_its_jobs_and_the_same_command_goes_on(workflow):
    process = workflow.start_and_hold()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while workers(workflow):
        assert time.monotonic() < deadline, "the job goes on as an orphan"
        time.sleep(0.1)
    (workflow.folder / "hold").unlink()
    done = len(workflow.lines("first"))
    workflow.unlock()
    workflow.run()
    assert workflow.runs() == [f"first from {done}", "end from 0"]
    assert workflow.lines("first") == [f"{number} 1" for number in range(LINES)]
    # Snakemake deletes the log of a rule that it runs again.
    assert (workflow.output / "logs/first.log").read_text().count("started at ") == 2


def test_work_that_was_begun_with_other_flags_is_put_aside(workflow):
    process = workflow.start_and_hold()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (workflow.folder / "hold").unlink()
    workflow.config["seed"] = 2
    workflow.unlock()
    said = workflow.run()
    assert "first was begun with other flags or inputs; it is in stale/" in said
    assert workflow.lines("first") == [f"{number} 2" for number in range(LINES)]
    assert next(workflow.output.glob("stale/*/first/lines")).read_text().startswith("0 1\n")


@pytest.mark.release
def test_killed_at_random_moments_no_line_is_lost_or_written_twice(workflow):
    chance = random.Random(0)
    (workflow.folder / "slow").touch()
    kills = 0
    while kills < 10:
        process = workflow.start()
        time.sleep(chance.uniform(0.5, 7))
        kill(process, chance)
        process.stdout.close()
        if process.returncode == 0:  # it was done before: once more from the beginning
            shutil.rmtree(workflow.output)
            continue
        kills += 1
        workflow.run("--unlock")
    workflow.run()
    for name in ("first", "end"):
        assert workflow.lines(name) == [f"{number} 1" for number in range(LINES)]
    assert not (workflow.output / "stale").exists()


def test_a_folder_in_use_is_refused_and_a_dead_lock_is_opened(tmp_path):
    """Of examples/run.sh, which `make quickstart` starts."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "examples/run.sh"), "quickstart-smoke", str(tmp_path / "out"), "-n"]
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and "another run works in" in done.stderr
    locks = tmp_path / "out/.snakemake/locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("report.html\n")
    wrong = [*command[:-1], "lengths=0"]  # no list: what stops it is said before the lock is open
    done = subprocess.run(wrong, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1 and "'int' object is not iterable" in done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not locks.exists() or not any(locks.iterdir())


def test_a_recipe_for_more_nodes_than_there_are_is_refused(tmp_path):
    """It would take one machine's time, and one machine's memory, for that of all."""
    (tmp_path / "Snakefile").write_text(f"""
include: "{ROOT}/examples/workflow/common.smk"

rule first:
    output: "first.done"
    resources: **GPUS
    shell:
        "echo {{resources.tasks}} {{resources.slurm_extra}}; "
        "on_gpus {{resources.gpus_per_node}} longrope eval"
""")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "examples/profiles/local"),
         "--config", "output=out", "nodes=8", "gpus=1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
        env={name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "8 --gpus-per-node=1" in done.stdout + done.stderr  # what Slurm would be asked for
    assert "ask for 8 nodes and this command has 1; set nodes=1, or run" in done.stderr


def test_every_recipe_asks_for_its_gpus_in_the_same_words():
    files = [*ROOT.glob("examples/*/Snakefile"), *ROOT.glob("examples/*/*.smk")]
    own = {
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"^GPUS\b.*=", path.read_text(), re.M)
    }
    assert own == {"examples/workflow/common.smk"}


def test_a_training_has_half_an_hour_to_save_before_a_time_limit_or_half_of_its_time():
    day, minutes = 86400, 600
    calls = (f"stop_at 0 {day}; stop_at {day} {day + minutes}; "
             f"STOP_SECONDS=60 stop_at 0 {minutes}")  # fmt: skip
    script = f"source {ROOT}/examples/workflow/functions.sh; {calls}"
    environment = {k: v for k, v in os.environ.items() if k != "STOP_SECONDS"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment | {"LONGROPE_BIN": "."}, capture_output=True
    )
    assert [*map(int, done.stdout.split())] == [day - 1800, day + 300, minutes - 60]
