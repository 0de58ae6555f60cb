"""The Slurm profile on a real Slurm of two nodes, for `LONGROPE_TEST_SLURM=1`.

It writes Slurm's configuration under /etc and starts daemons as root, so it is never run unasked.
"""

import os
import subprocess
import sys
from pathlib import Path

import loopback_slurm
import pytest

pytest.importorskip("snakemake_executor_plugin_slurm")
ROOT = Path(__file__).parents[2]
WHY_NOT = (
    loopback_slurm.why_not()
    if os.environ.get("LONGROPE_TEST_SLURM") == "1"
    else "writes /etc/slurm and starts daemons: only with LONGROPE_TEST_SLURM=1"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.release,
    pytest.mark.one_release,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
# `met` shows that agents on both nodes met; `long` is stopped at half of its 8 minutes.
SNAKEFILE = f"""
include: "{ROOT}/examples/workflow/common.smk"

rule all:
    default_target: True
    input: "met.done", "long.done"

rule met:
    output: "met.done"
    resources: nodes=2, tasks=2, gpus_per_node=1, slurm_extra="--gpus-per-node=1"
    log: "logs/met.log"
    shell:
        '''
        log_to {{log}}
        on_gpus {{resources.gpus_per_node}} longrope pretrain {{config[script]}} met
        stamp {{output}}
        '''

rule long:
    output: "long.done"
    params: "--exit-signal-handler --exit-signal SIGUSR1"
    resources: nodes=1, tasks=1, gpus_per_node=1, slurm_extra="--gpus-per-node=1", runtime=8
    log: "logs/long.log"
    shell:
        '''
        log_to {{log}}
        begin long
        on_gpus {{resources.gpus_per_node}} longrope pretrain {{config[script]}} long {{params}}
        stamp {{output}}
        '''
"""
# In place of Megatron's script: says who is there; the long one waits for the signal to save, once.
SCRIPT = """
import os, pathlib, signal, sys, time
if sys.argv[1] == "met":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, os.environ["SLURMD_NODENAME"])
    print("met:", sorted(found), flush=True)
else:
    folder = pathlib.Path("long"); folder.mkdir(exist_ok=True)
    if (folder / "checkpoint").exists():
        print("went on from the checkpoint", flush=True)
        sys.exit()
    def save(*_):
        (folder / "checkpoint").touch()
        sys.exit()
    signal.signal(signal.SIGUSR1, save)
    time.sleep(600)
"""


def test_rules_run_as_jobs_on_several_nodes_and_go_on_after_their_time_limit(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "slurm").mkdir()
    with loopback_slurm.slurm(tmp_path / "slurm"):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "examples/profiles/slurm"),
             "--latency-wait", "10",
             "--slurm-init-seconds-before-status-checks", "5",
             # By default it asks sacct wherever that program is, with accounting or without.
             "--slurm-status-command", "squeue",
             "--config", "output=out", f"script={tmp_path}/script.py"],
            cwd=tmp_path,
            # The nodes' names are none of the network's.
            env={**os.environ, "LONGROPE_DEVICE": "cpu", "RDZV_ENDPOINT": "localhost:20480"},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    logs = {name: (tmp_path / f"out/logs/{name}.log").read_text() for name in ("met", "long")}
    assert done.returncode == 0, done.stderr[-4000:] + logs["met"] + logs["long"]
    assert logs["met"].count("met: ['one', 'two']") == 2
    assert "stopped; the same command goes on" in logs["long"]
    assert "went on from the checkpoint" in logs["long"]
