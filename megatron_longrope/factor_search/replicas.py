"""Replicas of the model: TP x CP ranks that score one candidate together.

The first rank of a replica, its leader, runs the search; the others lend their part of the model.
Only the leader decides anything, so that the ranks cannot disagree about what comes next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.engine.process_groups import PATIENCE
from megatron_longrope.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from megatron_longrope.engine import Answer, Engine


class Replica:
    """This rank's place in its replica, with the engine's interface for the leader.

    Under one rank a replica is the engine itself, at no cost. With more of them an out-of-memory
    ends the job, where one rank would record it as the candidate's failure and go on.

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
        self._is_in_step = True  # False when this rank has left a forward pass halfway
        self._group = None
        if size > 1:
            # Every rank makes every group, in the same order. Gloo: orders are no work for a GPU,
            # and a rank may wait for one longer than NCCL's watchdog allows.
            for first in range(0, world, size):
                ranks = list(range(first, first + size))
                group = dist.new_group(ranks, timeout=PATIENCE, backend="gloo")
                if first == self._leader:
                    self._group = group

    def set_config(self, config: LongRopeConfig) -> None:
        """Swap the factors on every rank of the replica; the leader calls it."""
        self._order("set_config", config.to_dict())
        self.engine.set_config(config)

    def nll(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Token losses; the leader calls it. See :meth:`Engine.nll`."""
        self._order("nll", tokens, start)
        with self._in_step():
            return self.engine.nll(tokens, start)

    def answer(self, tokens: Tensor, num_answer_tokens: int) -> Answer:
        """Loss and greedy choice of the last tokens; the leader calls it. See
        :meth:`Engine.answer`."""
        self._order("answer", tokens, num_answer_tokens)
        with self._in_step():
            return self.engine.answer(tokens, num_answer_tokens)

    def serve(self) -> None:
        """Do what the leader orders, until it closes; the other ranks call it.

        Raises:
            RuntimeError: This rank ran out of memory.
        """
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order, src=self._leader, group=self._group)
            name, *arguments = order[0]
            if name == "close":
                return
            if name == "set_config":
                self.engine.set_config(LongRopeConfig.from_dict(*arguments))
            else:
                with self._in_step():
                    getattr(self.engine, name)(*arguments)

    def close(self) -> None:
        """Let the other ranks go, unless they wait in a layer for a rank that failed there."""
        if self._is_in_step:
            self._order("close")

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        """Around a forward pass, which the ranks of a replica can only finish together.

        A rank that leaves it halfway cannot take the others along: they wait in a collective of the
        layer where it failed. It ends, and the launcher ends the others.
        """
        self._is_in_step = False
        try:
            yield
        except RuntimeError as error:
            if self._group is None or not is_out_of_memory(error):
                raise
            raise RuntimeError(
                f"rank {dist.get_rank()} ran out of memory in a forward pass that its replica's "
                "ranks can only finish together; every finished evaluation is in the journal: "
                "start the job again with --resume and more --context-parallel-size or "
                "--tensor-model-parallel-size, or a shorter --target-length"
            ) from error
        self._is_in_step = True

    def _order(self, *order: Any) -> None:
        if self._group is not None:
            dist.broadcast_object_list([order], src=self._leader, group=self._group)
