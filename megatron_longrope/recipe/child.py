"""Stands between a recipe's run and what it starts; run by path, so that it starts at once.

    child.py process PARENT COMMAND ...     becomes COMMAND, which gets SIGTERM when PARENT dies
    child.py submit FD COMMAND ...          runs COMMAND and writes what it printed to file FD

The standard library only: the package itself takes seconds to import.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


def become(parent: int, command: list[str]) -> None:
    """Replace this process by a command that ends when its parent is killed.

    Args:
        parent (int): Process id of who started this; it may be gone already.
        command (list[str]): Words of the command.
    """
    if sys.platform == "linux":  # elsewhere the lock alone keeps a second writer away
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: cannot be started ({error.strerror})")


def submit(record: int, command: list[str]) -> None:
    """Run a command to its end, whatever happens to the parent, and record its answer.

    Args:
        record (int): A file that is open and locked; others wait for that lock. The command does
            not inherit it, because a job may outlive it.
        command (list[str]): Words of the command.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        answer = {"exit_code": done.returncode, "output": done.stdout}
    except OSError as error:
        answer = {"exit_code": 127, "output": f"{command[0]}: {error.strerror}"}
    os.write(record, json.dumps(answer).encode())


if __name__ == "__main__":
    mode, number, *words = sys.argv[1:]
    {"process": become, "submit": submit}[mode](int(number), words)
