"""`longrope pretrain SCRIPT ...`: run an unmodified Megatron script with the plugin in place."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import check_folder, hold
from megatron_longrope.ranks import rank, require_alone

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK = ".longrope.lock"
_LOCK_WAIT_S = 30.0  # workers of the run before may still be ending
_held: dict[Path, BaseFileLock] = {}  # locks go with the process, however it ends


def launch(script: str, arguments: Sequence[str], *, cpu: bool = False) -> None:
    """Run `script` as `__main__` with `arguments`, after the hooks are in.

    Args:
        script (str): Path of a Megatron pretrain script.
        arguments (Sequence[str]): The script's own flags and the `--longrope-*` flags.
        cpu (bool): Host Megatron on the CPU; see :mod:`megatron_longrope.integration.cpu_host`.

    Raises:
        LongRopeError: The script does not exist, this is one of several processes without RANK,
            another training writes to the `--save` folder, or Megatron lacks a symbol or could not
            compile its dataset helpers.
    """
    path = Path(script)
    if not path.is_file():
        raise LongRopeError(f"script {script} does not exist; give the path of a pretrain script")
    _default_rendezvous()
    arguments = list(arguments)
    if rank() == 0 and (folder := save_folder(arguments)):
        hold_folder(Path(folder))
    # The script's neighbours (gpt_builders.py, model_provider.py) and its Megatron come first.
    sys.path.insert(0, str(path.resolve().parent))
    if cpu:
        from megatron_longrope.integration import cpu_host

        cpu_host.prepare_environment()
        rewrite = cpu_host.cpu_arguments(arguments)
        arguments = rewrite.arguments
        if rank() == 0:
            print(rewrite.describe(), flush=True)
        cpu_host.enable()
        cpu_host.start_results_server()
    from megatron_longrope.integration import compat, hooks

    if not compat.helpers_are_compiled() and (obstacle := compat.helpers_obstacle()):
        # Megatron would fail on rank 0 in `make`, and on the others in a collective.
        raise LongRopeError(
            f"Megatron's dataset helpers are not compiled for this Python, and {obstacle}"
        )
    hooks.apply()
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception:
        # What fails inside the script is the script's: its traceback is the message.
        traceback.print_exc()
        raise SystemExit(1) from None


def save_folder(arguments: Sequence[str]) -> str | None:
    """The local folder that Megatron will save to, as its own parser reads it, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save", nargs="?")  # that a value is missing, Megatron says itself
    save = parser.parse_known_args(arguments)[0].save
    return None if save and "://" in save else save  # msc://bucket/name: no folder to lock


def hold_folder(folder: Path, wait: float = _LOCK_WAIT_S) -> None:
    """Keep other trainings out of a `--save` folder until this process ends.

    Two writers would mix their checkpoints, for example the orphan of a workflow that was killed
    and the same command started again.

    Args:
        folder (Path): Created if it is not there.
        wait (float): Seconds to wait for the process that holds it.

    Raises:
        LongRopeError: It is still held after that time, or no folder that can be written to.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "wait for it, end it, or save elsewhere"
    _held[folder] = hold(folder / _LOCK, f"--save {folder}", remedy, wait)


def _default_rendezvous() -> None:
    """A single process without torchrun meets only itself, on a port that the kernel chooses.

    Port 0 says so to torch's store. A port that was looked for here could be taken by another
    process before the store binds it.
    """
    require_alone()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
