"""Replicas share a search: same journal whatever their number and speed; nothing is ever lost."""

import contextlib
import json
import random
import signal
import subprocess
from pathlib import Path

import launching
import pytest
from launching import Agent, Command, Ranks, run, two_agents
from synthetic_search import drop_seconds

pytestmark = [pytest.mark.slow, pytest.mark.one_release]

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_synthetic_search.py"


def search(processes, *arguments):
    """Search to the end; what rank 0 prints."""
    done = launching.python(SCRIPT, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("algorithm", "lookahead", "agents"), [("evolution", 0, 1), ("cma", 2, 2)])
def test_the_journal_does_not_depend_on_the_number_and_speed_of_replicas(
    tmp_path, algorithm, lookahead, agents
):
    options = ("--lookahead", lookahead, "--seconds", 0.002)
    single = search(1, algorithm, tmp_path / "1.jsonl", *options)
    arguments = (algorithm, tmp_path / "3.jsonl", *options, "--together")
    if agents == 1:
        shared = search(3, *arguments)
    else:
        script = (str(SCRIPT), *map(str, arguments))
        statuses, log = run(two_agents(script, processes=2), tmp_path / "agents")
        assert statuses == [0, 0], log[-3000:]
        shared = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert drop_seconds(tmp_path / "3.jsonl") == drop_seconds(tmp_path / "1.jsonl")
    # The others did a part of the work.
    assert 0 < shared.pop("scored_here") < single.pop("scored_here")
    assert shared == single


@pytest.mark.release  # a dead replica below, and torn journals in tests/unit/search/test_journal.py
@pytest.mark.parametrize("algorithm", ["evolution", "cma"])
def test_a_search_killed_at_random_points_ends_with_the_same_factors(tmp_path, algorithm):
    options = (algorithm, tmp_path / "killed.jsonl", "--seconds", 0.02)
    whole = search(1, algorithm, tmp_path / "whole.jsonl")
    rng = random.Random(algorithm)
    command = Command((str(SCRIPT), *map(str, options)))
    kills = 0
    for _ in range(2):
        with (tmp_path / "log").open("w") as log:
            process = Ranks(command, tmp_path, log, log)
            wait_for_lines(tmp_path / "killed.jsonl", rng.randrange(2, 20), process)
            process.kill()
            kills += process.wait(60) == -signal.SIGKILL
    resumed = search(1, algorithm, tmp_path / "killed.jsonl")
    assert kills >= 1
    assert resumed["factors"] == whole["factors"] and resumed["score"] == whole["score"]
    assert drop_seconds(tmp_path / "killed.jsonl") == drop_seconds(tmp_path / "whole.jsonl")


def test_a_dead_replica_ends_the_job_and_the_journal_goes_on_from_there(tmp_path):
    journal = tmp_path / "j.jsonl"
    words = (str(SCRIPT), "cma", str(journal), "--seconds", "0.01", "--die", "1:12")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    agent = Agent(("--nproc-per-node", "2", *meeting, *words))
    (status,), log = run([agent], tmp_path / "agent")
    assert status != 0
    assert "Signal 9 (SIGKILL)" in log
    before = len(journal.read_text().splitlines())
    assert before > 1
    search(2, "cma", journal)
    search(1, "cma", tmp_path / "whole.jsonl")
    assert drop_seconds(journal) == drop_seconds(tmp_path / "whole.jsonl")


def wait_for_lines(path, count, process):
    """Until the journal has grown by so many lines, or the process has ended."""
    end = count + (path.read_bytes().count(b"\n") if path.exists() else 0)
    while not path.exists() or path.read_bytes().count(b"\n") < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
            return
