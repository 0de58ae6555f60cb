"""Replicas of the model: TP x CP ranks that score one candidate together.

The first rank of a replica, its leader, runs the search; the others lend their part of the model.
Only the leader decides anything, so that the ranks cannot disagree about what comes next.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.engine import Engine

# A rank may wait for its leader as long as the slowest replica takes for a candidate.
_PATIENCE = timedelta(days=30)


class Replica:
    """This rank's place in its replica, with the engine's interface for the leader.

    Under one rank a replica is the engine itself, at no cost.

    Args:
        engine (Engine): This rank's part of the model.
        size (int): Ranks of a replica: TP x CP.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine = engine
        world, rank = dist.get_world_size(), dist.get_rank()
        self.index, self.count = engine.replica
        """Which replica this rank belongs to, and how many there are."""
        self.is_leader = rank % size == 0
        """Whether this rank runs the search."""
        self._leader = self.index * size
        self._group = None
        if size > 1:
            # Every rank makes every group, in the same order. Gloo: orders are no work for a GPU,
            # and a rank may wait for one longer than NCCL's watchdog allows.
            for first in range(0, world, size):
                ranks = list(range(first, first + size))
                group = dist.new_group(ranks, timeout=_PATIENCE, backend="gloo")
                if first == self._leader:
                    self._group = group

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors on every rank of the replica; the leader calls it."""
        self._order("set_config", config.to_dict())
        self.engine.set_config(config)

    def nll(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Token losses; the leader calls it. See :meth:`Engine.nll`."""
        self._order("nll", tokens, start)
        return self.engine.nll(tokens, start)

    def serve(self) -> None:
        """Do what the leader orders, until it closes; the other ranks call it."""
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order, src=self._leader, group=self._group)
            name, *arguments = order[0]
            if name == "close":
                return
            try:
                if name == "set_config":
                    self.engine.set_config(LongRopeConfig.from_dict(*arguments))
                else:
                    self.engine.nll(*arguments)
            except torch.OutOfMemoryError:
                # The leader, with as much to hold, has run out of it too and records the failure.
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Let the other ranks go."""
        self._order("close")

    def _order(self, *order: Any) -> None:
        if self._group is not None:
            dist.broadcast_object_list([order], src=self._leader, group=self._group)
