"""Training curves of parallel layouts, resumed runs and progressive stages, against one process.

    python benchmarks/training_curves.py            # half an hour or more on 2 cores
    python benchmarks/training_curves.py --quick    # minutes, writes nothing

Claim: however context, tensor, data and pipeline parallelism divide it, wherever it is interrupted
and whatever the layout in which it goes on, fine-tuning at 8 times the window takes the same steps
as in one process, up to the rounding of fp32 sums in another order.

The baseline is one process. All runs start from a checkpoint that one process wrote, with
Megatron's own loop, loader and shuffling on the Python standard library. Every step's loss,
gradient norm and norm of all parameters after it are compared. The last row is a control: one
process whose factors differ a little, in the first four positions only; what a row may hide is far
below it. Runs that are done stay in `--output`: an interrupted benchmark goes on there.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

import curves
import launching
import measure
from curves import LAYOUTS, ONE, STAGE_STEPS, STEPS, TAGS, Curve, Layout, Trainer
from matplotlib.ticker import FuncFormatter

from megatron_longrope.files import write_text_atomic
from megatron_longrope.report.style import (
    CYCLE,
    MUTED,
    Drawing,
    blank_figure,
    finish,
    label_ends,
    plot_line,
)

BASELINE, CONTROL = "one process", "no start tokens"
QUICK_STEPS = 8
STAGES = "AB"
CHANGED = (  # a run's layout up to its checkpoint, and after it
    (BASELINE, "CP2"),
    ("CP2", "CP4"),
    ("CP4", BASELINE),
    ("CP2", "TP2"),
)
GROUPS = ("another layout", "killed and resumed", "changed after a save", "two stages")
_FLOOR = 2.0**-24  # half a unit in the last place: what a zero is drawn as


@dataclass(frozen=True)
class Row:
    """One run beside its reference."""

    name: str
    group: str
    curve: Curve
    reference: Curve


def once(trainer: Trainer, name: str, train: Callable[[], object], steps: int = STEPS) -> Curve:
    """The run's curve; a run that stopped halfway begins anew."""
    if not trainer.is_done(name, steps):
        print(f"{name} ...", flush=True)
        trainer.forget(name)
        train()
    return trainer.curve(name)


def layout_of(name: str) -> Layout:
    """By the name that the table has."""
    return ONE if name == BASELINE else LAYOUTS[name]


def layout_rows(trainer: Trainer, names: Sequence[str], steps: int) -> list[Row]:
    """Whole runs in each layout."""
    reference, *found = [
        once(trainer, name, partial(trainer.run, name, layout_of(name), steps=steps), steps)
        for name in (BASELINE, *names)
    ]
    return [
        Row(name, GROUPS[0], curve, reference) for name, curve in zip(names, found, strict=True)
    ]


def resumed_rows(trainer: Trainer, reference: Curve) -> list[Row]:
    """Runs that were killed after a save, and runs that go on in another layout."""

    def killed(name: str, layout: Layout) -> None:
        trainer.kill_after_save(name, layout)
        trainer.run(name, layout)

    rows = []
    for layout in (BASELINE, "CP2"):
        name = f"{layout}, killed"
        curve = once(trainer, name, partial(killed, name, layout_of(layout)))
        rows.append(Row(name, GROUPS[1], curve, reference))
    for begun, then in CHANGED:
        name = f"{begun}, then {then}"
        curve = once(trainer, name, partial(trainer.go_on, name, layout_of(then), begun))
        rows.append(Row(name, GROUPS[2], curve, reference))
    return rows


def walk_rows(trainer: Trainer) -> list[Row]:
    """Both stages of the progressive walk; each layout goes on from its own first stage."""
    found = []
    for name in (BASELINE, "CP2"):
        first, second = (f"{name}, stage {stage}" for stage in STAGES)
        layout = layout_of(name)
        runs = {
            first: partial(trainer.first_stage, first, layout),
            second: partial(trainer.second_stage, second, layout, first),
        }
        found.append([once(trainer, *item, STAGE_STEPS) for item in runs.items()])
    return [
        Row(f"CP2, stage {stage}", GROUPS[3], curve, reference)
        for stage, reference, curve in zip(STAGES, *found, strict=True)
    ]


def control_row(trainer: Trainer, reference: Curve, steps: int) -> Row:
    """One process with a small real difference."""
    factors = curves.factors_for(trainer.window, 8)
    other = trainer.directory / "no_start_tokens.json"
    sets = tuple(replace(item, num_start_tokens=0) for item in factors.factor_sets)
    replace(factors, factor_sets=sets).save(other)
    flags = ("--longrope-config", str(other))  # the last of two equal flags counts
    curve = once(trainer, CONTROL, partial(trainer.run, CONTROL, ONE, *flags, steps=steps), steps)
    return Row(CONTROL, "control", curve, reference)


