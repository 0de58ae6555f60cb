"""What is known of earlier runs: a file per stage, and where everything lies in the output."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.files import read_json, write_json_atomic
from megatron_longrope.recipe.document import PRIVATE
from megatron_longrope.recipe.fingerprint import Parts

if TYPE_CHECKING:
    from megatron_longrope.recipe.document import Stage


@dataclass(frozen=True)
class Job:
    """A job that was submitted, with all that a later run needs to wait for it."""

    alive: tuple[str, ...]
    """The command that prints something while it waits or runs."""

    status_file: str
    """Where it leaves its exit code."""

    grace: float
    """Seconds that it may be away without one."""

    number: str | None = None
    """As the batch system calls it; None until that is known."""


@dataclass(frozen=True)
class StageState:
    """How far a stage has come."""

    parts: Parts
    """What it was started with."""

    finished: bool = False
    """All commands ended well and all outputs are there."""

    commands_done: int = 0
    """Commands that ended well."""

    seconds: float = 0.0
    """Spent in its commands, over all attempts."""

    attempts: int = 0
    """Commands started, also before its settings changed."""

    started: float | None = None
    """When the last command was started, in seconds since 1970."""

    ended: float | None = None
    """When it ended; None while it runs, or when nothing saw its end."""

    exit_code: int | None = None
    """Of the last command; None while it runs, when it was interrupted or its job vanished."""

    job: Job | None = None
    """The job that the last command is."""

    def to_dict(self) -> dict[str, Any]:
        """For the state file."""
        data = asdict(self)
        return {"fingerprint": self.parts.fingerprint, **data, "parts": self.parts.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageState:
        """The inverse of :meth:`to_dict`."""
        values = {key: value for key, value in data.items() if key != "fingerprint"}
        values["parts"] = Parts.from_dict(values["parts"])
        if job := values["job"]:
            values["job"] = Job(**{**job, "alive": tuple(job["alive"])})
        return cls(**values)

    def clean(self, parts: Parts) -> StageState:
        """The state of a fresh start; attempts go on, because files are named after them."""
        return StageState(parts, attempts=self.attempts)

    def running(self, job: Job | None = None) -> StageState:
        """One more command is started."""
        return replace(
            self,
            attempts=self.attempts + 1,
            started=time.time(),
            ended=None,
            exit_code=None,
            job=job,
        )

    def stopped(self, exit_code: int | None) -> StageState:
        """The command that was running is over; None: it was interrupted or vanished."""
        ended = time.time()
        spent = ended - (self.started if self.started is not None else ended)
        return replace(
            self,
            seconds=self.seconds + spent,
            ended=ended,
            exit_code=exit_code,
            commands_done=self.commands_done + (exit_code == 0),
            job=None,
        )


@dataclass(frozen=True)
class Decision:
    """What becomes of a stage."""

    action: str
    """`done`, `resume` (goes on where it stopped) or `clean` (what it wrote is moved away)."""

    reason: str
    """Why, in words; empty for a first start and for what is done."""


def decide(stage: Stage, state: StageState | None, parts: Parts | None) -> Decision:
    """Whether a stage has to run, and how.

    Args:
        state (StageState, optional): Its record.
        parts (Parts, optional): What it depends on now; None will do for a stage without a record.
    """
    if state is None or parts is None:
        left = any(os.path.lexists(path) for path in stage.writes)
        return Decision("clean", "nothing says how its outputs were made" if left else "")
    if changes := parts.changes_since(state.parts):
        return Decision("clean", "; ".join(changes))
    if not state.finished:
        code = state.exit_code
        how = "was interrupted" if code is None else f"failed with exit code {code}"
        return Decision("resume", f"it {how}")
    if missing := [path for path in stage.writes if not os.path.exists(path)]:
        return Decision("clean", f"{missing[0]} is missing")
    return Decision("done", "")


ASKED_FOR = Decision("clean", "asked for")
"""Run again although nothing changed."""


@dataclass(frozen=True)
class Records:
    """The folders and files in the output that belong to the recipe itself."""

    output: Path
    """The output folder."""

    @property
    def lock(self) -> Path:
        """Held while something works here."""
        return self.output / PRIVATE / "lock"

    @property
    def hashes(self) -> Path:
        """Hashes of files that were read."""
        return self.output / PRIVATE / "hashes.json"

    def log(self, stage: str) -> Path:
        """All that the commands of a stage printed."""
        return self.output / "logs" / f"{stage}.log"

    def status_file(self, stage: str, command: int, attempt: int) -> Path:
        """Where a submitted job leaves its exit code."""
        return (self.output / PRIVATE / "status" / f"{stage}.{command}.{attempt}").absolute()

    def read(self, stage: str) -> StageState | None:
        """The state of a stage; None when it was never started.

        Raises:
            ValueError: The file is damaged.
        """
        path = self._state(stage)
        if not path.exists():
            return None
        try:
            return StageState.from_dict(read_json(path))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is no state of a stage ({error!r}); delete it, and the stage runs again"
            ) from None

    def write(self, stage: str, state: StageState) -> None:
        """Record a state; a reader sees the old one or this."""
        write_json_atomic(self._state(stage), state.to_dict())

    def move_away(self, stage: Stage) -> Path | None:
        """Move what a stage wrote into `stale/`; the folder, or None when there was nothing."""
        paths = [Path(path) for path in stage.writes if os.path.lexists(path)]
        if not paths:
            return None
        base = self.output / "stale" / f"{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder, number = base, 1
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        for path in paths:
            target = folder / path.absolute().relative_to(self.output.absolute())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        return folder

    def _state(self, stage: str) -> Path:
        return self.output / PRIVATE / "stages" / f"{stage}.json"
