"""What scripts of examples/ start, run by the fork server of the test process.

A workflow's rule calls `longrope`, `python` and `torchrun` by name, from the folder LONGROPE_BIN;
a script of examples/cluster the Python that PYTHON names.
Here these are a few lines of Python that hand the words, the folder and the output to the test
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

from launching import LONGROPE, Command, Ranks
from torch.distributed.run import get_args_parser

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
socket.send_fds(server, [json.dumps([os.getcwd(), words]).encode()], [1, 2])
sys.exit(int(server.recv(32)))
"""
_LARGEST_REQUEST = 2**18


@contextlib.contextmanager
def forked_commands() -> Iterator[Path]:
    """A folder for LONGROPE_BIN, whose commands run as long as the context lasts."""
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
        thread = threading.Thread(target=_serve, args=(server,))
        thread.start()
        try:
            yield Path(name)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            server.close()


def command_of(words: list[str]) -> Command:
    """What the fork server has to run for a command line."""
    program, *rest = words
    if words[:3] == ["python", "-m", "torch.distributed.run"]:
        program, rest = "torchrun", rest[2:]
    if program == "longrope":
        return Command((*LONGROPE, *rest))
    if program == "python":
        return Command(tuple(rest))
    args: argparse.Namespace = get_args_parser().parse_args(rest)
    script = (*(["-m"] * args.module), args.training_script, *args.training_script_args)
    return Command(script, int(args.nproc_per_node))


def _serve(server: socket.socket) -> None:
    """Run what clients ask for, one after the other; a workflow with one core asks for no more."""
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # it was shut down
            return
        with client:
            message, (stdout, stderr), _, _ = socket.recv_fds(client, _LARGEST_REQUEST, 2)
            directory, words = json.loads(message)
            with open(stdout, "w") as out, open(stderr, "w") as err:
                try:
                    status = _run(command_of(words), Path(directory), out, err, client)
                except Exception as error:
                    print(f"forked_commands: {error!r}", file=err, flush=True)
                    status = 1
            with contextlib.suppress(OSError):  # the client was killed
                client.send(str(status).encode())


def _run(command: Command, directory: Path, stdout, stderr, client: socket.socket) -> int:
    ranks = Ranks(command, directory, stdout, stderr)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = ranks.wait(0.2)
                return 128 - status if status < 0 else status  # as a shell tells a signal
            if _has_gone(client):
                return 1
    finally:
        ranks.end()


def _has_gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
