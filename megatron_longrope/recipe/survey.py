"""Where every stage of a recipe stands, from its files alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_longrope.recipe.document import Recipe, Stage
from megatron_longrope.recipe.fingerprint import Contents
from megatron_longrope.recipe.state import ASKED_FOR, Decision, Records, StageState, decide


@dataclass(frozen=True)
class Standing:
    """Where one stage stands."""

    stage: Stage
    """The stage."""

    state: StageState | None
    """What earlier runs recorded; None when it was never started."""

    decision: Decision
    """What a run would do now; action `wait` while something that it reads has to be made first."""


def survey(
    recipe: Recipe, stages: Sequence[Stage], contents: Contents, again: Collection[str] = ()
) -> list[Standing]:
    """Look at every stage.

    Args:
        stages (Sequence[Stage]): Those of the recipe that are asked about, in order.
        contents (Contents): Hashes of inputs.
        again (Collection[str]): Names of stages that are to run in any case. Defaults to ().
    """
    records = Records(recipe.output)
    found: list[Standing] = []
    pending: set[str] = set()
    for stage in stages:
        state = records.read(stage.name)
        if stage.name in again:
            decision = ASKED_FOR
        elif first := recipe.needs[stage.name] & pending:
            decision = Decision("wait", f"after {', '.join(sorted(first))}")
        else:
            # Without a record nothing is compared: do not read 100 GB to say that it is to do.
            decision = decide(stage, state, state and contents.parts(stage))
        if decision.action != "done":
            pending.add(stage.name)
        found.append(Standing(stage, state, decision))
    return found


def time_left(
    stages: Sequence[Stage], seconds: Mapping[str, float], done: Collection[str]
) -> float:
    """Seconds of work left by the expected durations, corrected by the pace of what is done.

    Args:
        stages (Sequence[Stage]): All that are asked for.
        seconds (Mapping[str, float]): Time that stages took so far.
        done (Collection[str]): Names of those that are finished.
    """
    expected = {stage.name: 60 * stage.minutes for stage in stages}
    planned = sum(expected[name] for name in done)
    pace = sum(seconds[name] for name in done) / planned if planned else 1.0
    return sum(
        max(pace * expected[name] - seconds.get(name, 0.0), 0.0)
        for name in expected
        if name not in done
    )
