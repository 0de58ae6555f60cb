"""The sections of a recipe file over those of the file that it extends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_longrope.recipe.nodes import Node, read_yaml

FORMAT = "1"
_NAMED = ("values", "profiles", "launch", "stages")
_SINGLE = ("about", "output", "plan")


@dataclass(frozen=True)
class Sections:
    """What a recipe holds, before names are put in."""

    single: Mapping[str, Node]
    """`about`, `output` and `plan`, where given."""

    values: Mapping[str, Node]
    """Values by name."""

    profiles: Mapping[str, Mapping[str, Node]]
    """Values by profile and name."""

    launch: Mapping[str, Node]
    """Launchers by name."""

    stages: Mapping[str, Node]
    """Stages by name, those of the extended file first. An empty one takes that file's away."""


def read_sections(path: Path, inner: tuple[Path, ...] = ()) -> Sections:
    """Read a recipe file and those that it extends.

    Args:
        path (Path): The file.
        inner (tuple[Path, ...]): Files that extend it. Defaults to ().

    Raises:
        ValueError: A file is no recipe of this format, or extends itself.
    """
    root = read_yaml(path)
    parts = root.mapping(required=("recipe",), optional=("extends", *_SINGLE, *_NAMED))
    if (version := parts["recipe"].text()).text != FORMAT:
        raise version.error(
            f"format {version.text!r} is not known; this version reads recipe: {FORMAT}"
        )
    base = Sections({}, {}, {}, {}, {})
    if "extends" in parts:
        name = parts["extends"].text()
        other = path.parent / name.text
        if other.resolve() in (path.resolve(), *(item.resolve() for item in inner)):
            raise name.error(f"{other} extends itself; take one extends away")
        base = read_sections(other, (path, *inner))
    values, profiles, launch, stages = (
        parts[key].items() if key in parts else {} for key in _NAMED
    )
    return Sections(
        single={**base.single, **{key: parts[key] for key in _SINGLE if key in parts}},
        values={**base.values, **values},
        profiles={
            **base.profiles,
            **{
                name: {**base.profiles.get(name, {}), **node.items()}
                for name, node in profiles.items()
            },
        },
        launch={**base.launch, **launch},
        stages={
            name: node
            for name, node in {**base.stages, **stages}.items()
            if not (node.is_empty and name in base.stages)
        },
    )
