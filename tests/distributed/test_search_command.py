"""`longrope search` under torchrun and under SIGTERM, on a real checkpoint."""

import contextlib
import json
import subprocess

import launching
import pytest
from launching import LONGROPE, Command, Ranks
from synthetic_search import drop_seconds

from megatron_longrope.factor_search.session import num_journaled

pytestmark = pytest.mark.slow


def words(untied_gqa, data, output, *flags):
    return (
        *LONGROPE, "search", "--load", str(untied_gqa.path),
        "--base-config", "none",
        "--data", data["search"], "--target-length", "256", "--original-length", "64",
        "--num-samples", "3", "--tokens-per-forward", "256", "--start-tokens", "0,4",
        "--attention-factor-policy", "su", "--no-figures", "--output", str(output), *flags,
    )  # fmt: skip


def search(*arguments, processes=1):
    done = launching.python(*words(*arguments), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_replicas_of_context_and_tensor_parallel_ranks_find_what_one_process_finds(
    untied_gqa, data, tmp_path
):
    budget = ("--max-evaluations", "7")
    search(untied_gqa, data, tmp_path / "one.json", *budget)
    layout = ("--context-parallel-size", "2")
    output = search(untied_gqa, data, tmp_path / "four.json", *budget, *layout, processes=4)
    assert output.count("held-out") == 0 and output.count("wrote ") == 1  # rank 0 alone speaks
    one, four = (drop_seconds(tmp_path / f"{name}.journal.jsonl") for name in ("one", "four"))
    # Ring attention adds in another order: 1e-5 in a loss, too little to choose other candidates.
    assert [item["rescale_factors"] for item in four] == [item["rescale_factors"] for item in one]
    for ours, theirs in zip(four, one, strict=True):
        assert ours["sample_nlls"] == pytest.approx(theirs["sample_nlls"], abs=1e-5)
    configs = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "four")]
    assert len({str(item["factor_sets"][-1]["rescale_factors"]) for item in configs}) == 1


def test_a_cancelled_job_says_how_to_go_on_and_does(untied_gqa, data, tmp_path):
    output = tmp_path / "f.json"
    flags = ("--resume", "--algorithm", "evolution", "--max-evaluations", "400")
    journal = output.with_suffix(".journal.jsonl")
    with (tmp_path / "log").open("w+") as log:
        process = Ranks(Command(words(untied_gqa, data, output, *flags)), tmp_path, log, log)
        while not (journal.exists() and journal.stat().st_size > 5000):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                break
        process.end()  # SIGTERM
        status = process.wait(0)
        log.seek(0)
        errors = log.read()
    done = num_journaled(journal)
    assert status == 130
    assert f"stopped by SIGTERM (the job was cancelled, or another rank ended); {done} " in errors
    assert "--resume" in errors and "Traceback" not in errors
    assert not output.exists()
    text = search(untied_gqa, data, output, *flags[:3], "--max-evaluations", str(done + 3))
    assert f"after {done + 3} evaluations" in text and output.exists()
