"""Measure what is not measured yet: cell by cell, model by model, with the cost first."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.cost import Speed, StepSpeed, measure_speed, measure_steps
from megatron_longrope.evaluation.passes import Passes, discard
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.sharing import share
from megatron_longrope.evaluation.targets import NamedModel, Target
from megatron_longrope.flops import forward_flops
from megatron_longrope.out_of_memory import is_out_of_memory
from megatron_longrope.progress import Progress, format_duration
from megatron_longrope.ranks import rank

Trial = Callable[[Any, torch.Tensor], Any]
"""A forward pass of an engine over tokens `[1, n]`, to be timed."""


@dataclass(frozen=True)
class Cell:
    """One record to be measured."""

    target: Target
    """Model and factors."""
    fields: Mapping[str, Any]
    """Fields that tell it from the target's other cells."""
    forwards: Mapping[int, int]
    """Number of forward passes of each length in tokens."""
    num_new_tokens: int = 0
    """Tokens generated behind each of them, at most."""
    passes: Sequence[int] = ()
    """Length of each by its number, where what they give is kept for a run that is killed."""

    @property
    def record(self) -> dict[str, Any]:
        """Return the record's fields that are known before measuring."""
        return {**self.target.fields, **self.fields}

    @property
    def num_forwards(self) -> int:
        """Count the forward passes."""
        return sum(self.forwards.values())

    @property
    def flops(self) -> float:
        """Count the operations of all forward passes."""
        shape = self.target.model.checkpoint.shape
        return float(sum(n * sum(forward_flops(shape, k)) for k, n in self.forwards.items()))

    def seconds(self, speed: Speed, steps: StepSpeed | None, measured: Any) -> float:
        """Return what it is expected to take.

        Args:
            speed (Speed): Of forward passes.
            steps (StepSpeed, optional): Of tokens generated behind them.
            measured (ModelShape): Of the model that these were measured with.
        """
        shape = self.target.model.checkpoint.shape
        seconds = sum(n * speed.forward(shape, k) for k, n in self.forwards.items())
        if steps is not None:
            larger = forward_flops(shape, 1)[0] / forward_flops(measured, 1)[0]
            behind = sum(n * steps.step(k) for k, n in self.forwards.items())
            seconds += self.num_new_tokens * behind * larger
        return seconds


@dataclass(frozen=True)
class Plan:
    """What a command is to measure, and how."""

    cells: Sequence[Cell]

    measure: Callable[..., Mapping[str, Any]]
    """Gives a cell's other fields: of a shared plan `(engine, cell) -> fields`, called on the ranks
    of one copy of the model; else `(engine, cell, on_forward, passes) -> fields`, called on every
    rank, with what an earlier run left of a cell that keeps its passes, or None."""
    shared: bool
    """Whether copies of the model take different cells, each of one prompt; else all of them work
    on the same cell, whose forward passes they divide."""
    trial: Trial | None = None
    """What `measure` does with the engine and tokens, to be timed; by default their loss."""


