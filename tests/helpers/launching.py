"""Start `longrope pretrain` and other commands as users do, and read Megatron's log.

A :class:`Command` runs in processes that a fork server starts (tests/helpers/fork_server.py), which
spares each of them the import of torch and Megatron. An :class:`Agent` is torchrun itself in such a
process, and its ranks are others. A list of words is a real process: for what has to be one, and
for scripts that prepare Megatron in their own way.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fork_server import ForkedProcess, ForkServer

import megatron_longrope

ROOT = Path(megatron_longrope.__file__).parents[1]
SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "pretrain_gpt.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PRETRAIN = ("-m", "megatron_longrope", "pretrain")
LONGROPE = ("-m", "megatron_longrope")
# Nothing here takes a tenth of it; a machine that does other work at the same time may.
TIMEOUT_S = 600
HOST = """\
import os, runpy, sys
from pathlib import Path
from megatron_longrope.integration import cpu_host, launcher
cpu_host.prepare_environment()
rewrite = cpu_host.cpu_arguments(sys.argv[2:])
cpu_host.enable()
cpu_host.start_results_server()
launcher._default_rendezvous()
from megatron.core.datasets import utils
utils.compile_helpers = lambda: None  # the wheel ships no Makefile
from megatron.core import __version__ as release
release = release.partition("+")[0]
assert release == os.environ.get("LONGROPE_EXPECT_MEGATRON", release)
if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    sys.argv = [sys.argv[1], *rewrite.arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that runs another, its first argument, on the CPU without the launcher and its hooks."""

# What torchrun waits between SIGTERM and SIGKILL for its other processes, when one has failed.
_AGENT_PATIENCE_S = 30
_MOST_SERVERS = 2

_CALL = Path(__file__).with_name("call_function.py")
# What torchrun tells its processes, what Megatron, lm-eval and torch's compiler set as they go, and
# what pytest tells whoever looks.
_OF_A_RANK = re.compile(
    "RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|ROLE_NAME|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_ADDR|"
    "MASTER_PORT|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|"
    "NVTE_(FLASH|FUSED|UNFUSED)_ATTN|HF_XET_HIGH_PERFORMANCE|TORCHINDUCTOR_CACHE_DIR|"
    "PYTEST_CURRENT_TEST"
)

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


@dataclass(frozen=True)
class Command:
    """What Python is to run, in one process or in several that torchrun would start."""

    arguments: tuple[str, ...]
    """`-m` and a module, or a script, and what follows."""

    processes: int = 1

    def words(self) -> list[str]:
        """The command line of one real process, or of one torchrun agent with several."""
        if self.processes == 1:
            return [sys.executable, *self.arguments]
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
        ranks = ("--nproc-per-node", str(self.processes))
        return [*TORCHRUN, *ranks, *rendezvous, *self.arguments]


@dataclass(frozen=True)
class Agent:
    """A torchrun agent, which can be killed and meet others, by the arguments of torchrun."""

    arguments: tuple[str, ...]


def pretrain_command(
    arguments: Sequence[str], *, processes: int = 1, script: Path = SCRIPT
) -> Command:
    """The command of `longrope pretrain` on the CPU."""
    return Command((*PRETRAIN, str(script), "--cpu", *arguments), processes)


def two_agents(command: Sequence[str], *, processes: int = 1) -> list[Agent]:
    """A command under two torchrun agents, which meet on the loopback interface."""
    agent = ("--nnodes", "2", "--nproc-per-node", str(processes))
    agent += ("--rdzv-endpoint", f"localhost:{free_port()}")
    return [Agent((*agent, "--node-rank", str(rank), *command)) for rank in range(2)]


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of the loopback interface that nobody else is given while these tests run.

    The socket stays bound: the kernel hands its port to nobody who asks for any. It does not
    listen: a server that may reuse addresses, as those of torch may, takes the port by number.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("localhost", 0))
    _reserved.append(reserved)
    return reserved.getsockname()[1]


def environment() -> dict[str, str]:
    """Of started processes: that of the tests, without a rank, with our packages and no GPU."""
    ours = {name: text for name, text in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**ours, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


_servers: dict[tuple[bool, frozenset], ForkServer] = {}
_servers_lock = threading.Lock()  # forked_commands.py has a thread for each command


def _server(environment: dict[str, str], hosted: bool) -> ForkServer:
    """The server for this environment; those of others are closed when there are too many."""
    key = (hosted, frozenset(environment.items()))
    with _servers_lock:
        if key not in _servers:
            if len(_servers) == _MOST_SERVERS:
                _servers.pop(next(iter(_servers))).close()
            _servers[key] = ForkServer(environment, hosted=hosted)
        _servers[key] = _servers.pop(key)  # the last one used is the last to go
        return _servers[key]


@atexit.register
def _close_servers() -> None:
    for server in _servers.values():
        server.close()


def spawn(function: Callable[..., None], arguments: tuple, processes: int) -> None:
    """Call `function(rank, *arguments)` of a module in several processes, as `mp.spawn` does."""
    module = sys.modules[function.__module__]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        call = (module.__name__, function.__name__, arguments)
        (directory / "call").write_bytes(pickle.dumps((sys.path, *call)))
        command = Command((str(_CALL), str(directory / "call")))
        with (directory / "log").open("w") as log:
            ranks = Ranks(
                command, Path.cwd(), log, log,
                [{"SPAWNED_RANK": str(rank)} for rank in range(processes)],
            )  # fmt: skip
            try:
                status = ranks.wait(TIMEOUT_S)
            finally:
                ranks.end()
        assert status == 0, _tail(directory / "log")


class Ranks:
    """The forked processes of a command, in the role of the torchrun agent where it has several.

    Args:
        command (Command): What they run.
        directory (Path): To run in.
        stdout, stderr (IO): Of all of them.
        variables (Sequence[Mapping[str, str]], optional): Of each process, beside or in place of
            those of the tests. Defaults to what torchrun tells each of several.
    """

    def __init__(
        self,
        command: Command,
        directory: Path,
        stdout,
        stderr,
        variables: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        shared = environment()
        hosted = "pretrain" in command.arguments and "--cpu" in command.arguments
        server = _server(shared, hosted)
        self._processes: list[ForkedProcess] = []
        if variables is None and command.processes > 1:
            # Bound to a free port by the kernel, and never free again in between.
            self._store = torch.distributed.TCPStore(
                "localhost", 0, is_master=True, wait_for_workers=False
            )
            variables = [
                self._variables(rank, command.processes) for rank in range(command.processes)
            ]
        for own in variables or [{}]:
            process = server.fork(
                command.arguments, {**shared, **own}, directory, stdout, stderr,
                new_session="RANK" in own,  # as torchrun's
            )  # fmt: skip
            self._processes.append(process)

    def _variables(self, rank: int, count: int) -> dict[str, str]:
        """What torchrun tells its processes."""
        size, number = str(count), str(rank)
        return {
            "RANK": number, "LOCAL_RANK": number, "ROLE_RANK": number, "GROUP_RANK": "0",
            "ROLE_NAME": "default", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "ROLE_WORLD_SIZE": size, "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port), "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        }  # fmt: skip

    def wait(self, timeout: float) -> int:
        """The exit status: of the process, or 1 where one of several has failed.

        Raises:
            subprocess.TimeoutExpired: They run still.
        """
        if len(self._processes) == 1:
            return self._processes[0].wait(timeout)
        deadline = time.monotonic() + timeout
        while running := [item for item in self._processes if item.poll() is None]:
            if any(item.returncode for item in self._processes):
                self.end()
                return 1
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("forked processes", timeout)
            select.select(running, [], [], left)
        return int(any(item.returncode for item in self._processes))

    def kill(self) -> None:
        """Kill -9 all of them."""
        for item in self._processes:
            item.kill()

    def end(self) -> None:
        """End what runs still, as torchrun does."""
        for item in self._processes:
            item.terminate()
        deadline = time.monotonic() + _AGENT_PATIENCE_S
        for item in self._processes:
            try:
                item.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                item.kill()
                item.wait()


def start_agent(
    agent: Agent,
    directory: Path,
    stdout,
    stderr,
    python: Path,
    variables: Mapping[str, str] | None = None,
) -> Ranks:
    """Start torchrun in a forked process; its ranks are what `python` of forked_commands starts."""
    command = Command(("-m", "torch.distributed.run", *agent.arguments))
    own = [{**(variables or {}), "PYTHON_EXEC": str(python)}]
    return Ranks(command, directory, stdout, stderr, own)


class RealProcess:
    """A process of its own, with the methods of :class:`Ranks`."""

    def __init__(self, words: Sequence[str], directory: Path, stdout, stderr) -> None:
        self._process = subprocess.Popen(
            words, cwd=directory, env=environment(), stdout=stdout, stderr=stderr
        )

    def wait(self, timeout: float) -> int:
        """See :meth:`Ranks.wait`."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """See :meth:`Ranks.end`; torchrun ends its processes on SIGTERM."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2 * _AGENT_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def run(
    commands: Sequence[Command | Agent | Sequence[str]], directory: Path
) -> tuple[list[int], str]:
    """Run commands side by side in `directory`: their exit statuses and their common log."""
    from forked_commands import forked_commands

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "log.txt"
    started = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(path.open("w"))
        if any(isinstance(command, Agent) for command in commands):
            python = stack.enter_context(forked_commands()) / "python"
        try:
            for command in commands:
                if isinstance(command, Agent):
                    started.append(start_agent(command, directory, log, log, python))
                elif isinstance(command, Command):
                    started.append(Ranks(command, directory, log, log))
                else:
                    started.append(RealProcess(command, directory, log, log))
            deadline = time.monotonic() + TIMEOUT_S
            statuses = [item.wait(max(0, deadline - time.monotonic())) for item in started]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {TIMEOUT_S} s\n{_tail(path)}") from None
        finally:
            for item in started:
                item.end()
    return statuses, path.read_text()


