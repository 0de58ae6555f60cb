"""The scripts of examples/cluster with real jobs, as torchrun agents on the loopback interface.

An agent that is killed and comes back, and a Slurm job that is requeued at its time limit, must
change no digit of a loss curve and no factor of a search.
"""

import re
import shlex
import signal
import subprocess
import sys

import pytest
from fake_slurm import CLUSTER, Job, end_processes_in, environment, wait_until
from forked_commands import forked_commands
from launching import ROOT, SCRIPT, free_port, pretrain_command, train
from synthetic_search import drop_seconds
from tiny_training import MODEL, yarn_config

from megatron_longrope.cli import main
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.factor_search.session import num_journaled

pytest.importorskip("megatron.training")
pytestmark = [pytest.mark.slow, pytest.mark.one_release]

ITERATIONS = 24
NUM_EVALUATIONS = 120
_ITERATION = re.compile(r" iteration +(\d+)/.*?lm loss: (\S+) \|.*?grad norm: (\S+) \|")
# Of MODEL, what the script does not set itself, or sets for a larger model.
TINY = shlex.join(MODEL[: MODEL.index("--micro-batch-size")]) + (
    " --seed 1 --tokenizer-type NullTokenizer --vocab-size 127"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, data):
    """Variables of the scripts: a model pre-trained on 64 tokens, its data, factors for 128."""
    directory = tmp_path_factory.mktemp("inputs")
    yarn_config(2).save(directory / "factors.json")
    words = [*MODEL, "--seq-length", "64", "--max-position-embeddings", "64", "--vocab-size", "127"]
    train(
        [pretrain_command([*words, "--save", str(directory / "base"), "--save-interval", "2"])],
        directory / "log",
    )
    return {
        "PYTHON": sys.executable, "PYTHONPATH": ROOT, "LONGROPE_DEVICE": "cpu",
        "BASE": directory / "base", "DATA": data["search"],
        "FACTORS": directory / "factors.json", "TOKENIZER": data["tokenizer"], "SCRIPT": SCRIPT,
        "SEQ_LENGTH": 128, "TRAIN_ITERS": ITERATIONS, "GLOBAL_BATCH": 4, "LEARNING_RATE": "1e-3",
        "WARMUP": 2, "TP": 1, "CP": 2, "EXTRA_ARGS": TINY,
    }  # fmt: skip


def curve(log):
    """Loss and gradient norm, as printed, of every iteration; the last word on each counts."""
    return {int(number): numbers for number, *numbers in _ITERATION.findall(log)}


def assert_same_curve(found, undisturbed, resumed):
    """Equal digit for digit, when a process began with iteration `resumed`.

    Megatron's log does not start its mean anew after the first iteration of a process: for the
    second one it prints the mean of both losses.
    """
    found = dict(found)
    loss, norm = found.pop(resumed + 1)
    both = [float(undisturbed[number][0]) for number in (resumed, resumed + 1)]
    assert float(loss) == pytest.approx(sum(both) / 2, abs=1e-6)
    assert norm == undisturbed[resumed + 1][1]
    assert found == {n: numbers for n, numbers in undisturbed.items() if n != resumed + 1}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The loss curve of a run that nothing happens to; the fork server starts its ranks."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with forked_commands() as folder:
        variables = {**inputs, "PYTHON": folder / "python", "NPROC_PER_NODE": 2, "SAVE": "save"}
        agent = Agent(directory, "finetune.sh", **variables)
        assert agent.wait() == 0, agent.log
    found = curve(agent.log)
    assert list(found) == list(range(1, ITERATIONS + 1))
    return found


@pytest.fixture
def agents():
    """The Python that scripts start torchrun with: agents and ranks are processes, but forked."""
    with forked_commands(agents=True) as folder:
        yield folder / "python"


@pytest.fixture(autouse=True)
def nothing_left_behind(request, tmp_path):
    """A test that fails leaves no job running, before the fork server that would wait for it."""
    if "agents" in request.fixturenames:
        request.getfixturevalue("agents")
    yield
    end_processes_in(tmp_path)


class Agent:
    """A script of examples/cluster/torchrun on a node of its own, which is a directory here."""

    def __init__(self, node, script, *arguments, **variables):
        node.mkdir(exist_ok=True)
        self._node, self._path = node, node / "log"
        with self._path.open("a") as log:
            self._process = subprocess.Popen(
                [str(CLUSTER / "torchrun" / script), *arguments], cwd=node, stdout=log, stderr=log,
                env=environment(node, **variables), start_new_session=True,
            )  # fmt: skip

    @property
    def log(self):
        return self._path.read_text(errors="replace")

    def wait(self, seconds=300):
        wait_until(lambda: self._process.poll() is not None, seconds, lambda: self.log)
        return self._process.returncode

    def lose_power(self):
        """The script, its agent and their workers at once."""
        end_processes_in(self._node)
        self._process.wait()