def summarise(rows: Sequence[Row]) -> list[dict]:
    """Largest relative differences of each row, and where the reference's loss went."""
    result = []
    for row in rows:
        largest = row.curve.largest_differences(row.reference)
        losses = row.curve.values["loss"]
        steps = row.curve.steps
        result.append({
            "run": row.name,
            "group": row.group,
            "flags": LAYOUTS[row.name].flags if row.name in LAYOUTS else None,
            "first_step": steps[0],
            "last_step": steps[-1],
            "largest_difference": {name: float(f"{value:.3g}") for name, value in largest.items()},
            "loss": [round(losses[steps[0]], 4), round(losses[steps[-1]], 4)],
        })  # fmt: skip
    return result


def print_summary(rows: Sequence[dict]) -> None:
    """The table of the largest relative differences."""
    measure.print_table(
        ("run", "group", "steps", *(f"{name} differs by" for name in TAGS), "loss"),
        [
            (
                row["run"],
                row["group"],
                f"{row['first_step']}-{row['last_step']}",
                *(f"{value:.1e}" for value in row["largest_difference"].values()),
                "{:.3f} -> {:.3f}".format(*row["loss"]),
            )
            for row in rows
        ],
    )


def draw(rows: Sequence[Row]) -> Drawing:
    """Losses of all runs above, how far they are from one process below."""
    groups = [group for group in (*GROUPS[:3], "control") if any(r.group == group for r in rows)]
    styles = dict(zip(groups, CYCLE, strict=False))
    title = "Fine-tuning at 8 times the window: every layout against one process"
    with blank_figure(title, 6.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        data = []
        worst: dict[str, dict[int, float]] = {group: {} for group in groups}
        for row in rows:
            differences = row.curve.differences(row.reference)
            data += [
                (row.name, row.group, quantity, at, f"{values[at]:.9g}", f"{difference:.3g}")
                for (quantity, values), series in zip(
                    row.curve.values.items(), differences.values(), strict=True
                )
                for at, difference in zip(row.curve.steps, series, strict=True)
            ]
            if row.group in styles:
                series = row.curve.values["loss"]
                plot_line(
                    above,
                    row.curve.steps,
                    [series[at] for at in row.curve.steps],
                    styles[row.group]._replace(marker=""),
                    linewidth=0.9,
                    alpha=0.6,
                )
                seen = worst[row.group]
                for at, value in zip(row.curve.steps, differences["loss"], strict=True):
                    seen[at] = max(seen.get(at, _FLOOR), value)
        reference = rows[0].reference
        above.plot(reference.steps, list(reference.values["loss"].values()), color=MUTED,
                   linewidth=4, alpha=0.3, zorder=1)  # fmt: skip
        ends = []
        for group, series in worst.items():
            plot_line(below, list(series), list(series.values()), styles[group], markevery=5)
            ends.append((list(series.values())[-1], styles[group], group, False))
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        below.set_xlabel("Step")
        above.set_ylabel("Loss")
        below.set_ylabel("Relative difference of the loss")
        label_ends(below, ends)
        return finish(
            figure, "training_curves",
            "Above, all runs on top of each other, one process as the grey band. Below, the "
            "largest relative difference of a loss from one process's, over the runs of a kind; "
            f"zero is drawn as {_FLOOR:.0e}.",
            ("run", "group", "quantity", "step", "value", "relative_difference"), data,
        )  # fmt: skip


def main() -> None:
    """Run everything, print the table and the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="CP2 only, few steps")
    parser.add_argument("--output", type=Path, help="directory for the runs (default: temporary)")
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a killed run's last record is cut
    launching.TIMEOUT_S = 1800  # a busy machine is no failure
    output = args.output or Path(tempfile.mkdtemp(prefix="training_curves-"))
    measure.print_environment()
    rows = run_all(output, quick=args.quick)
    if not args.output:
        shutil.rmtree(output)
    summary = summarise(rows)
    print_summary(summary)
    worst = max(row["largest_difference"]["loss"] for row in summary[:-1])
    if not args.quick:
        drawing = draw(rows)
        (measure.RESULTS / "training_curves.png").write_bytes(drawing.png)
        write_text_atomic(measure.RESULTS / "training_curves.csv", drawing.csv)
    measure.finish(
        "training_curves",
        worst / summary[-1]["largest_difference"]["loss"],
        full_run=not args.quick,
        ratio_of="largest relative difference of a loss from one process's, any run and step / the "
        "same of the control, one process with factors that lack the four start tokens",
        steps=rows[0].curve.steps[-1],
        rows=summary,
    )


def run_all(output: Path, *, quick: bool) -> list[Row]:
    """All rows, the control last."""
    trainer, walker = Trainer(output / "matrix"), Trainer(output / "walk", window=128)
    for one in (trainer,) if quick else (trainer, walker):
        if not (one.base / "latest_checkpointed_iteration.txt").exists():
            shutil.rmtree(one.directory, ignore_errors=True)
            one.prepare()
    if quick:
        rows = layout_rows(trainer, ["CP2"], QUICK_STEPS)
        return [*rows, control_row(trainer, rows[0].reference, QUICK_STEPS)]
    rows = layout_rows(trainer, list(LAYOUTS), STEPS)
    reference = rows[0].reference
    rows += resumed_rows(trainer, reference) + walk_rows(walker)
    return [*rows, control_row(trainer, reference, STEPS)]


if __name__ == "__main__":
    main()
