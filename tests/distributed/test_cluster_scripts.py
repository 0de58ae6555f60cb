"""The scripts of examples/cluster without any training: what they refuse, start, and requeue."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_slurm import CLUSTER, Job, environment, wait_until

from megatron_longrope.plan import Cluster, plan_command, rank

pytestmark = pytest.mark.one_release

SCRIPTS = sorted(path for path in CLUSTER.rglob("*") if path.suffix in (".sh", ".sbatch"))
NEEDED = {"BASE": "base", "SAVE": "save", "DATA": "data", "FACTORS": "f.json", "TOKENIZER": "tok"}
PATIENCE_S = 120  # only for what hangs

# The first time it works until it is told to stop; the second time it ends by itself.
WORK = """
echo started >> starts
(( $(wc -l < starts) > 1 )) && exit ${LAST_STATUS:-0}
trap 'echo stopping; exit 9' TERM
echo ready
while :; do sleep 0.05; done
"""
STUBBORN = WORK.replace("echo stopping; exit 9", ":")
SLOW = WORK.replace("echo stopping", "sleep 5; echo stopping")


def wait_for_work(job):
    """Until the command is under way."""
    wait_until(lambda: "\nready\n" in job.log, PATIENCE_S, lambda: job.log)


def run(script, directory, *arguments, **variables):
    return subprocess.run(
        [str(CLUSTER / "torchrun" / script), *arguments], cwd=directory, text=True,
        env=environment(directory, **variables), capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip


@pytest.fixture
def python(tmp_path):
    """An interpreter that only writes down how it was called, and pretends to have trained."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, shlex, sys\n"
        "open('called', 'a').write(shlex.join(sys.argv[1:]) + chr(10))\n"
        "if 'REACHES' in os.environ:\n"
        "    tracker = os.environ['SAVE'] + '/latest_checkpointed_iteration.txt'\n"
        "    open(tracker, 'w').write(os.environ['REACHES'])\n"
        "sys.exit(int(os.environ.get('ENDS_WITH', '0')))\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def training(tmp_path, python):
    """Variables of a fine-tuning run whose inputs exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("9")
    (tmp_path / "script.py").touch()
    (tmp_path / "data.idx").touch()
    return {**NEEDED, "PYTHON": python, "SCRIPT": "script.py", "LONGROPE_DEVICE": "cpu"}


def called(directory):
    return [shlex.split(line) for line in (directory / "called").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) == script.read_text().startswith("#!")
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, "-x", str(script)], check=True, cwd=CLUSTER.parents[1])


@pytest.mark.parametrize(
    ("script", "variables", "sentence"),
    [
        ("finetune.sh", {}, "BASE is not set; it must name the Megatron checkpoint to start from"),
        ("finetune.sh", {**NEEDED, "FACTORS": ""}, "FACTORS is not set; it must name the factor"),
        ("finetune.sh", NEEDED, "BASE base has no latest_checkpointed_iteration.txt"),
        *(
            (
                "finetune.sh",
                {**NEEDED, "EXTRA_ARGS": f"--seed 7\n{words}"},
                f"EXTRA_ARGS has {told}",
            )
            for words, told in (
                ("--train-iters 9", "--train-iters; set TRAIN_ITERS instead"),
                ("--train-samples=9", "--train-samples; set TRAIN_ITERS instead"),
                ("--save elsewhere", "--save; set SAVE instead"),
                ("--load=elsewhere", "--load; leave it out: the run starts from BASE and goes on"),
            )
        ),
        ("agent.sh", {}, "no command; give -m megatron_longrope COMMAND ... or a program"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(tmp_path, script, variables, sentence):
    done = run(script, tmp_path, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"longrope {script}: error: {sentence}")
    assert done.stderr.count("\n") == 1


def test_several_nodes_need_a_place_to_meet_and_every_process_a_gpu(tmp_path):
    done = run("agent.sh", tmp_path, "-m", "megatron_longrope", NNODES=2, LONGROPE_DEVICE="cpu")
    assert done.returncode == 2
    assert "RDZV_ENDPOINT is not set; it must name HOST:PORT of one of the 2 nodes" in done.stderr
    done = run("agent.sh", tmp_path, "-m", "megatron_longrope", NPROC_PER_NODE=99)
    assert done.returncode == 2
    assert "GPUs and NPROC_PER_NODE is 99; lower it, take the node out" in done.stderr


def test_training_starts_from_the_base_saves_in_time_and_takes_more_flags_last(tmp_path, training):
    done = run(
        "finetune.sh", tmp_path, **training, NNODES=2, RDZV_ENDPOINT="node1:29400", REACHES=400,
        MAX_RESTARTS=5, RDZV_CONF="join_timeout=60", EXTRA_ARGS="--seed 7  --lr 1e-4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (words,) = called(tmp_path)
    split = words.index("megatron_longrope")
    agent, flags = shlex.join(words[:split]), words[split:]
    assert agent == (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 8 --max-restarts 5 --rdzv-backend "
        "c10d --rdzv-endpoint node1:29400 --rdzv-id longrope --rdzv-conf join_timeout=60 -m"
    )
    assert flags[1:4] == ["pretrain", "script.py", "--cpu"]
    assert flags[-4:] == ["--seed", "7", "--lr", "1e-4"]
    text = shlex.join(flags)
    for part in (
        "--pretrained-checkpoint base --load save --save save --save-interval 50",
        "--exit-signal-handler --exit-signal SIGUSR1",
        "--seq-length 131072 --max-position-embeddings 131072",
        "--no-create-attention-mask-in-dataloader",
    ):
        assert part in text
    chosen = plan_command([*flags, "--vocab-size", "32000"], "h100", 16)
    best = rank(chosen.model, chosen.training, Cluster(chosen.gpu, 16))[0]
    assert chosen.fits and chosen.hours <= 1.1 * best.hours
    assert replace(chosen, training=replace(chosen.training, length=262144)).fits


def test_more_flags_may_stand_on_lines_that_were_pasted(tmp_path, training):
    pasted = "\n  --seed 7 \\\n  --lr 1e-4 \\\n\n--save-interval=5 \\"
    run("finetune.sh", tmp_path, **training, EXTRA_ARGS=pasted)
    assert called(tmp_path)[0][-5:] == ["--seed", "7", "--lr", "1e-4", "--save-interval=5"]


def test_samples_are_indexed_anew_for_another_set_under_the_same_name(tmp_path, training):
    for lengths in ("one", "another", "one"):
        (tmp_path / "data.idx").write_text(lengths)
        run("finetune.sh", tmp_path, **training)
    caches = [words[words.index("--data-cache-path") + 1] for words in called(tmp_path)]
    assert caches[0] == caches[2] != caches[1]
    assert all(cache.startswith("save/cache/") for cache in caches)
    (tmp_path / "data.idx").unlink()
    done = run("finetune.sh", tmp_path, **training)
    assert done.returncode == 2
    assert "error: DATA data has no .idx; it must be the prefix of a set that" in done.stderr


def test_the_exit_status_tells_a_complete_run_from_one_that_goes_on(tmp_path, training):
    def ends(**variables):
        return run("finetune.sh", tmp_path, **training, TRAIN_ITERS=6, **variables)

    assert ends(ENDS_WITH=3).returncode == 3
    partial = ends(REACHES=4)
    assert partial.returncode == 75
    assert "stopped at iteration 4 of 6; the same command goes on" in partial.stderr
    assert ends(REACHES=6).returncode == 0
    assert len(called(tmp_path)) == 3
    again = ends()
    assert again.returncode == 0
    assert "nothing to do: save has iteration 6 of 6" in again.stderr
    assert len(called(tmp_path)) == 3


# Under a stand-in for Slurm


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_ends_with_the_exit_status_of_its_command(tmp_path, status):
    job = Job(tmp_path, "stage.sbatch", "bash", "-c", f"exit {status}")
    assert job.wait(PATIENCE_S) == status
    assert not job.alive


def test_words_that_begin_with_m_run_under_one_agent_per_node(tmp_path, python):
    words = ("-m", "megatron_longrope", "search", "two words")
    job = Job(tmp_path, "stage.sbatch", *words, PYTHON=python, LONGROPE_DEVICE="cpu")
    assert job.wait(PATIENCE_S) == 0
    one, two = called(tmp_path)
    assert one == two
    assert one[-4:] == list(words)
    assert f"--rdzv-id {job.id}-0" in shlex.join(one)


@pytest.mark.parametrize("last", [0, 4])
def test_a_requeued_job_ends_with_the_status_of_its_last_start(tmp_path, last):
    job = Job(tmp_path, "stage.sbatch", "bash", "-c", WORK, LAST_STATUS=last)
    wait_for_work(job)
    job.signal(signal.SIGUSR1)
    job.wait_for_log("requeueing job")
    assert job.wait(PATIENCE_S) == last
    assert (tmp_path / "starts").read_text() == "started\n" * 2
    told = [job.log.index(part) for part in ("SIGUSR1", "stopping\n", "requeueing", "restart 1 of")]
    assert told == sorted(told)


@pytest.mark.parametrize("at_its_time_limit", [False, True])
def test_a_cancelled_job_stops_in_good_order_and_does_not_come_back(tmp_path, at_its_time_limit):
    work = SLOW if at_its_time_limit else WORK
    job = Job(tmp_path, "stage.sbatch", "bash", "-c", work, STOP_TIMEOUT=3)
    wait_for_work(job)
    if at_its_time_limit:
        job.signal(signal.SIGUSR1)
        job.wait_for_log("SIGUSR1")
    job.signal(signal.SIGTERM)
    assert job.wait(PATIENCE_S) == 143
    assert "stopping\n" in job.log and "requeueing" not in job.log


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MAX_REQUEUES": 0}, "restarted 0 times, MAX_REQUEUES; submit the job again to go on"),
        ({}, "Slurm refused; submit the job again to go on"),
    ],
)
def test_a_job_that_cannot_be_requeued_says_so_and_fails(tmp_path, variables, sentence):
    (tmp_path / "refuse").touch()
    job = Job(tmp_path, "stage.sbatch", "bash", "-c", WORK, **variables)
    wait_for_work(job)
    job.signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_S) == 75
    assert sentence in job.log


def test_a_command_that_does_not_stop_in_time_is_requeued_all_the_same(tmp_path):
    job = Job(tmp_path, "stage.sbatch", "bash", "-c", STUBBORN, STOP_TIMEOUT=0.5)
    wait_for_work(job)
    job.signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_S) == 0
    assert (tmp_path / "starts").read_text() == "started\n" * 2


def test_scripts_that_are_elsewhere_must_be_named(tmp_path):
    job = Job(tmp_path, "stage.sbatch", "true", LONGROPE_CLUSTER="absent")
    assert job.wait(PATIENCE_S) == 2
    assert "LONGROPE_CLUSTER absent has no slurm/job.sh; name the folder" in job.log
