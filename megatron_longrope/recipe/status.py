"""What `longrope recipe status` shows: every stage's state, time and last words."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.progress import format_duration
from megatron_longrope.recipe.document import Recipe
from megatron_longrope.recipe.fingerprint import Contents
from megatron_longrope.recipe.lock import owner
from megatron_longrope.recipe.state import Records
from megatron_longrope.recipe.survey import Standing, survey, time_left

_TAIL_BYTES = 1 << 16
_NOTE_WIDTH = 80
_MEGATRON = re.compile(
    r"iteration +(?P<done>\d+)/ *(?P<total>\d+) .*?"
    r"elapsed time per iteration \(ms\): (?P<ms>[0-9.]+)(?:.*?lm loss: (?P<loss>\S+))?"
)
_PROGRESS = re.compile(r"^[^:]+: \d+/\d+ \S.*, \d+ s")


@dataclass(frozen=True)
class Line:
    """One stage in the table."""

    stage: str
    """Its name."""

    state: str
    """`done`, `running`, `interrupted`, `failed`, `stale`, `waiting` or `ready`."""

    seconds: float
    """Spent so far."""

    note: str
    """Why it is stale or waits, or the last progress line of its log."""

    job: str | None = None
    """Number of the job that it was submitted as."""


@dataclass(frozen=True)
class Status:
    """The whole table."""

    lines: Sequence[Line]
    """A line per stage, in order."""

    running: int | None
    """Process id of the run under way."""

    seconds_left: float
    """Expected, corrected by the pace so far."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stages": [line.__dict__ for line in self.lines],
            "running": self.running,
            "seconds": sum(line.seconds for line in self.lines),
            "seconds_left": self.seconds_left,
        }

    def text(self) -> str:
        """For people."""
        rows = [("stage", "state", "time", "")]
        for line in self.lines:
            spent = format_duration(line.seconds) if line.seconds else ""
            job = f"job {line.job}: " if line.job else ""
            rows.append((line.stage, line.state, spent, f"{job}{line.note}"[:_NOTE_WIDTH]))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"{name:{widths[0]}}  {state:{widths[1]}}  {spent:>{widths[2]}}  {note}".rstrip()
            for name, state, spent, note in rows
        ]
        done = sum(line.state == "done" for line in self.lines)
        total = format_duration(sum(line.seconds for line in self.lines))
        end = f"{done} of {len(self.lines)} stages done, {total} spent"
        if self.seconds_left:
            end += f", about {format_duration(self.seconds_left)} of work left"
        end += f"; process {self.running} is running" if self.running else ""
        return "\n".join((*table, end))


def read_status(recipe: Recipe) -> Status:
    """Look at the files of a recipe; starts nothing, locks nothing, writes nothing."""
    records = Records(recipe.output)
    holder = owner(records.lock)
    running = holder.pid if holder is not None and holder.lives else None
    standings = survey(recipe, recipe.stages, Contents(records.hashes, keep=False))
    lines = [_line(standing, records, running is not None) for standing in standings]
    return Status(
        lines,
        running,
        time_left(
            recipe.stages,
            {line.stage: line.seconds for line in lines if line.state != "stale"},
            {line.stage for line in lines if line.state == "done"},
        ),
    )


def _line(standing: Standing, records: Records, running: bool) -> Line:
    stage, state, decision = standing.stage, standing.state, standing.decision
    if state is None:
        word = "waiting" if decision.action == "wait" else "ready"
        return Line(stage.name, word, 0.0, decision.reason)
    job = state.job.number if state.job else None
    seconds = state.seconds
    if decision.action == "done":
        return Line(stage.name, "done", seconds, "")
    at_work = running and state.started is not None and state.ended is None
    note = _last_words(records.log(stage.name))
    if at_work and not state.finished:
        return Line(stage.name, "running", seconds + time.time() - state.started, note, job)
    if decision.action == "clean" or state.finished:
        return Line(stage.name, "stale", seconds, decision.reason, job)
    if state.exit_code:
        return Line(stage.name, "failed", seconds, note, job)
    if job:
        note = f"the same command waits for it; {note}"
    return Line(stage.name, "interrupted", seconds, note, job)


def _last_words(log: Path) -> str:
    """The last line of a log that tells of progress, else the last line."""
    lines = _tail(log)
    for line in reversed(lines):
        if match := _MEGATRON.search(line):
            done, total = int(match["done"]), int(match["total"])
            left = format_duration((total - done) * float(match["ms"]) / 1000)
            loss = f", lm loss {float(match['loss']):.4g}" if match["loss"] else ""
            return f"iteration {done}/{total}{loss}, about {left} left"
        if _PROGRESS.match(line):
            return line
    return lines[-1] if lines else ""


def _tail(log: Path) -> list[str]:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]
    return []
