"""A recipe file, read and checked: YAML in, frozen dataclasses with every name put in out.

Every scalar is text, as in yaml.BaseLoader: 1e-5, yes and 12:00:00 stay what they look like.
docs/recipes.md describes the format.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longrope.recipe import graph
from megatron_longrope.recipe.commands import PROCESS, Command, Launcher, build_command
from megatron_longrope.recipe.nodes import Node
from megatron_longrope.recipe.sections import Sections, read_sections
from megatron_longrope.recipe.values import Names, Text, Value, is_name

PRIVATE = ".recipe"
_RESERVED = (PRIVATE, "logs", "stale")
_OWN_NAMES = ("output", "recipe", "python", "module", "command", "job")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Stage:
    """One step of a recipe."""

    name: str
    """Names the log and the state."""

    where: str
    """`file:line: key`, for messages."""

    line: int
    """Line in the recipe file."""

    about: str
    """What it does; may be empty."""

    commands: tuple[Command, ...]
    """Run one after the other."""

    reads: Mapping[str, str]
    """Files and folders whose content the result depends on: the path, and how it is recorded,
    which does not change when the output folder is moved."""

    requires: tuple[str, ...]
    """Files and folders that must be there before anything starts, whatever their content."""

    writes: tuple[str, ...]
    """Files and folders that exist when the stage is done."""

    environment: Mapping[str, str]
    """Variables that the commands need beyond those of this process."""

    show: re.Pattern[str] | None
    """Which lines of the output are shown; None shows all. The log has every line."""

    minutes: float
    """Expected duration."""

    retries: int
    """How often a command is run again after it failed."""

    patience: float
    """Seconds between SIGTERM and SIGKILL when a run is to end."""

    def error(self, message: str) -> ValueError:
        """An error about this stage."""
        return ValueError(f"{self.where}: {message}")


@dataclass(frozen=True)
class Recipe:
    """A recipe file under chosen profiles and values."""

    path: Path
    """The file."""

    about: str
    """What the whole is; may be empty."""

    output: Path
    """Folder of all that is written: artifacts, logs, state."""

    stages: tuple[Stage, ...]
    """Each after those that it reads from."""

    needs: Mapping[str, frozenset[str]]
    """For each stage, the stages that it reads from."""

    plan: Mapping[str, str]
    """The hardware that `plan` assumes: gpu, gpus, memory; may be empty."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        profiles: Sequence[str] = (),
        overrides: Mapping[str, str] | None = None,
        output: str | Path | None = None,
    ) -> Recipe:
        """Read a recipe.

        Args:
            path (str | Path): The YAML file. Relative paths in it start at the working directory;
                `${recipe}` is the folder of the file.
            profiles (Sequence[str]): Put over the values, the last over the others. Defaults to ().
            overrides (Mapping[str, str], optional): Values put over all. Defaults to none.
            output (str | Path, optional): Instead of the file's `output`.

        Raises:
            ValueError: Anything breaks a rule of the format; names file, line and key.
        """
        path = Path(path)
        sections = read_sections(path)
        if not sections.stages:
            raise ValueError(f"{path}: has no stages; add stages: with at least one")
        fixed = {"recipe": str(path.parent), "python": sys.executable}
        names = Names(_values(sections, profiles, overrides or {}), fixed)
        folder = _output(sections.single.get("output"), names, output, path)
        names = names.having(output=str(folder))
        names.check()
        launchers = _launchers(sections.launch)
        stages = [
            _stage(name, node, names, launchers, folder) for name, node in sections.stages.items()
        ]
        ordered, needs = graph.order(stages)
        about = sections.single.get("about")
        return cls(
            path=path,
            about=names.text(about.text()) if about else "",
            output=folder,
            stages=ordered,
            needs=needs,
            plan=_plan(sections.single.get("plan"), names),
        )

    def until(self, name: str | None) -> tuple[Stage, ...]:
        """A stage and all that it needs; all stages for None.

        Raises:
            ValueError: There is no such stage.
        """
        if name is None:
            return self.stages
        wanted = graph.upstream([self.named(name).name], self.needs)
        return tuple(stage for stage in self.stages if stage.name in wanted)

    def named(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"{self.path} has no stage {name}; its stages are {known}")


def _values(
    sections: Sections, chosen: Sequence[str], overrides: Mapping[str, str]
) -> dict[str, Value]:
    """The values under the chosen profiles and the command line's settings."""
    nodes = dict(sections.values)
    for name in chosen:
        if name not in sections.profiles:
            known = ", ".join(sections.profiles) or "none"
            raise ValueError(f"there is no profile {name}; the recipe has {known}")
        nodes.update(sections.profiles[name])
    for name, node in nodes.items():
        if not is_name(name):
            raise node.error(
                f"a value cannot be called {name!r}; use letters, digits and _, no digit first"
            )
        if name in _OWN_NAMES:
            raise node.error(f"{name} has a meaning of its own; choose another name")
    found = {name: node.value() for name, node in nodes.items()}
    for name, text in overrides.items():
        if name not in found:
            known = ", ".join(found) or "none"
            raise ValueError(f"--set {name}: there is no such value; the recipe has {known}")
        given = Text(text, f"--set {name}")
        found[name] = (given,) if isinstance(found[name], tuple) else given
    return found


def _output(node: Node | None, names: Names, given: str | Path | None, path: Path) -> Path:
    if given is not None:
        return Path(given)
    if node is None:
        raise ValueError(f"{path}: says no output folder; add output: or give --output")
    return Path(names.text(node.text()))


