"""What scripts of examples/ start, run by the fork server of the test process.

A workflow's rule calls `longrope`, `python` and `torchrun` by name, from the folder LONGROPE_BIN;
a script of examples/cluster the Python that PYTHON names, an agent of torchrun that of PYTHON_EXEC.
Here these are a few lines of Python that hand words, folder, environment and output to the test
process and end as the command ends; a rule that is killed takes its command with it, as always.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from launching import LONGROPE, Agent, Command, Ranks, start_agent
from torch.distributed.run import get_args_parser

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
request = json.dumps([os.getcwd(), words, dict(os.environ)]).encode()
socket.send_fds(server, [request], [1, 2])
status = int(server.recv(32))
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
_LARGEST_REQUEST = 2**18


@contextlib.contextmanager
def forked_commands(*, agents: bool = False) -> Iterator[Path]:
    """A folder for LONGROPE_BIN, whose commands run as long as the context lasts.

    Args:
        agents (bool): Whether torchrun is an agent in a process, which can be killed and meet
            others. Defaults to starting the ranks of one node without any.
    """
    # Not in pytest's own folder: a socket's path has at most 107 bytes, that of a `#!` no blank.
    with tempfile.TemporaryDirectory() as name:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        address = str(Path(name) / "socket")
        server.bind(address)
        server.listen()
        for program in ("longrope", "python", "torchrun"):
            client = Path(name) / program
            client.write_text(_CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
        agent_python = Path(name) / "python" if agents else None
        thread = threading.Thread(target=_serve, args=(server, agent_python))
        thread.start()
        try:
            yield Path(name)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            server.close()


def command_of(words: list[str], *, agents: bool = False) -> Command | Agent:
    """What the fork server has to run for a command line."""
    program, *rest = words
    if rest[:1] == ["-u"]:  # of torchrun; a forked process buffers nothing
        rest = rest[1:]
    if [program, *rest[:2]] == ["python", "-m", "torch.distributed.run"]:
        program, rest = "torchrun", rest[2:]
    if program == "longrope":
        return Command((*LONGROPE, *rest))
    if program == "python":
        return Command(tuple(rest))
    if agents:
        return Agent(tuple(rest))
    args: argparse.Namespace = get_args_parser().parse_args(rest)
    script = (*(["-m"] * args.module), args.training_script, *args.training_script_args)
    return Command(script, int(args.nproc_per_node))


def _serve(server: socket.socket, agent_python: Path | None) -> None:
    """Run what clients ask for, each in a thread of its own."""
    threads = []
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # it was shut down
            break
        threads.append(threading.Thread(target=_answer, args=(client, agent_python)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _answer(client: socket.socket, agent_python: Path | None) -> None:
    with client:
        message, (stdout, stderr), _, _ = socket.recv_fds(client, _LARGEST_REQUEST, 2)
        directory, words, variables = json.loads(message)
        variables.pop("PYTHON_EXEC", None)
        with open(stdout, "w") as out, open(stderr, "w") as err:
            try:
                place = Path(directory), out, err
                command = command_of(words, agents=agent_python is not None)
                if isinstance(command, Agent):
                    ranks = start_agent(command, *place, agent_python, variables)
                else:
                    ranks = Ranks(command, *place, [variables] * (command.processes == 1) or None)
                status = _wait(ranks, client)
            except Exception as error:
                print(f"forked_commands: {error!r}", file=err, flush=True)
                status = 1
        with contextlib.suppress(OSError):  # the client was killed
            client.send(str(status).encode())


def _wait(ranks: Ranks, client: socket.socket) -> int:
    """The exit status, negative for a signal; what runs still is ended when the client has gone."""
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return ranks.wait(0.2)
            if _has_gone(client):
                return 1
    finally:
        ranks.end()


def _has_gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
