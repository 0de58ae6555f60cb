"""`longrope doctor`: would the plugin work here?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_longrope.cli.flags import add_command
from megatron_longrope.options import Options, flag

if TYPE_CHECKING:
    from megatron_longrope.checkup import Checkup


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """What `longrope doctor` is told."""

    json: bool = flag(False)
    """print one JSON object instead"""


# What `json` calls the role of a symbol, in words.
_ROLES = {"hook": "replaced", "stand-in": "reimplemented"}


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the subcommand."""
    add_command(
        commands,
        "doctor",
        DoctorOptions,
        run,
        help=about,
        description="Versions, attention and RoPE kernels, and whether every Megatron symbol that "
        "the plugin replaces is there with the parameters that it relies on. Exits with 1 when "
        "the plugin would not work.",
    )


def run(options: DoctorOptions) -> int:
    """Run the command."""
    import json

    from megatron_longrope.checkup import examine

    checkup = examine()
    if options.json:
        print(json.dumps({"works": checkup.works, **asdict(checkup)}, indent=2))
    else:
        print("\n".join(_lines(checkup)))
    return 0 if checkup.works else 1


def _lines(checkup: Checkup) -> list[str]:
    versions = {name: version or "not installed" for name, version in checkup.versions.items()}
    del versions["cuda"]
    cuda = checkup.versions["cuda"] or "none"
    versions["torch"] += f" (CUDA {cuda}, GPU {checkup.gpu or 'none'})"
    rows = list(versions.items())
    rows += [(name, f"from {path or 'nowhere'}") for name, path in checkup.locations.items()]
    rows.append(("dataset helpers", checkup.helpers))
    rows += [(f"attention, {name}", choice) for name, choice in checkup.attention.items()]
    rows.append(("rope kernel", checkup.rope))
    rows += [
        (
            _ROLES.get(item.role, item.role),
            f"{item.symbol}: {item.state}" + (f" ({item.detail})" if item.detail else ""),
        )
        for item in checkup.symbols
    ]
    rows += [("note", note) for note in checkup.notes]
    rows += [("problem", problem) for problem in checkup.problems]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    if checkup.works:
        return [*lines, "the plugin works here"]
    return [*lines, f"the plugin would not work here: {checkup.problems[0]}"]
