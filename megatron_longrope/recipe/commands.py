"""What a stage runs: the words that decide the result, and the words that start it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longrope.recipe.values import Names, Text

_PYTHON = (sys.executable,)
_PROGRAMS = {
    "longrope": (*_PYTHON, "-m", "megatron_longrope"),
    "torchrun": (*_PYTHON, "-m", "torch.distributed.run"),
    "python": _PYTHON,
}


@dataclass(frozen=True)
class Launcher:
    """How commands start."""

    name: str
    """As stages call it."""

    start: Text
    """The command line, which `${module}` or `${command}` stand in. Of a submitted job: what
    submits it."""

    alive: Text | None = None
    """Prints something while the job `${job}` waits or runs; None for a process on this machine."""

    grace: float = 60.0
    """Seconds that a job may be away before it left its exit code; file systems may lag."""


PROCESS = Launcher("process", Text("${command}", "launch.process"))


@dataclass(frozen=True)
class Command:
    """One command of a stage."""

    computed: tuple[str, ...]
    """`run` and `args`: what the result depends on, independent of where the output lies."""

    words: tuple[str, ...]
    """`run`, `args` and `how` as a person types them."""

    argv: tuple[str, ...]
    """What is started on this machine, the launcher included."""

    alive: tuple[str, ...] | None
    """Prints something while the job `${job}` waits or runs; None for a process."""

    grace: float
    """See :class:`Launcher`."""

    launcher: str
    """Its name."""


def build_command(
    run: Sequence[Text], args: Sequence[Text], how: Sequence[Text], launcher: Launcher, names: Names
) -> Command:
    """Put names and launcher into a command.

    Raises:
        ValueError: A name is unknown, or the launcher needs a Python program and `run` is none.
    """
    words = names.words((*run, *args, *how))
    module = {"longrope": ("-m", "megatron_longrope", *words[1:]), "python": words[1:]}
    within = names.having(command=executable(words))
    if words[0] in module:
        within = within.having(module=module[words[0]])
    elif "${module}" in launcher.start.text:
        raise run[0].error(
            f"launch {launcher.name} starts a Python module, and {words[0]} is none; run "
            "longrope ... or python ..., or use ${command} in the launcher"
        )
    started = within.words((launcher.start,))
    if not started:
        raise launcher.start.error("is empty; write a command line with ${module} or ${command}")
    return Command(
        computed=names.movable().words((*run, *args)),
        words=words,
        argv=executable(started),
        # The job's number is known later; its name stays.
        alive=launcher.alive and names.having(job="${job}").words((launcher.alive,)),
        grace=launcher.grace,
        launcher=launcher.name,
    )


def executable(words: Sequence[str]) -> tuple[str, ...]:
    """`longrope`, `torchrun` and `python` as the first word are those of this Python."""
    return (*_PROGRAMS.get(words[0], words[:1]), *words[1:])


def display(command: Sequence[str]) -> str:
    """The command as a person would type it: `longrope ...` and `torchrun ...`."""
    text = shlex.join(command)
    python = shlex.quote(sys.executable)
    text = text.replace(f"{python} -m megatron_longrope ", "longrope ")
    text = text.replace(f"{python} -m torch.distributed.run ", "torchrun ")
    return text.replace(f"{python} ", "python ")
