"""Processes that begin with torch and Megatron imported, which otherwise costs seconds for each.

A server imports them once, starts no thread, and forks a child for each request; the child takes
over the arguments, the environment, the folder and the output that were asked for and runs the
module or script as `__main__`. tests/helpers/launching.py is the other end.

A child differs from `python -m module` in this: Megatron is already imported (by the real order of
imports, see :func:`preload`), Python's hash seed is the server's, output is never buffered, as
under torchrun, and the modules' destructors do not run at the end.
tests/distributed/test_fork_server.py compares both.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import multiprocessing.process
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

_LARGEST_REQUEST = 2**18
_READY = b"ready"
_PR_SET_PDEATHSIG = 1
# The tokenizers of Megatron import transformers, with whichever of them a run has.
_COSTLY = ("torch", "megatron.training.training", "megatron.core.tokenizers.text")
# Of searches, of which no training is one; cma imports scipy.stats and matplotlib.pyplot.
_COSTLY_BESIDE_TRAINING = ("cma", "scipy.optimize", "scipy.spatial.distance")


class ForkServer:
    """The test process's end of a server.

    Args:
        environment (Mapping[str, str]): Of the server. What torch and Megatron read when they are
            imported is read from here: children may differ from it in a process's rank only.
        hosted (bool): Whether Megatron is imported as `longrope pretrain --cpu` does, after
            `torch.cuda` has been taught to answer for the CPU.
    """

    def __init__(self, environment: Mapping[str, str], *, hosted: bool) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        words = [sys.executable, "-u", __file__, str(theirs.fileno()), *(["hosted"] * hosted)]
        self._process = subprocess.Popen(
            words, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=self._errors,
        )  # fmt: skip
        theirs.close()
        if self._control.recv(len(_READY)) != _READY:
            raise RuntimeError(f"the fork server did not start\n{self._told()}")

    def fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        stdout: IO,
        stderr: IO,
        *,
        new_session: bool = False,
    ) -> ForkedProcess:
        """Start a process as `python *arguments`; `-m` and a script are understood."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"arguments": list(arguments), "directory": str(directory)}
        request["new_session"] = new_session
        message = json.dumps({**request, "environment": dict(environment)}).encode()
        with theirs:
            fds = [theirs.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(self._control, [message], fds)
        pid = ours.recv(32)
        if not pid:
            raise RuntimeError(f"the fork server has ended\n{self._told()}")
        return ForkedProcess(int(pid), ours)

    def close(self) -> None:
        """End the server and what it has forked."""
        self._control.close()
        self._process.wait()

    def _told(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-3000:]


class ForkedProcess:
    """A child of a server, with the methods of :class:`subprocess.Popen` that tests need."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._channel = channel

    def fileno(self) -> int:
        """Of what becomes readable when the process has ended."""
        return self._channel.fileno()

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: The process runs still.
        """
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                status = self._channel.recv(32)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("forked process", timeout) from None
            # A server that has gone, has killed its children.
            self.returncode = int(status) if status else -signal.SIGKILL
        return self.returncode

    def poll(self) -> int | None:
        """Exit status, or None as long as the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process runs still."""
        # Its server may have reaped it and not told of it yet.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


# The server


def preload(hosted: bool) -> None:
    """Import what costs seconds, and nothing of the plugin that the real process would not have."""
    if hosted:
        # Megatron's modules bind some of torch.cuda's functions when they are imported.
        from megatron_longrope.integration import cpu_host

        cpu_host.prepare_environment()
        cpu_host.enable()
    for name in _COSTLY + (() if hosted else _COSTLY_BESIDE_TRAINING):
        with contextlib.suppress(ImportError):  # not every release has each
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection of each child would copy every page


def serve(control: socket.socket) -> Callable[[], None]:
    """Fork children until the test process closes its end; returns in a child: what it has to run.

    A child leaves this function before it runs anything, so that a traceback has no frame of it.
    """
    children: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that tells the end
    selector = selectors.PollSelector()  # epoll's would be shared with the children
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not control:
                selector.unregister(key.fd)
                pid, channel = children.pop(key.fd)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with channel, contextlib.suppress(OSError):  # nobody may be waiting any more
                    channel.send(str(status).encode())
                continue
            message, fds, _, _ = socket.recv_fds(control, _LARGEST_REQUEST, 3)
            if not message:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            # A thread would not exist in the child, and its locks would stay locked for ever.
            assert len(os.listdir("/proc/self/task")) == 1, "the fork server has threads"
            channel, stdout, stderr = fds
            pid = os.fork()
            if pid == 0:
                for fd, (_, other) in children.items():
                    os.close(fd)
                    other.close()
                control.close()
                os.close(channel)
                # Whoever ends the server by a signal has not asked it to end its children.
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                return functools.partial(become, json.loads(message), stdout, stderr)
            os.close(stdout)
            os.close(stderr)
            end = os.pidfd_open(pid)
            children[end] = pid, socket.socket(fileno=channel)
            selector.register(end, selectors.EVENT_READ)
            with contextlib.suppress(OSError):
                children[end][1].send(str(pid).encode())


def become(request: Mapping, stdout: int, stderr: int) -> None:
    """Turn this child into the process that was asked for, and run its module or script."""
    for fd, target in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, target)
        os.close(fd)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["directory"])
    multiprocessing.process.ORIGINAL_DIR = request["directory"]
    os.environ.clear()
    os.environ.update(request["environment"])
    # An agent of torchrun handles SIGINT itself, so its workers never inherit that it is ignored,
    # as it is in a job that a shell started in the background.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "numpy" in sys.modules:  # Python's own generator takes a new seed by itself
        sys.modules["numpy"].random.seed()
    name, *rest = request["arguments"]
    if name == "-m":
        sys.path.insert(0, request["directory"])
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(name)))
        sys.argv = [name, *rest]
        # As Python itself does; runpy.run_path would change `__file__` or `sys.argv`.
        script = sys.modules["__main__"] = types.ModuleType("__main__")
        script.__file__ = os.path.abspath(name)
        code = compile(Path(name).read_bytes(), script.__file__, "exec")
        exec(code, vars(script))


def end_with(run: Callable[[], None]) -> NoReturn:
    """Run, and end as Python does, but for taking apart what was imported: that takes seconds."""
    status = 0
    try:
        run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    os._exit(status & 0xFF)


def main() -> None:
    """Serve, and in a child run what was asked for."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    del sys.path[0]  # this file's folder, which no other process would have there
    # Ctrl-C is for the test process, whose end ends this one; children take it as any process.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload(hosted="hosted" in sys.argv[2:])
    control.send(_READY)
    run = serve(control)
    signal.signal(signal.SIGINT, interrupt)
    end_with(run)


if __name__ == "__main__":
    main()
