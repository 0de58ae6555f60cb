"""A forked process and a real one do the same: the same command both ways, and what comes out."""

import json
import os
import shlex
import signal
import subprocess
import time

import launching
import pytest
from launching import Command, Ranks, pretrain_command, train
from tiny_training import MODEL, yarn_config

pytest.importorskip("megatron.training")
pytestmark = [pytest.mark.slow, pytest.mark.real_process]

# Whatever a process can see of how it was started, but for what fork_server.py names.
MIRROR = """\
import json, multiprocessing, os, signal, sys, threading
from multiprocessing.spawn import get_preparation_data
told = get_preparation_data("child")
# Importing torch's compiler of extensions adds a folder of setuptools.
sys.path = told["sys_path"] = [path for path in sys.path if not path.endswith("_vendor")]
ranks = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "name": __name__, "file": __file__,
    "package": __package__, "main": sys.modules["__main__"].__dict__ is globals(),
    "environment": {name: text for name, text in os.environ.items() if name not in ranks},
    "has_address": {name: name in os.environ for name in ranks[1:]},
    "signals": [repr(signal.getsignal(number)) for number in (2, 13, 15, 17)],
    "threads": threading.active_count(), "stdin": os.isatty(0),
    "leads_session": os.getsid(0) == os.getpid(),
    "for_workers": {key: repr(told[key]) for key in sorted(told) if "authkey" not in key},
}))
"""


def both_ways(command, directory):
    """Standard output of a command in forked processes and in real ones."""
    forked = launching.python(*command.arguments, processes=command.processes, directory=directory)
    real = subprocess.run(
        command.words(), cwd=directory, env=launching.environment(), text=True, timeout=600,
        capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return forked, real


@pytest.mark.parametrize(
    ("start", "processes"), [(("mirror.py",), 1), (("-m", "mirror"), 1), (("-m", "mirror"), 2)]
)
def test_a_process_finds_itself_started_as_a_real_one(tmp_path, start, processes):
    (tmp_path / "mirror.py").write_text(MIRROR)
    command = Command((*start, "--flag", "a b"), processes)
    forked, real = both_ways(command, tmp_path)
    assert forked.returncode == real.returncode == 0, forked.stderr + real.stderr
    seen = [sorted(done.stdout.splitlines()) for done in (forked, real)]
    assert len(seen[0]) == processes
    for ours, theirs in zip(*(map(json.loads, lines) for lines in seen), strict=True):
        assert ours == theirs


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('one sentence')", 1),
        ("raise ValueError('wrong')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'the last word')", 0),
    ],
)
def test_a_process_ends_as_a_real_one(tmp_path, code, status):
    (tmp_path / "end.py").write_text(code)
    forked, real = both_ways(Command((str(tmp_path / "end.py"),)), tmp_path)
    assert forked.returncode == real.returncode == status
    assert forked.stdout == real.stdout
    # The frames above the script's own differ.
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_a_rank_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\n"
                      "time.sleep(600)")  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        ranks = Ranks(Command((str(script),), 2), tmp_path, log, log)
        assert ranks.wait(60) == 1


def test_what_runs_still_is_ended_at_the_time_limit(tmp_path, monkeypatch):
    (tmp_path / "sleep.py").write_text("import os, time\nprint(os.getpid())\ntime.sleep(600)")
    launching.python("-m", "json.tool", "--help")  # the server runs
    monkeypatch.setattr(launching, "TIMEOUT_S", 2)
    with pytest.raises(AssertionError, match="no end after 2 s"):
        launching.run([Command((str(tmp_path / "sleep.py"),))], tmp_path)
    pid = int((tmp_path / "log.txt").read_text())
    for _ in range(500):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} runs still")


def test_a_training_run_prints_and_saves_the_same(tmp_path):
    yarn_config(2.0).save(tmp_path / "factors.json")
    options = "--context-parallel-size 2 --train-iters 2 --save-interval 2 --save kept"
    options = [*shlex.split(options), "--longrope-config", str(tmp_path / "factors.json")]
    command = pretrain_command([*MODEL, *options], processes=2)
    forked = train([command], tmp_path / "forked")
    real = train([command.words()], tmp_path / "real")
    assert len(forked.losses) == 2
    assert forked.losses == real.losses and forked.gradient_norms == real.gradient_norms
    told = [[line for line in run.log.splitlines() if line[:2] == "> "] for run in (forked, real)]
    assert len(told[0]) > 4 and told[0] == told[1]
    # The folder's name is no argument's: pickle writes a string twice or refers to it, by identity.
    saved = [
        {path.relative_to(run): path.read_bytes() for path in run.rglob("kept/**/*.distcp")}
        for run in (tmp_path / "forked", tmp_path / "real")
    ]
    assert len(saved[0]) > 1 and saved[0] == saved[1]