def python(
    *arguments: object,
    processes: int = 1,
    directory: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments`, or torchrun with several processes, and take what it prints.

    Args:
        arguments (object): `-m` and a module, or a script, and what follows; taken as text.
        processes (int): How many of them, each a rank. Defaults to 1, without a rank.
        directory (Path, optional): To run in. Defaults to that of the tests.
        variables (Mapping[str, str], optional): Of the environment of one process, beside those of
            the tests. What torch, Megatron and transformers read on import does not see them.

    Raises:
        subprocess.TimeoutExpired: There is no end.
    """
    command = Command(tuple(map(str, arguments)), processes)
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        own = [variables] if variables else None
        ranks = Ranks(command, directory or Path.cwd(), stdout, stderr, own)
        try:
            status = ranks.wait(TIMEOUT_S)
        finally:
            ranks.end()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(command.words(), status, *texts)


def train(commands: Sequence[Command | Sequence[str]], directory: Path) -> TrainingRun:
    """Run commands that must succeed and log at least one iteration."""
    statuses, _ = run(commands, directory)
    path = directory / "log.txt"
    result = TrainingRun.from_log(path.read_text())
    if any(statuses) or not result.losses:
        raise AssertionError(f"exit statuses {statuses}\n{_tail(path)}")
    return result


def _tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
