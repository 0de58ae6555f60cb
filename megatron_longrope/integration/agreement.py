"""One sentence on rank 0 and a non-zero exit on every rank, without a hang.

What is wrong with the flags is wrong on every rank at once. What is wrong with a file may be wrong
on one rank only (a node without the shared disk, a stale copy), when no process group exists yet to
tell the others: such a finding waits until Megatron has joined the ranks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_longrope.ranks import rank

# A launcher ends every rank as soon as one has ended; rank 0 must have spoken by then.
_OTHERS_WAIT_S = 30.0


@dataclass(frozen=True)
class Finding:
    """What one rank found: in its factor file, and which kernels it has."""

    error: str | None = None
    """Sentence to end the run with."""
    fingerprint: str | None = None
    """Hash of the factors, or None without any."""
    attention: str | None = None
    """Core attention of the run."""


_pending: Finding | None = None


def stop(sentence: str) -> NoReturn:
    """End a run whose every rank stops here for the same reason.

    The others keep silent and wait for the launcher, which ends them with rank 0; where it does not
    (another node's torchrun), they end by themselves.

    Raises:
        SystemExit: Always; the message only on rank 0.
    """
    if rank() == 0:
        raise SystemExit(f"longrope: error: {sentence}")
    time.sleep(_OTHERS_WAIT_S)
    raise SystemExit(1)


def record(finding: Finding) -> None:
    """Remember this rank's finding until :func:`settle`; a single process stops at once."""
    global _pending
    if finding.error and _is_alone():
        stop(finding.error)
    _pending = finding


def settle() -> None:
    """Compare the ranks' findings, once there is a process group; all go on or all stop.

    Raises:
        SystemExit: A rank had an error, or factors or attention differ between ranks.
    """
    global _pending
    import torch.distributed as dist

    if _pending is None or not dist.is_initialized():
        return
    findings = [_pending]
    if dist.get_backend() != "fake":  # Megatron's --fake-process-group: one process plays all ranks
        findings = [Finding()] * dist.get_world_size()
        dist.all_gather_object(findings, _pending)
    _pending = None
    sentence = disagreement(findings)
    if sentence is None:
        return
    if dist.get_rank() == 0:
        print(f"longrope: error: {sentence}", file=sys.stderr, flush=True)
    dist.barrier()  # rank 0 has spoken
    dist.destroy_process_group()
    raise SystemExit(1)


def require() -> None:
    """Settle at the latest possible moment: a finding must not be lost on the way to a model.

    Raises:
        SystemExit: This rank had an error, or another rank or different factors after all.
    """
    settle()
    if _pending is not None and _pending.error:  # still no process group: each rank for itself
        stop(_pending.error)


def decide(error: str | None) -> None:
    """End the run on every rank when any rank has an `error`; each rank must call this.

    Raises:
        SystemExit: A rank had an error.
    """
    record(Finding(error=error))
    require()


def disagreement(findings: Sequence[Finding]) -> str | None:
    """The sentence that ends a run with these findings in rank order, or None."""
    failed = [index for index, item in enumerate(findings) if item.error]
    if failed:
        sentence = findings[failed[0]].error
        return sentence if len(failed) == len(findings) else f"{sentence} ({_ranks(failed)})"
    first = findings[0]
    others = [i for i, item in enumerate(findings) if item.fingerprint != first.fingerprint]
    if others:
        return (
            f"the LongRoPE factors of {_ranks(others)} differ from those of rank 0; give every "
            "rank the same --longrope-config file"
        )
    others = [i for i, item in enumerate(findings) if item.attention != first.attention]
    if others:
        return (
            f"rank 0 has {first.attention} attention and {_ranks(others)} "
            f"{findings[others[0]].attention}; give every node the same packages, or "
            "--longrope-attention"
        )
    return None


def _ranks(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    return f"rank {shown}" if len(indices) == 1 else f"{len(indices)} ranks: {shown}"


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
