"""Which folder a checkpoint lies in, and in which of Megatron's formats."""

from __future__ import annotations

from pathlib import Path

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_object

TRACKER = "latest_checkpointed_iteration.txt"
TORCH, TORCH_DIST, FSDP_DTENSOR = "torch", "torch_dist", "fsdp_dtensor"
FORMATS = (TORCH_DIST, TORCH, FSDP_DTENSOR)


def iteration_directory(path: Path, iteration: int | None) -> Path:
    """The folder of one iteration.

    Args:
        path (Path): Megatron's `--save` directory, or the folder of an iteration.
        iteration (int, optional): Which one. Defaults to the one in the tracker file, or to the
            only one.

    Raises:
        LongRopeError: There is no such folder or iteration, or several and no tracker file.
    """
    if not path.is_dir():
        raise LongRopeError(f"{path}: no such directory; give Megatron's --save directory")
    tracker = path / TRACKER
    is_one = (path / ".metadata").exists() or path.name.startswith("iter_")
    present = sorted(item.name for item in path.glob("iter_*") if item.is_dir())
    if is_one and not tracker.is_file():
        if iteration is not None and path.name != f"iter_{iteration:07d}":
            raise LongRopeError(
                f"{path} is one iteration's directory but iteration {iteration} was asked for; "
                "give the --save directory above it"
            )
        return path
    if iteration is None:
        if not tracker.is_file():
            if _is_torch(path):
                return path
            return _without_tracker(path, present)
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not (text.isdigit() or text == "release"):
            raise LongRopeError(f"{tracker}: holds {text!r}; expected an iteration number")
        directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    else:
        directory = path / f"iter_{iteration:07d}"
    if not directory.is_dir():
        raise LongRopeError(
            f"{directory}: no such iteration; {path} holds {', '.join(present) or 'none'}"
        )
    return directory


def _without_tracker(path: Path, present: list[str]) -> Path:
    """The only checkpoint below `path`, as a copy of one iteration has no tracker file."""
    found = [*present, *(["release"] if (path / "release").is_dir() else [])]
    if len(found) == 1:
        return path / found[0]
    if not found:
        raise LongRopeError(
            f"{path}: not a Megatron checkpoint: it has neither {TRACKER} nor .metadata nor "
            "mp_rank_* nor iter_* folders"
        )
    ways = [f"--iteration {int(name[5:])}" for name in present if name[5:].isdigit()]
    ways += [f"give {path / 'release'} itself"] if "release" in found else []
    raise LongRopeError(
        f"{path}: has no {TRACKER} and holds {', '.join(found)}; choose with {' or '.join(ways)}"
    )


def checkpoint_format(directory: Path) -> str:
    """One of `FORMATS`, told by the files in the folder of an iteration.

    torch_dist describes itself in metadata.json. What Megatron writes with torch's own distributed
    checkpoints (fsdp_dtensor, and torch_dcp, which has the same layout) has `.metadata` alone.

    Raises:
        LongRopeError: None of them, files of two formats, or the file that all others depend on is
            missing.
    """
    has_metadata = (directory / ".metadata").is_file()
    described = directory / "metadata.json"
    if _is_torch(directory):
        others = [*sorted(directory.glob("*.distcp")), directory / ".metadata", described]
        if found := [path.name for path in others if path.is_file()]:
            raise LongRopeError(
                f"{directory}: holds files of two formats, mp_rank_* folders (torch) and "
                f"{found[0]} (torch_dist or fsdp_dtensor); move those of one away"
            )
        return TORCH
    if not described.is_file():
        if has_metadata:
            return FSDP_DTENSOR
        raise LongRopeError(
            f"{directory}: no checkpoint here: metadata.json, .metadata and mp_rank_* are missing"
        )
    backend = read_object(described).get("sharded_backend")
    if backend != TORCH_DIST:
        raise LongRopeError(
            f"{directory}: checkpoint format {backend!r} is not supported; this release reads "
            f"{', '.join(FORMATS)}: save it once with Megatron's --ckpt-format {TORCH_DIST}"
        )
    if not has_metadata:
        raise LongRopeError(
            f"{directory / '.metadata'}: missing; the save was interrupted or the copy incomplete"
        )
    return TORCH_DIST


def _is_torch(directory: Path) -> bool:
    return any(directory.glob("mp_rank_*"))
