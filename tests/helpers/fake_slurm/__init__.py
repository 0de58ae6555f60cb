"""Enough of Slurm, on this machine, for the batch scripts of examples/cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launching import ROOT

CLUSTER = ROOT / "examples" / "cluster"
_BIN = Path(__file__).parent / "bin"


def environment(directory: Path, **variables: object) -> dict[str, str]:
    """What a command needs to find this Slurm, and `variables`; those of the cluster scripts and of
    torchrun that happen to be set are not passed on."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {
        **kept,
        "PATH": f"{_BIN}{os.pathsep}{kept['PATH']}",
        "FAKE_SLURM": str(directory),
        "LONGROPE_CLUSTER": str(CLUSTER),
        **{name: str(value) for name, value in variables.items()},
    }


def wait_until(
    condition: Callable[[], object], seconds: float, told: Callable[[], str] = str
) -> None:
    """Until the condition holds; `told` is the text of the failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no end after {seconds} s\n{told()[-4000:]}"
        time.sleep(0.02)


def end_processes_in(directory: Path) -> None:
    """As when a node loses power: all processes that work in the directory or below, at once."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if Path(os.readlink(process / "cwd")).is_relative_to(directory):
                os.kill(int(process.name), signal.SIGKILL)


class Job:
    """A submitted job."""

    def __init__(self, directory: Path, script: str, *arguments: object, **variables: object):
        self._environment = environment(directory, **variables)
        command = ["sbatch", "--parsable", str(CLUSTER / "slurm" / script), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=directory, env=self._environment, capture_output=True, text=True,
            check=True, timeout=120,
        )  # fmt: skip
        self.id = done.stdout.strip()
        self._folder = directory / self.id

    @property
    def log(self) -> str:
        """What it wrote, over all restarts."""
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether squeue still shows it."""
        command = ["squeue", "--noheader", "--jobs", self.id]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        return bool(done.stdout.strip())

    def signal(self, number: signal.Signals) -> None:
        """To the batch script alone, as --signal=B:... does."""
        os.kill(int((self._folder / "batch").read_text()), number)

    def wait_for_log(self, text: str, seconds: float = 300) -> None:
        """Until the log has the text."""
        wait_until(lambda: text in self.log, seconds, lambda: self.log)

    def wait(self, seconds: float = 300) -> int:
        """The batch script's last exit status."""
        status = self._folder / "status"
        wait_until(status.exists, seconds, lambda: self.log)
        return int(status.read_text())