@dataclass(frozen=True)
class Session:
    """How the cells of one command are measured."""

    records: Records
    """Where they go."""
    load: Callable[[NamedModel], Any]
    """Gives the engine of a model."""
    label: str
    """What is measured, for the progress."""
    unit: str
    """Name of a forward pass there."""
    max_hours: float
    """Expected hours, above which nothing is measured without `confirmed`."""
    confirmed: bool = False
    """The user has agreed to more."""

    def run(self, plan: Plan) -> None:
        """Measure the cells that are not recorded yet, model by model, never two in memory."""
        from megatron_longrope.engine.process_groups import from_first_rank

        self._check_distinct(plan.cells)
        self._check_alike(plan.cells)
        self._rename_models(plan.cells)
        found = from_first_rank([self.records.find(cell.record) is not None for cell in plan.cells])
        pending = []
        for cell, is_found in zip(plan.cells, found, strict=True):
            if is_found:  # a run that was killed before it could do so left them
                discard(self.records, cell.record)
            else:
                pending.append(cell)
        total = sum(cell.num_forwards for cell in plan.cells)
        with Progress(total, self.label, self.unit) as progress:
            if done := total - sum(cell.num_forwards for cell in pending):
                progress.update("already measured", done, resumed=True)
            unasked: Sequence[Cell] = [self._left(cell) for cell in pending]
            for _, cells in groupby(pending, key=lambda cell: cell.target.model):
                self._run_model(plan, list(cells), unasked, progress)
                unasked = ()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if done and not pending and rank() == 0:
                print(f"{self.label}: everything was already measured", flush=True)

    def _run_model(
        self, plan: Plan, cells: Sequence[Cell], unasked: Sequence[Cell], progress: Progress
    ) -> None:
        """Load a model and measure its cells; nothing refers to the engine afterwards.

        Args:
            plan (Plan): Says how.
            cells (Sequence[Cell]): Of this model.
            unasked (Sequence[Cell]): What is left of all models' cells, these first, if its cost
                has not been said yet.
            progress (Progress): Of all models.
        """
        engine = self.load(cells[0].target.model)
        if any(cell.forwards for cell in unasked):
            first = [cell for cell in unasked[: len(cells)] if cell.forwards] or cells
            self._present_cost(engine, plan.trial, first, unasked)

        def one(cell: Cell, *more: Any) -> Mapping[str, Any]:
            engine.set_config(cell.target.config)
            with _named_memory_error(cell):
                return plan.measure(engine, cell, *more)

        if plan.shared:
            for cell, fields in share(cells, one):
                self.records.append({**cell.record, **fields})
                progress.update(_note(cell))
            return
        for cell in cells:
            passes = Passes(self.records, cell.record) if cell.passes else None
            fields = one(cell, partial(progress.update, _note(cell)), passes)
            self.records.append({**cell.record, **fields})
            discard(self.records, cell.record)

    def _left(self, cell: Cell) -> Cell:
        """Return the cell without the forward passes that an earlier run kept."""
        if not cell.passes:
            return cell
        kept = Passes(self.records, cell.record).results
        left = (length for number, length in enumerate(cell.passes) if number not in kept)
        return replace(cell, forwards=Counter(left))

    def _check_distinct(self, cells: Sequence[Cell]) -> None:
        """Refuse to measure anything twice, of which one record would be left.

        Raises:
            LongRopeError: Two models have the same content, or a cell was asked for twice.
        """
        known: dict[str, Cell] = {}
        for cell in cells:
            key = self.records.key_of(cell.record)
            if key in known:
                first, second = known[key].target.model.label, cell.target.model.label
                if first != second:
                    raise LongRopeError(
                        f"{first} and {second} are the same model (their content is); give one of "
                        "them"
                    )
                raise LongRopeError(f"{_note(cell)} was asked for twice; ask for it once")
            known[key] = cell

    def _check_alike(self, cells: Sequence[Cell]) -> None:
        """Refuse ranks that would not measure the same, before they wait for one another.

        Raises:
            LongRopeError: On every rank alike.
        """
        from megatron_longrope.engine.process_groups import from_every_rank

        keys = [self.records.key_of(cell.record).encode() for cell in cells]
        first, *others = from_every_rank([hashlib.sha256(key).hexdigest()[:16] for key in keys])
        for number, found in enumerate(others, 1):
            for cell, one, other in zip(cells, first, found, strict=False):
                if one != other:
                    raise LongRopeError(
                        f"{_note(cell)}: rank {number} would measure something else than rank 0; "
                        "give all ranks the same files, and run a task that draws its data anew in "
                        "each process in one"
                    )

    def _rename_models(self, cells: Sequence[Cell]) -> None:
        """Call the models of earlier records what they are called now."""
        labels = {cell.target.model.content_sha256: cell.target.model.label for cell in cells}
        found = [(row, labels.get(row.get("checkpoint_sha256"))) for row in self.records.rows]
        self.records.append(
            *({**row, "model": now} for row, now in found if now and now != row.get("model"))
        )

    def _present_cost(
        self,
        engine: Any,
        trial: Trial | None,
        first: Sequence[Cell],
        pending: Sequence[Cell],
    ) -> None:
        """Print the expected cost; refuse to go above the limit.

        Of what is `pending` the `first` cells are of the engine's model.

        Raises:
            LongRopeError: Above the limit, and not confirmed.
        """
        lengths = sum((Counter(cell.forwards) for cell in pending), Counter())
        flops, count = sum(cell.flops for cell in pending), sum(lengths.values())
        longest = max(first, key=lambda cell: max(cell.forwards))
        engine.set_config(longest.target.config)
        generated = max(cell.num_new_tokens for cell in pending)
        run = partial(_timed, engine, trial, generated > 0)
        own = sum((Counter(cell.forwards) for cell in first), Counter())
        speed = measure_speed(run, engine.shape, own, 2 * engine.cp_group.size())
        tried = (max(2, speed.longest // 4), speed.longest)
        steps = measure_steps(run, tried) if generated else None
        seconds = sum(cell.seconds(speed, steps, engine.shape) for cell in pending)
        seconds /= engine.replica[1]
        cost = (
            f"{self.label}: {count:,} forward {'pass' if count == 1 else 'passes'} of up to "
            f"{max(lengths):,} tokens, {flops:.1e} FLOP: about {format_duration(seconds)}, by "
            f"trial passes of up to {speed.longest:,} tokens"
        )
        if rank() == 0:
            print(cost, flush=True)
        if seconds <= 3600 * self.max_hours or self.confirmed:
            return
        raise LongRopeError(
            f"{cost}, which is above --max-hours {self.max_hours:g}; give --yes to go on, or "
            "fewer lengths, documents or trials, or a longer stride"
        )


def _timed(
    engine: Any,
    trial: Trial | None,
    generates: bool,
    length: int,
    new_tokens: int = 1,
) -> float:
    """Return the first rank's seconds of a trial pass, with tokens generated at its end."""
    from megatron_longrope.engine.generation import generate
    from megatron_longrope.engine.process_groups import from_first_rank

    tokens = torch.zeros(1, length, dtype=torch.int64)
    started = time.perf_counter()
    if generates:
        generate(engine, tokens[:, : max(2, length - new_tokens)], new_tokens)
    elif trial is not None:
        trial(engine, tokens)
    else:
        engine.nll(tokens)
    return from_first_rank(time.perf_counter() - started)


def _note(cell: Cell) -> str:
    """Return what is being measured, in a few words."""
    record = cell.record
    names = (record["model"], record["label"], record["policy"], record.get("task"))
    words = [str(name) for name in names if name]
    return " ".join(words) + (f" at {record['length']} tokens" if "length" in record else "")


@contextlib.contextmanager
def _named_memory_error(cell: Cell) -> Iterator[None]:
    """Say which cell the memory did not suffice for, and what helps; ends this rank.

    The other ranks may already wait in a collective for this one, so that nobody can go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        smaller = "" if "length" in cell.fields else "lower --batch-size, "
        raise RuntimeError(
            f"out of memory for {_note(cell)}: {smaller}start more processes and raise "
            "--context-parallel-size, or give --dtype bfloat16; finished cells are kept, and the "
            "same command goes on from there"
        ) from error
