"""Start `longrope pretrain` as users do and read Megatron's log."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_longrope

ROOT = Path(megatron_longrope.__file__).parents[1]
SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "pretrain_gpt.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PRETRAIN = ("-m", "megatron_longrope", "pretrain")
TIMEOUT_S = 180

_ITERATION = re.compile(r" iteration +\d+/.*?lm loss: (\S+) \|.*?grad norm: (\S+) \|")
_VALIDATION = re.compile(r" validation loss at .*? on (\w+) set \| lm loss value: (\S+) \|")


@dataclass(frozen=True)
class TrainingRun:
    """A finished run and the numbers in its log, as they were printed."""

    log: str
    losses: tuple[str, ...]
    gradient_norms: tuple[str, ...]
    evaluations: tuple[tuple[str, str], ...]

    @classmethod
    def from_log(cls, log: str) -> TrainingRun:
        iterations = _ITERATION.findall(log)
        return cls(
            log=log,
            losses=tuple(loss for loss, _ in iterations),
            gradient_norms=tuple(norm for _, norm in iterations),
            evaluations=tuple(_VALIDATION.findall(log)),
        )

    def numbers(self) -> list[float]:
        """Training losses, then evaluation losses."""
        return [float(text) for text in (*self.losses, *(loss for _, loss in self.evaluations))]


def pretrain_command(
    arguments: Sequence[str], *, processes: int = 1, script: Path = SCRIPT
) -> list[str]:
    """The command of one process, or of one torchrun agent with several."""
    command = [*PRETRAIN, str(script), "--cpu", *arguments]
    if processes == 1:
        return [sys.executable, *command]
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    return [*TORCHRUN, "--nproc-per-node", str(processes), *rendezvous, *command]


def two_agent_commands(arguments: Sequence[str]) -> list[list[str]]:
    """Two torchrun agents with one training process each."""
    return two_agents((*PRETRAIN, str(SCRIPT), "--cpu", *arguments))


def two_agents(command: Sequence[str], *, processes: int = 1) -> list[list[str]]:
    """A command under two torchrun agents, which meet on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    agent = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(processes))
    agent += ("--rdzv-endpoint", endpoint)
    return [[*agent, "--node-rank", str(rank), *command] for rank in range(2)]


def run(commands: Sequence[Sequence[str]], directory: Path) -> tuple[list[int], str]:
    """Run commands side by side in `directory`: their exit statuses and their common log."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "log.txt"
    with path.open("w") as log:
        children = [
            subprocess.Popen(
                command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            for command in commands
        ]
        deadline = time.monotonic() + TIMEOUT_S
        try:
            statuses = [child.wait(deadline - time.monotonic()) for child in children]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {TIMEOUT_S} s\n{_tail(path)}") from None
        finally:
            for child in children:  # torchrun ends its workers on SIGTERM
                if child.poll() is None:
                    child.terminate()
                    try:
                        child.wait(10)
                    except subprocess.TimeoutExpired:
                        child.kill()
    return statuses, path.read_text()


def train(commands: Sequence[Sequence[str]], directory: Path) -> TrainingRun:
    """Run commands that must succeed and log at least one iteration."""
    statuses, _ = run(commands, directory)
    path = directory / "log.txt"
    result = TrainingRun.from_log(path.read_text())
    if any(statuses) or not result.losses:
        raise AssertionError(f"exit statuses {statuses}\n{_tail(path)}")
    return result


def _tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
