"""A real Slurm of two nodes on this machine: Debian's slurm-wlm and munge, started for a test."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

# Snakemake's job step drops SLURM_CONF from the environment: the default place is the only one.
CONFIG = Path("/etc/slurm/slurm.conf")
GPUS = CONFIG.with_name("gres.conf")
NODES = ("one", "two")


def why_not() -> str | None:
    """Say why Slurm can't be started here, or None."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    search = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    if missing := [name for name in programs if shutil.which(name, path=search) is None]:
        return f"{missing[0]} is not installed (Debian: slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    return f"{CONFIG} exists: this machine belongs to a cluster" if CONFIG.exists() else None


def _configuration(folder: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={26901 + number} CPUs=4 "
        "Gres=gpu:1 RealMemory=4000"
        for number, name in enumerate(NODES)
    ]
    return f"""ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26900
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
ReturnToService=2
SwitchType=switch/none
GresTypes=gpu
MinJobAge=600
KillWait=5
{chr(10).join(lines)}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Start munged, slurmctld and two slurmd on the loopback interface; end them afterwards."""
    for path in (folder, *folder.parents):
        path.chmod(path.stat().st_mode | 0o111) if path.owner() == "root" else None
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(_configuration(folder))
    GPUS.write_text("Name=gpu File=/dev/null\n")  # none is there, but jobs ask for them
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin"}
    munge = [
        "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip
    try:
        for command in (munge, ["slurmctld", "-i"], *(["slurmd", "-N", name] for name in NODES)):
            subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True)
        deadline = time.monotonic() + 60
        while _idle() < len(NODES):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], timeout=30, capture_output=True)
        for path in sorted(folder.glob("*.pid"), reverse=True):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        CONFIG.unlink()
        GPUS.unlink(missing_ok=True)


def _idle() -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states", "idle"], capture_output=True, text=True
    )
    return done.stdout.count("\n")