def _launchers(nodes: Mapping[str, Node]) -> dict[str, Launcher]:
    launchers = {PROCESS.name: PROCESS}
    for name, entry in nodes.items():
        if name == PROCESS.name:
            raise entry.error(f"{name} is built in; choose another name")
        if not entry.is_mapping:
            launchers[name] = Launcher(name, entry.text())
            continue
        parts = entry.mapping(required=("submit", "alive"), optional=("grace",))
        grace = _number(parts["grace"], Names({}, {})) if "grace" in parts else 60.0
        launchers[name] = Launcher(name, parts["submit"].text(), parts["alive"].text(), grace)
    return launchers


def _stage(
    name: str, node: Node, names: Names, launchers: Mapping[str, Launcher], output: Path
) -> Stage:
    if not _STAGE_NAME.fullmatch(name):
        raise node.error(
            f"a stage cannot be called {name!r}, because files are named after it; use letters, "
            "digits, _, - and ."
        )
    command_keys = ("run", "args", "how")
    parts = node.mapping(
        required=(),
        optional=(
            *(*command_keys, "launch"),
            *("about", "commands", "reads", "requires", "writes", "environment", "show", "minutes"),
            *("retries", "patience"),
        ),
    )
    if "commands" in parts:
        if both := [key for key in command_keys if key in parts]:
            raise parts[both[0]].error(
                f"stands beside commands; move {both[0]} into the commands, or write one command "
                "without commands"
            )
        common = {"launch": parts["launch"]} if "launch" in parts else {}
        commands = [
            _command(
                {**common, **entry.mapping(("run",), (*command_keys, "launch"))},
                entry,
                names,
                launchers,
            )
            for entry in parts["commands"].entries()
        ]
        if not commands:
            raise parts["commands"].error("is empty; give at least one command")
    elif "run" in parts:
        commands = [_command(parts, node, names, launchers)]
    else:
        raise node.error("has neither run nor commands; say what it runs")
    return Stage(
        name=name,
        where=node.where,
        line=node.line,
        about=names.text(parts["about"].text()) if "about" in parts else "",
        commands=tuple(commands),
        reads=_reads(parts.get("reads"), names),
        requires=names.texts(parts["requires"].texts()) if "requires" in parts else (),
        writes=tuple(_writes(parts.get("writes"), names, output)),
        environment={
            key: names.text(entry.text())
            for key, entry in (
                parts["environment"].items().items() if "environment" in parts else ()
            )
        },
        show=_pattern(parts.get("show")),
        minutes=_number(parts["minutes"], names) if "minutes" in parts else 1.0,
        retries=_count(parts["retries"], names) if "retries" in parts else 0,
        patience=_number(parts["patience"], names) if "patience" in parts else 60.0,
    )


def _command(
    parts: Mapping[str, Node], node: Node, names: Names, launchers: Mapping[str, Launcher]
) -> Command:
    name = names.text(parts["launch"].text()) if "launch" in parts else PROCESS.name
    if name not in launchers:
        raise parts["launch"].error(
            f"launch {name} is not known; choose among {', '.join(launchers)}"
        )
    run, args, how = (
        (parts["run"].text(),),
        parts["args"].texts() if "args" in parts else (),
        parts["how"].texts() if "how" in parts else (),
    )
    if not names.words(run):
        raise node.error("runs nothing; give a program such as longrope search")
    return build_command(run, args, how, launchers[name], names)


def _reads(node: Node | None, names: Names) -> dict[str, str]:
    items = node.texts() if node else ()
    return dict(zip(names.texts(items), names.movable().texts(items), strict=True))


def _writes(node: Node | None, names: Names, output: Path) -> Iterator[str]:
    for path in names.texts(node.texts()) if node else ():
        if os.path.abspath(path) == os.path.abspath(output) or not _inside(path, output):
            raise node.error(
                f"{path} does not lie under the output folder {output}; write ${{output}}/..."
            )
        for name in _RESERVED:
            if graph.overlap(path, str(output / name)):
                raise node.error(
                    f"{path} lies in {output / name}, which the recipe's own records are in; "
                    "choose another place"
                )
        yield path


def _inside(path: str, folder: Path) -> bool:
    inner, outer = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([inner, outer]) == outer


def _pattern(node: Node | None) -> re.Pattern[str] | None:
    if node is None:
        return None
    text = node.text()
    try:
        return re.compile(text.text)
    except re.error as error:
        raise text.error(f"{text.text!r} is no regular expression ({error}); correct it") from None


def _number(node: Node, names: Names) -> float:
    item = node.text()
    text = names.text(item)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise item.error(f"{text!r} is not a number of at least 0; write one such as 30")
    return number


def _count(node: Node, names: Names) -> int:
    item = node.text()
    text = names.text(item)
    if not (text.isascii() and text.isdigit()):
        raise item.error(f"{text!r} is not a whole number of at least 0; write one such as 2")
    return int(text)


def _plan(node: Node | None, names: Names) -> dict[str, str]:
    if node is not None:
        node.mapping(required=(), optional=("gpu", "gpus", "memory"))
    return _texts(node, names)


def _texts(node: Node | None, names: Names) -> dict[str, str]:
    """A mapping of texts, with names put in."""
    return {key: names.text(entry.text()) for key, entry in (node.items() if node else {}).items()}
