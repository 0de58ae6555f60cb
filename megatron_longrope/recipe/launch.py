"""Run one command of a stage to its end: a process on this machine, or a job somewhere else.

Both append what they print to the stage's log themselves, so that nothing is lost when this process
is killed, and the log is read from there. A process dies with this one. A job does not: its number
is kept, and its script leaves its exit code in a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_longrope.recipe import child
from megatron_longrope.recipe.lock import MARK
from megatron_longrope.recipe.state import Job

STATUS_FILE = "LONGROPE_STATUS_FILE"
"""Variable of a job: it writes its exit code there as its last act."""

LOG_FILE = "LONGROPE_LOG_FILE"
"""Variable of a job: it may append what it prints there, so that it is shown."""

_RETURN = "\r"
_TICK_S = 0.1
_LONGEST_POLL_S = 30.0
_CHILD = (sys.executable, "-I", "-S", child.__file__)
_JOB_NUMBER = re.compile(r"[\w.\-\[\]]+")


class JobVanished(Exception):
    """A job neither waits nor runs, and left no exit code."""


@dataclass
class Surroundings:
    """What a command runs in."""

    output: Path
    """The recipe's output folder."""

    log: Path
    """Where it prints to."""

    show: re.Pattern[str] | None
    """Which of its lines are shown."""

    environment: Mapping[str, str]
    """Its variables beyond those of this process."""

    lock: int | None
    """File descriptor that it inherits."""

    stop: threading.Event
    """Set when everything is to end."""

    patience: float
    """Seconds between SIGTERM and SIGKILL then."""

    say: Callable[[str], None]
    """Shows a line."""

    _seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._seen = self.log.stat().st_size if self.log.exists() else 0

    def note(self, line: str) -> None:
        """Append a line of our own to the log; it is not shown."""
        self.show_new_lines()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
            self._seen = log.tell()

    def show_new_lines(self) -> None:
        """Show what was printed since the last call, in whole lines."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._seen)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._seen += len(whole) + len(newline)
            for line in whole.decode(errors="replace").split("\n") if newline else ():
                if self.show is None or self.show.search(line):
                    # Of a progress bar, what a terminal would show in the end.
                    self.say(f"  {line.rstrip().rpartition(_RETURN)[2]}")

    def variables(self, **more: str) -> dict[str, str]:
        """The environment of a command."""
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, **more}


def run_process(argv: Sequence[str], around: Surroundings) -> int | None:
    """Run a process; its exit code (128 + the signal that ended it), or None when it was stopped.

    It holds the lock as long as it lives and gets SIGTERM when this thread ends, however that
    comes about. When it is stopped it gets SIGTERM, and SIGKILL when patience is at an end.
    """
    around.show_new_lines()
    with around.log.open("ab") as log:
        process = subprocess.Popen(
            [*_CHILD, "process", str(os.getpid()), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=around.variables(**{MARK: os.path.realpath(around.output)}),
            pass_fds=() if around.lock is None else (around.lock,),
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
        )
    deadline = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_TICK_S)
            break
        around.show_new_lines()
        if not around.stop.is_set():
            continue
        if deadline is None:
            process.terminate()
            deadline = time.monotonic() + around.patience
        elif time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
    around.show_new_lines()
    if code and around.stop.is_set():
        with contextlib.suppress(ProcessLookupError):  # what a shell may have left behind
            os.killpg(process.pid, signal.SIGTERM)
        return None
    return code if code >= 0 else 128 - code


def submit(argv: Sequence[str], job: Job, around: Surroundings) -> str:
    """Submit a job; its number.

    A process of its own does so, which this one's death does not hurt: what the batch system
    answered is in a file that stays locked until it is there.

    Raises:
        RuntimeError: The batch system refused.
    """
    around.show_new_lines()
    status_file = Path(job.status_file)
    status_file.parent.mkdir(parents=True, exist_ok=True)
    status_file.unlink(missing_ok=True)
    record = os.open(_record(job), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock
            fcntl.flock(record, fcntl.LOCK_EX)
        with around.log.open("ab") as log:
            subprocess.run(
                [*_CHILD, "submit", str(record), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=around.variables(
                    **{STATUS_FILE: job.status_file, LOG_FILE: str(around.log.absolute())}
                ),
                pass_fds=(record,),
                start_new_session=True,
                check=False,
            )
    finally:
        os.close(record)
    around.show_new_lines()
    number = submitted(job)
    if number is None:
        raise RuntimeError(
            "submitting was killed; look whether the batch system has the job before running again"
        )
    return number


def submitted(job: Job) -> str | None:
    """The number of a job that was being submitted, perhaps by a run that was killed meanwhile.

    Returns:
        str | None: None when it never came to that.

    Raises:
        RuntimeError: The batch system refused, or said no number.
    """
    try:
        with _record(job).open("rb") as record:
            with contextlib.suppress(OSError):
                fcntl.flock(record, fcntl.LOCK_SH)
            content = record.read()
    except FileNotFoundError:
        return None
    if not content:
        return None
    answer = json.loads(content)
    lines = answer["output"].strip().splitlines()
    if answer["exit_code"]:
        raise RuntimeError(
            f"submitting failed with exit code {answer['exit_code']}: "
            f"{lines[-1] if lines else 'see the log'}"
        )
    number = _JOB_NUMBER.match(lines[-1].strip()) if lines else None
    if number is None:
        raise RuntimeError(
            "submitting printed no job number first on its last line but "
            f"{lines[-1] if lines else 'nothing'!r}; with sbatch use --parsable"
        )
    return number[0]


def is_alive(job: Job) -> bool:
    """Whether a job waits or runs: its `alive` command prints something.

    Raises:
        OSError: The command cannot be started.
    """
    assert job.number is not None
    words = [word.replace("${job}", job.number) for word in job.alive]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        start_new_session=True,
    )
    return bool(done.stdout.strip())


def wait_for_job(job: Job, around: Surroundings) -> int | None:
    """Wait for a job; its exit code, or None when this run is to end before it.

    Raises:
        JobVanished: It is gone and left no exit code for the grace period.
        OSError: The command that looks for it cannot be started.
    """
    around.show_new_lines()
    pause, following, last_seen = 0.2, 0.0, time.monotonic()
    while True:
        around.show_new_lines()
        # Success is final; a job that was preempted leaves another code before it is requeued.
        if (code := _exit_code(job)) == 0:
            around.show_new_lines()
            return code
        if around.stop.is_set():
            return None
        now = time.monotonic()
        if now >= following:
            if is_alive(job):
                last_seen, pause = now, min(1.5 * pause, _LONGEST_POLL_S)
            elif code is not None:
                around.show_new_lines()
                return code
            elif now - last_seen > job.grace:
                raise JobVanished(
                    f"job {job.number} is gone and left no exit code in {job.status_file} "
                    f"within {job.grace:.0f} s"
                )
            following = now + (pause if last_seen == now else 1.0)
        around.stop.wait(_TICK_S)


def _exit_code(job: Job) -> int | None:
    with contextlib.suppress(OSError):
        text = Path(job.status_file).read_text(encoding="utf-8").strip()
        if text.lstrip("-").isdecimal():  # else it is just being written
            return int(text)
    return None


def _record(job: Job) -> Path:
    """What the batch system answered."""
    return Path(f"{job.status_file}.submitted")
