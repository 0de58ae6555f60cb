"""The whole walk with hardly any work: text, training, searches, evaluation, export."""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_commands import forked_commands
from killing import kill

from megatron_longrope.config import LongRopeConfig

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def command(output):
    """One rule at a time: another test process has the other core."""
    return ["examples/run.sh", "quickstart-smoke", str(output), "--cores", "1"]


def walk(output, **variables):
    return subprocess.run(
        command(output),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    # A space in the path, because people have them.
    directory = tmp_path_factory.mktemp("quick start")
    with forked_commands() as folder:
        done = walk(directory, LONGROPE_BIN=str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory


def test_every_cell_is_a_measured_number(output):
    rows = [json.loads(line) for name in ("baselines", "searched", "finetuned")
            for line in (output / name / "ppl.jsonl").read_text().splitlines()]  # fmt: skip
    lengths = {}
    for row in rows:
        lengths.setdefault(row["label"], set()).add(row["length"])
        assert row["original_length"] == 256
        assert math.isfinite(row["ppl_token_weighted"]) and row["ppl_token_weighted"] > 1
    # Within the original window every method is the model itself, measured once.
    assert lengths == {
        "none": {256, 1024, 2048, 8192}, "longrope_second": {256, 1024, 2048, 8192},
        **{name: {1024, 2048, 8192} for name in ("pi", "ntk", "yarn")},
        "longrope_search": {256, 1024, 2048}, "longrope_finetuned": lengths["longrope_finetuned"],
    }  # fmt: skip


def test_every_training_has_an_index_of_samples_of_its_own(output):
    # Megatron knows it by the data's path alone: `begin` moves it aside with the training.
    folders = {path.relative_to(output).as_posix() for path in output.glob("**/*.cache")}
    assert folders == {"checkpoints/base.cache", "checkpoints/finetuned.cache"}
    assert all(any((output / folder).iterdir()) for folder in folders)
    assert not (output / "cache").exists()


def test_context_parallel_training_gives_the_loss_of_one_process(output):
    parity = json.loads((output / "parity.json").read_text())
    assert parity["cp2_loss"] == pytest.approx(parity["cp1_loss"], rel=1e-6)


def test_the_export_has_the_logits_and_perplexity_of_the_checkpoint(output):
    export = json.loads((output / "huggingface.json").read_text())
    assert export["max_abs_logit_diff_short"] < 1e-5
    assert export["max_abs_logit_diff_long"] < 1e-5
    for length, ours in export["perplexity_megatron"].items():
        assert export["perplexity_transformers"][length] == pytest.approx(ours, rel=1e-5)
    assert export["greedy_agreement_across_switch"] == 1.0


def test_the_final_factors_hold_every_stage_and_its_provenance(output):
    config = LongRopeConfig.load(output / "factors/final.json")
    assert [item.max_length for item in config.factor_sets] == [256, 2048, 8192]
    assert [item.origin["stage"] for item in config.factor_sets] == ["recovery", "first", "second"]
    second = LongRopeConfig.load(output / "factors/second.json")
    assert config.attention_factor == second.attention_factor_for(8192)


def test_the_fine_tuned_checkpoint_holds_the_factors_by_value(output):
    from megatron_longrope.checkpoint.reader import MegatronCheckpoint

    checkpoint = MegatronCheckpoint.open(output / "checkpoints/finetuned")
    assert checkpoint.longrope == LongRopeConfig.load(output / "factors/search_8x.json")
    assert checkpoint.args.longrope_config.endswith("search_8x.json")


def test_the_report_is_one_file_with_its_figures_beside_it(output):
    page = (output / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "Largest logit difference, long window" in page  # from facts.json
    names = {path.name for path in (output / "figures").iterdir()}
    assert {"perplexity.png", "perplexity.csv"} <= names


def test_a_second_run_repeats_nothing(output):
    before = (output / "report.html").stat().st_mtime_ns
    done = walk(output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Nothing to be done" in done.stdout + done.stderr
    assert (output / "report.html").stat().st_mtime_ns == before


@pytest.mark.release
@pytest.mark.timeout(7200)
def test_killed_at_ten_moments_it_ends_with_the_artifacts_of_an_undisturbed_walk(output, tmp_path):
    # What is killed are processes of their own, unlike those of the undisturbed walk.
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            command(tmp_path / "out"), cwd=REPOSITORY, env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(chance.uniform(5, 45))
        kill(process, chance)
    with forked_commands() as folder:
        done = walk(tmp_path / "out", LONGROPE_BIN=str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("search_2x", "search_8x", "second", "final"):
        undisturbed, killed = (
            LongRopeConfig.load(folder / f"factors/{name}.json").factor_sets
            for folder in (output, tmp_path / "out")
        )
        assert [item.rescale_factors for item in killed] == [
            item.rescale_factors for item in undisturbed
        ]
    # No evaluation was repeated, nothing half done was thrown away.
    for journal in (output / "factors").glob("*.jsonl"):
        theirs = tmp_path / "out/factors" / journal.name
        assert theirs.read_text().count("\n") == journal.read_text().count("\n")
    assert not (tmp_path / "out/stale").exists()
