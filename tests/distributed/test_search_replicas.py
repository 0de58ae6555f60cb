"""Replicas share a search: same journal whatever their number and speed; nothing is ever lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, TORCHRUN, run, two_agents
from synthetic_search import drop_seconds

pytestmark = [pytest.mark.slow, pytest.mark.one_release]

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_synthetic_search.py"


def command(processes, *arguments):
    if processes == 1:
        return [sys.executable, str(SCRIPT), *map(str, arguments)]
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    return [
        *TORCHRUN, "--nproc-per-node", str(processes), *rendezvous, str(SCRIPT),
        *map(str, arguments),
    ]  # fmt: skip


def start(processes, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    return subprocess.Popen(
        command(processes, *arguments), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(("algorithm", "lookahead", "agents"), [("evolution", 0, 1), ("cma", 2, 2)])
def test_the_journal_does_not_depend_on_the_number_and_speed_of_replicas(
    tmp_path, algorithm, lookahead, agents
):
    options = ("--lookahead", lookahead, "--seconds", 0.002)
    single = finish(start(1, algorithm, tmp_path / "1.jsonl", *options))
    arguments = (algorithm, tmp_path / "3.jsonl", *options)
    if agents == 1:
        shared = finish(start(3, *arguments))
    else:
        script = (str(SCRIPT), *map(str, arguments))
        statuses, log = run(two_agents(script, processes=2), tmp_path / "agents")
        assert statuses == [0, 0], log[-3000:]
        shared = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert drop_seconds(tmp_path / "3.jsonl") == drop_seconds(tmp_path / "1.jsonl")
    # The others did a part of the work.
    assert 0 < shared.pop("scored_here") < single.pop("scored_here")
    assert shared == single


@pytest.mark.parametrize("algorithm", ["evolution", "cma"])
def test_a_search_killed_at_random_points_ends_with_the_same_factors(tmp_path, algorithm):
    options = (algorithm, tmp_path / "killed.jsonl", "--seconds", 0.004)
    whole = finish(start(1, algorithm, tmp_path / "whole.jsonl"))
    rng = random.Random(algorithm)
    kills = 0
    for _ in range(2):
        process = start(1, *options)
        wait_for_lines(tmp_path / "killed.jsonl", rng.randrange(2, 40), process)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    resumed = finish(start(1, *options))
    assert kills >= 1
    assert resumed["factors"] == whole["factors"] and resumed["score"] == whole["score"]
    assert drop_seconds(tmp_path / "killed.jsonl") == drop_seconds(tmp_path / "whole.jsonl")


def test_a_dead_replica_ends_the_job_and_the_journal_goes_on_from_there(tmp_path):
    journal = tmp_path / "j.jsonl"
    process = start(2, "cma", journal, "--seconds", 0.01, "--die", "1:12")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    before = len(journal.read_text().splitlines())
    assert before > 1
    finish(start(2, "cma", journal))
    finish(start(1, "cma", tmp_path / "whole.jsonl"))
    assert drop_seconds(journal) == drop_seconds(tmp_path / "whole.jsonl")


def wait_for_lines(path, count, process):
    """Until the journal has grown by so many lines, or the process has ended."""
    end = count + (path.read_bytes().count(b"\n") if path.exists() else 0)
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= end:
            return
        time.sleep(0.005)
