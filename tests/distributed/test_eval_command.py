"""`longrope eval` under torchrun and after kill -9, on a real checkpoint."""

import contextlib
import json
import signal
import subprocess

import launching
import make_megatron_checkpoint as maker
import pytest
from launching import LONGROPE, Command, Ranks

from megatron_longrope.config import FactorSet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, megatron_runs, data):
    """Flags that all commands share, and the prefix of the data."""
    factors = tmp_path_factory.mktemp("inputs") / "factors.json"
    vector = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    maker.longrope_config().with_factor_set(FactorSet(1022, vector)).save(factors)
    load = ["--load", str(megatron_runs["untied_gqa"].path), "--longrope-config", str(factors)]
    return load, data


def evaluate(kind, output, *flags, processes=1):
    words = (*LONGROPE, "eval", kind, "--output", output, *flags)
    done = launching.python(*words, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_copies_and_two_parallel_ranks_measure_what_one_process_measures(inputs, tmp_path):
    load, data = inputs
    flags = [
        *load, "--data", data["heldout"], "--num-documents", "3", "--lengths", "64,250,1022",
        "--stride", "disjoint",
    ]  # fmt: skip
    evaluate("ppl", tmp_path / "one", *flags)
    output = evaluate("ppl", tmp_path / "copies", *flags, processes=2)
    assert output.count("wrote ") == 1  # rank 0 alone speaks
    # 250 tokens, and the windows at the documents' ends, do not split into four chunks. What fills
    # up 1022 reaches beyond the longest factor set.
    evaluate("ppl", tmp_path / "cp", *flags, "--context-parallel-size", "2", processes=2)
    expected = records(tmp_path / "one/ppl.jsonl")
    for name in ("copies", "cp"):
        rows = records(tmp_path / name / "ppl.jsonl")
        assert [row["length"] for row in rows] == [64, 250, 1022]
        for row, theirs in zip(rows, expected, strict=True):
            assert row["sha256"] == theirs["sha256"] and row["num_tokens"] == theirs["num_tokens"]
            assert row["nll_per_document"] == pytest.approx(theirs["nll_per_document"], abs=1e-5)
            assert row["ppl_window_mean"] == pytest.approx(theirs["ppl_window_mean"], rel=1e-5)


def test_a_prompt_that_fills_the_longest_factor_set_splits_over_ranks(inputs, tmp_path):
    load, data = inputs
    flags = [*load, "--tokenizer", data["tokenizer"], "--lengths", "1022", "--trials", "1"]
    evaluate("passkey", tmp_path / "one", *flags)
    parallel = ("--context-parallel-size", "2")
    evaluate("passkey", tmp_path / "cp", *flags, *parallel, processes=2)
    (row,), (other,) = (records(tmp_path / name / "passkey.jsonl") for name in ("one", "cp"))
    assert row["nll"] == pytest.approx(other["nll"], abs=1e-5)


def test_passkey_trials_are_shared_and_survive_kill_9(inputs, tmp_path):
    load, data = inputs
    flags = [*load, "--tokenizer", data["tokenizer"], "--lengths", "400,512", "--depths", "3"]
    flags += ["--trials", "8"]
    path = tmp_path / "two/passkey.jsonl"
    command = Command((*LONGROPE, "eval", "passkey", "--output", str(path.parent), *flags))
    with (tmp_path / "log").open("w") as log:
        process = Ranks(command, tmp_path, log, log)
        while not (path.exists() and path.stat().st_size > 1500):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
                break
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = path.read_bytes().rpartition(b"\n")[0].splitlines()
    assert 0 < len(before) < 48
    evaluate("passkey", path.parent, *flags, processes=2)  # goes on with another layout
    evaluate("passkey", tmp_path / "one", *flags)
    ours, theirs = records(path), records(tmp_path / "one/passkey.jsonl")
    assert path.read_bytes().splitlines()[: len(before)] == before
    assert len(ours) == 48
    for row, other in zip(ours, theirs, strict=True):
        for name in ("length", "requested_depth", "trial", "key", "correct", "num_tokens"):
            assert row[name] == other[name]
        assert row["nll"] == pytest.approx(other["nll"], abs=1e-5)