def rendezvous():
    """Variables of two nodes. The first has the rendezvous; the second, by its address, rank 0."""
    endpoint = f"localhost:{free_port()}"
    common = {"NNODES": 2, "NPROC_PER_NODE": 1, "RDZV_ENDPOINT": endpoint}
    return (
        {**common, "LOCAL_ADDR": "127.0.0.2", "RDZV_CONF": "is_host=1"},
        {**common, "LOCAL_ADDR": "127.0.0.1", "RDZV_CONF": "is_host=0"},
    )


@pytest.mark.release  # torchrun's part; tests/distributed/test_training_curves.py kills and goes on
def test_a_killed_agent_comes_back_and_the_loss_curve_does_not_know(
    inputs, undisturbed, agents, tmp_path
):
    variables = {**inputs, "PYTHON": agents, "SAVE": tmp_path / "save", "SAVE_INTERVAL": 5}
    first, second = rendezvous()
    survivor = Agent(tmp_path / "first", "finetune.sh", **variables, **first)
    lost = Agent(tmp_path / "second", "finetune.sh", **variables, **second)
    # The last rank is the one that prints the curve.
    wait_until(lambda: 7 in curve(survivor.log), 300, lambda: survivor.log + lost.log)
    lost.lose_power()
    reached = max(curve(survivor.log))
    back = Agent(tmp_path / "second", "finetune.sh", **variables, **second)
    assert [survivor.wait(), back.wait()] == [0, 0], survivor.log + back.log
    resumed = 5 * (reached // 5) + 1
    numbers = [int(number) for number, *_ in _ITERATION.findall(survivor.log)]
    assert numbers == [*range(1, reached + 1), *range(resumed, ITERATIONS + 1)]
    assert_same_curve(curve(survivor.log), undisturbed, resumed)


@pytest.mark.release
@pytest.mark.real_process  # signals pass torchrun by, to its own children
def test_a_job_saves_at_its_time_limit_requeues_itself_and_ends_with_the_same_curve(
    inputs, undisturbed, tmp_path
):
    port = rendezvous()[0]["RDZV_ENDPOINT"].partition(":")[2]
    job = Job(
        tmp_path, "stage.sbatch", "finetune", **inputs, NPROC_PER_NODE=1, SAVE="save",
        SAVE_INTERVAL=1000, RDZV_PORT=port,
    )  # fmt: skip
    wait_until(lambda: 7 in curve(job.log), 300, lambda: job.log)
    job.signal(signal.SIGUSR1)
    job.wait_for_log("requeueing job")
    stopped = re.search(rf"stopped at iteration (\d+) of {ITERATIONS}", job.log)[1]
    assert 7 <= int(stopped) < ITERATIONS
    assert job.wait() == 0, job.log
    assert "restart 1 of" in job.log and "restart 2 of" not in job.log
    assert [int(number) for number, *_ in _ITERATION.findall(job.log)] == list(undisturbed)
    assert_same_curve(curve(job.log), undisturbed, int(stopped) + 1)


@pytest.mark.release
def test_a_search_whose_first_rank_is_killed_ends_with_the_same_factors(inputs, agents, tmp_path):
    flags = f"--max-evaluations {NUM_EVALUATIONS} --original-length 64 --num-samples 3 "
    flags += "--tokens-per-forward 256 --start-tokens 0,4 --attention-factor-policy su --no-figures"
    whole = tmp_path / "whole.json"
    words = ["--load", inputs["BASE"], "--data", inputs["DATA"], "--target-length", "128"]
    assert main(["search", *map(str, words), "--output", str(whole), *flags.split()]) == 0
    variables = {**inputs, "PYTHON": agents}
    command = ["agent.sh", "-m", "megatron_longrope", "search", *map(str, words), *flags.split()]
    command += ["--output", str(tmp_path / "f.json"), "--resume"]
    journal = tmp_path / "f.journal.jsonl"
    first, second = rendezvous()
    survivor = Agent(tmp_path / "first", *command, **variables, **first)
    lost = Agent(tmp_path / "second", *command, **variables, **second)

    wait_until(lambda: num_journaled(journal) >= 2, 300, lambda: survivor.log + lost.log)
    lost.lose_power()
    assert num_journaled(journal) < NUM_EVALUATIONS
    back = Agent(tmp_path / "second", *command, **variables, **second)
    assert [survivor.wait(), back.wait()] == [0, 0], survivor.log + back.log
    factors = [LongRopeConfig.load(path).factor_sets for path in (tmp_path / "f.json", whole)]
    assert [item.rescale_factors for item in factors[0]] == [
        item.rescale_factors for item in factors[1]
    ]
    assert drop_seconds(journal) == drop_seconds(tmp_path / "whole.journal.jsonl")
