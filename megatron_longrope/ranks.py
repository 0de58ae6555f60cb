"""Which process this is, known before any process group exists, and whom it ends with."""

from __future__ import annotations

import ctypes
import os
import sys

from megatron_longrope.errors import LongRopeError

# Processes that this one was started with: by torchrun's like, by srun, by mpirun of Open MPI and
# of MPICH. Not SLURM_NTASKS, which a shell of salloc has as well.
_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def rank() -> int:
    """Global rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def require_alone() -> None:
    """Refuse to be one of several processes without RANK: each would do the whole work alone.

    Raises:
        LongRopeError: RANK is not set, and another variable says that there are several.
    """
    for name in _COUNTS:
        value = os.environ.get(name, "")
        if "RANK" not in os.environ and value.isdigit() and int(value) > 1:
            raise LongRopeError(
                f"{name} is {value} and RANK is not set, so that each of {value} processes would "
                "run alone; start them with torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT; if each is meant to be a run of its own, unset "
                f"{name}"
            )


def end_with_parent(signal_number: int) -> None:
    """Have the system send this process a signal when the one that started it is gone (on Linux).

    After kill -9 of a torchrun agent its workers would keep the GPUs and go on writing.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal_number)
