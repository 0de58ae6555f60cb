"""The order of stages: who reads what others write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_longrope.recipe.document import Stage


def overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies inside the other."""
    one, other = os.path.abspath(one), os.path.abspath(other)
    return os.path.commonpath([one, other]) in (one, other)


def order(stages: Sequence[Stage]) -> tuple[tuple[Stage, ...], dict[str, frozenset[str]]]:
    """Sort stages so that each comes after those whose files it reads, else as written.

    Returns:
        tuple[tuple[Stage, ...], dict[str, frozenset[str]]]: The stages, and for each name the names
        of the stages that it reads from.

    Raises:
        ValueError: Stages wait for each other in a circle, or two write the same files.
    """
    _refuse_common_outputs(stages)
    needs = {
        stage.name: frozenset(
            other.name
            for other in stages
            if any(overlap(read, path) for read in stage.reads for path in other.writes)
        )
        for stage in stages
    }
    left, done = list(stages), []
    while left:
        names = {stage.name for stage in left}
        following = next((stage for stage in left if not needs[stage.name] & names), None)
        if following is None:
            raise left[0].error(_circle(needs, names))
        left.remove(following)
        done.append(following)
    return tuple(done), needs


def upstream(names: Iterable[str], needs: Mapping[str, frozenset[str]]) -> set[str]:
    """Stages and all that they need, at any distance."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(needs[name])
    return found


def downstream(names: Iterable[str], needs: Mapping[str, frozenset[str]]) -> set[str]:
    """Stages and all that need them, at any distance."""
    wanted = set(names)
    return {name for name in needs if upstream([name], needs) & wanted}


def missing_inputs(stages: Sequence[Stage], every: Sequence[Stage]) -> dict[str, list[str]]:
    """Inputs and programs that no stage writes and that are not there, by stage.

    Args:
        stages (Sequence[Stage]): Whose inputs are looked for.
        every (Sequence[Stage]): All stages of the recipe.
    """
    writes = [path for stage in every for path in stage.writes]
    found = {
        stage.name: [
            read
            for read in (*stage.reads, *stage.requires)
            if not os.path.exists(read) and not any(overlap(read, path) for path in writes)
        ]
        for stage in stages
    }
    return {name: paths for name, paths in found.items() if paths}


def _refuse_common_outputs(stages: Sequence[Stage]) -> None:
    written = [(stage, path) for stage in stages for path in stage.writes]
    for index, (stage, path) in enumerate(written):
        for other, earlier in written[:index]:
            if overlap(path, earlier):
                raise stage.error(
                    f"writes {path}, and so does stage {other.name} (line {other.line}: "
                    f"{earlier}); give every stage files of its own"
                )


def _circle(needs: Mapping[str, frozenset[str]], names: set[str]) -> str:
    """Follow needs among stages that all wait, until one comes up again."""
    path = [min(names)]
    while True:
        following = min(needs[path[-1]] & names)
        if following in path:
            circle = path[path.index(following) :]
            break
        path.append(following)
    if len(circle) == 1:
        return f"stage {circle[0]} reads what it writes itself; leave that out of its reads"
    return (
        "stages read each other's files in a circle "
        f"({' reads from '.join((*circle, circle[0]))}); take one of these inputs away"
    )
