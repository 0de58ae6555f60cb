"""A kind of evaluation for tests: does the model repeat a token? All of it is in this file."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_longrope.evaluation import trials
from megatron_longrope.evaluation.kind import COUNT, Kind
from megatron_longrope.evaluation.options import EvaluationOptions, seed_flag, trials_flag
from megatron_longrope.evaluation.table import Value
from megatron_longrope.options import flag


@dataclass(frozen=True, kw_only=True)
class CopyingOptions(EvaluationOptions):
    GROUP: ClassVar[str] = "copying"

    distance: int = flag(4, type=int, metavar="D")
    """tokens between the two (default: 4)"""

    trials: int = trials_flag("length")
    seed: int = seed_flag()


def _plan(options, models):
    from megatron_longrope.evaluation.session import Cell, Plan
    from megatron_longrope.evaluation.targets import targets_at

    def measure(engine, cell):
        return {"found": engine.copies(cell.fields["length"], cell.fields["trial"]), "nll": None}

    cells = [
        Cell(
            target,
            {"length": n, "distance": options.distance, "seed": options.seed, "trial": trial},
            {n: 1},
        )
        for target in targets_at(models, options.longrope_config, options.lengths)
        for n in options.lengths
        for trial in range(options.trials)
    ]
    return Plan(cells, measure, shared=True)


def _sections(rows, window):
    found = trials.count(rows, "found")
    table = trials.table(
        found, lambda tally: Value(trials.percent(tally.share), tally.share), name="copying",
        title="Copying", quantity="share of copies", note="",
    )  # fmt: skip
    return [trials.section(found, rows, name="copying", title="Copying", what="Copies",
                           tables=[table], window=window)]  # fmt: skip


COPYING = Kind(
    "copying",
    key=("length", "distance", "seed", "trial"),
    required={**trials.REQUIRED, "distance": COUNT},
    numbers=trials.NUMBERS,
    help="repeat a token",
    description="A kind that the tests add.",
    options=CopyingOptions,
    plan=_plan,
    unit="trials",
    summary=lambda rows: rows,
    sections=_sections,
)
