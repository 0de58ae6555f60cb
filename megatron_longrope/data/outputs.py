"""Outputs that appear under their final names only when the whole job has succeeded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_longrope.errors import LongRopeError


@contextmanager
def staged_outputs(paths: Sequence[Path], overwrite: bool = False) -> Iterator[list[Path]]:
    """Hand out temporary names for `paths`; rename them in order when the block ends cleanly.

    All paths share one directory. The temporary files live in a hidden folder beside the targets,
    which is removed whether the block succeeds or fails. With several paths the last one marks
    the set as complete: an old one is removed before the first rename, so that an old marker
    never describes new data.

    Args:
        paths (Sequence[Path]): Final names; the block has to write every one of them.
        overwrite (bool): Replace existing files instead of refusing them.

    Raises:
        LongRopeError: A path exists and `overwrite` is False.
    """
    refuse_existing(paths, overwrite)
    directory = paths[0].parent
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=directory, prefix=f".{paths[0].name}.", suffix=".tmp"))
    try:
        staged = [stage / path.name for path in paths]
        yield staged
        for path in staged:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for source, target in zip(staged, paths, strict=True):
            os.replace(source, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse when one of `paths` exists, unless `overwrite` is set."""
    for path in paths:
        if path.exists() and not overwrite:
            raise LongRopeError(
                f"{path} exists; outputs are not replaced silently, "
                "pass --overwrite or choose another name"
            )
