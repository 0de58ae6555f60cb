"""Run a pipeline of commands as stages that are skipped when nothing changed.

A stage is a list of commands with the files they read and write. Its fingerprint covers the
commands and the content of its inputs; a stage whose fingerprint is stamped as finished and whose
outputs exist is skipped, an interrupted one is started again on its own partial output (the
commands resume), and one whose settings changed starts clean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_longrope.files import read_json, write_json_atomic

# Files beyond this are recognised by name and size; hashing a 7B checkpoint takes minutes.
_HASHED_BYTES = 1 << 26


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline."""

    name: str
    """Short and unique; names the log and the stamp."""

    commands: Sequence[Sequence[str]]
    """Argument vectors, run one after the other."""

    outputs: Sequence[Path]
    """Files or directories that exist when the stage is done."""

    inputs: Sequence[Path] = ()
    """Files or directories whose content the result depends on."""

    shown: str | None = None
    """Regular expression of the output lines to show; None shows all. The log has every line."""

    expected_seconds: float = 60.0
    """Rough duration, for the estimate of the time left."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the commands need."""


class StageError(RuntimeError):
    """A stage's command failed."""


def run_stages(stages: Sequence[Stage], directory: Path) -> dict[str, float]:
    """Run what is not done yet.

    Args:
        directory (Path): Holds `stages/` (stamps) and `logs/`.

    Returns:
        dict[str, float]: Seconds that each stage took, also when it was done in an earlier run.

    Raises:
        StageError: A command failed; the message names the log.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise ValueError(f"stage names must differ, got {names}")
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        stamp_path = directory / "stages" / f"{stage.name}.json"
        fingerprint = _fingerprint(stage)
        stamp = read_json(stamp_path) if stamp_path.exists() else {}
        title = f"[{number}/{len(stages)}] {stage.name}"
        same = stamp.get("fingerprint") == fingerprint
        if same and stamp.get("finished") and all(path.exists() for path in stage.outputs):
            seconds[stage.name] = stamp["seconds"]
            print(f"{title}: done before ({stamp['seconds']:.0f} s)", flush=True)
            continue
        if not same or stamp.get("finished"):
            for path in stage.outputs:
                _remove(path)
        print(f"\n{title}{_estimate(stages, number, seconds)}", flush=True)
        spent = stamp.get("seconds", 0.0) if same and not stamp.get("finished") else 0.0
        write_json_atomic(
            stamp_path, {"fingerprint": fingerprint, "finished": False, "seconds": spent}
        )
        started = time.monotonic()
        try:
            for command in stage.commands:
                _run(command, stage, directory / "logs" / f"{stage.name}.log")
        finally:
            spent += time.monotonic() - started
            write_json_atomic(
                stamp_path, {"fingerprint": fingerprint, "finished": False, "seconds": spent}
            )
        if missing := [str(path) for path in stage.outputs if not path.exists()]:
            raise StageError(f"stage {stage.name} ended without its output {missing[0]}")
        seconds[stage.name] = spent
        write_json_atomic(
            stamp_path, {"fingerprint": fingerprint, "finished": True, "seconds": spent}
        )
    return seconds


def _run(command: Sequence[str], stage: Stage, log_path: Path) -> None:
    """Run one command; show the chosen lines, log them all."""
    print(f"$ {display(command)}", flush=True)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    shown = re.compile(stage.shown) if stage.shown else None
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        )
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if shown is None or shown.search(line):
                    print("  " + line.rstrip(), flush=True)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise StageError(
            f"stage {stage.name} failed with exit code {code}; its log is {log_path}, ending in\n"
            + "\n".join(f"  {line}" for line in tail)
        )


def display(command: Sequence[str]) -> str:
    """The command as a person would type it: `longrope ...` and `torchrun ...`."""
    text = shlex.join(command)
    python = shlex.quote(sys.executable)
    text = text.replace(f"{python} -m megatron_longrope ", "longrope ")
    text = text.replace(f"{python} -m torch.distributed.run ", "torchrun ")
    return text.replace(f"{python} ", "python ")


def _estimate(stages: Sequence[Stage], number: int, seconds: dict[str, float]) -> str:
    """Time left by the expected durations, corrected by the pace so far."""
    expected = {stage.name: stage.expected_seconds for stage in stages}
    planned = sum(expected[name] for name in seconds)
    pace = sum(seconds.values()) / planned if planned else 1.0
    left = pace * sum(expected[stage.name] for stage in stages[number - 1 :])
    return f"  (about {max(1, round(left / 60))} min left)"


def _fingerprint(stage: Stage) -> str:
    digest = hashlib.sha256(json.dumps([list(command) for command in stage.commands]).encode())
    for path in stage.inputs:
        digest.update(_content(path))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    if path.is_dir():
        entries = sorted(item for item in path.rglob("*") if item.is_file())
    else:
        entries = [path]
    digest = hashlib.sha256()
    for item in entries:
        if not item.exists():
            digest.update(b"absent")
            continue
        size = item.stat().st_size
        name = item.name if item == path else str(item.relative_to(path))
        digest.update(f"{name}:{size}:".encode())
        if size <= _HASHED_BYTES:
            digest.update(hashlib.sha256(item.read_bytes()).digest())
    return digest.digest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
