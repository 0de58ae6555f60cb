"""Replicas share a search: same journal whatever their number and speed; nothing is ever lost."""

import json
from pathlib import Path

import launching
import pytest
from launching import Agent, run, two_agents
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
