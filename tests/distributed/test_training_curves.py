"""Fine-tuning takes the same steps in every parallel layout, resumed or not.

`benchmarks/training_curves.py` has all layouts; docs/context_parallel.md says how near they are.
"""

import statistics

import pytest

pytest.importorskip("megatron.training")

from curves import LAYOUTS, ONE, STAGE_STEPS, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.one_release]

STEPS, SAVED_AT = 16, 8  # the benchmark has 50
# Relative, in fp32: about five times what benchmarks/results/training_curves.json has.
TOLERANCE = {"loss": 1e-6, "gradient norm": 5e-6, "parameter norm": 1e-6}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("curves") / "work", steps=STEPS, saved_at=SAVED_AT)
    trainer.prepare()
    return trainer


@pytest.fixture(scope="module")
def one_process(trainer):
    return trainer.run("one process")


@pytest.fixture(scope="module")
def killed(trainer):
    """Name of a context-parallel run that was killed after its save."""
    trainer.kill_after_save("killed", LAYOUTS["CP2 x TP2"])
    return "killed"


def assert_same_steps(curve, reference, steps=range(1, STEPS + 1)):
    assert curve.steps == list(steps)
    for quantity, largest in curve.largest_differences(reference).items():
        assert largest < TOLERANCE[quantity], quantity


def test_the_loss_falls_and_the_gradient_is_clipped(one_process):
    losses = list(one_process.values["loss"].values())
    assert len(losses) == STEPS
    assert statistics.mean(losses[-4:]) < statistics.mean(losses[:4]) - 0.1
    clipped = [norm > 0.5 for norm in one_process.values["gradient norm"].values()]
    assert sum(clipped) > STEPS / 2


@pytest.mark.release
def test_a_loss_per_token_over_data_parallel_ranks_takes_the_steps_of_one(trainer, one_process):
    layout = "CP2 x DP2, loss per token"
    assert_same_steps(trainer.run(layout, LAYOUTS[layout]), one_process)


def test_a_killed_run_of_four_processes_takes_the_steps_of_one(trainer, one_process, killed):
    resumed = trainer.run(killed, LAYOUTS["CP2 x TP2"])
    first = f"iteration {SAVED_AT + 1:8d}/"
    assert first in trainer.logs[killed] and " iteration        1/" not in trainer.logs[killed]
    assert_same_steps(resumed, one_process)  # those before its save too


@pytest.mark.release
def test_another_layout_goes_on_from_the_checkpoint(trainer, one_process, killed):
    curve = trainer.go_on("CP4", LAYOUTS["CP4"], killed)
    assert_same_steps(curve, one_process, range(SAVED_AT + 1, STEPS + 1))


@pytest.mark.release
def test_the_second_stage_of_the_progressive_walk_takes_the_steps_of_one_process(trainer):
    trainer.first_stage("stage A")
    reference = trainer.second_stage("stage B", ONE, "stage A")
    curve = trainer.second_stage("stage B, CP2", LAYOUTS["CP2"], "stage A")
    assert (
        "factors replaced (--longrope-replace-factors): 256 tokens" in trainer.logs["stage B, CP2"]
    )
    assert_same_steps(curve, reference, range(1, STAGE_STEPS + 1))
