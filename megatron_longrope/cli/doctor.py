"""`longrope doctor`: would the plugin work here?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_longrope.integration.checkup import Checkup


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="versions, kernels, and whether the hooks fit this Megatron",
        description="Versions, attention and RoPE kernels, and whether every Megatron symbol that "
        "the plugin replaces is there with the parameters that it relies on. Exits with 1 when "
        "the plugin would not work.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import dataclasses
    import json

    from megatron_longrope.integration.checkup import examine

    checkup = examine()
    if args.json:
        print(json.dumps({"works": checkup.works, **dataclasses.asdict(checkup)}, indent=2))
    else:
        print("\n".join(_lines(checkup)))
    return 0 if checkup.works else 1


def _lines(checkup: Checkup) -> list[str]:
    versions = {name: version or "not installed" for name, version in checkup.versions.items()}
    cuda = versions.pop("cuda") if checkup.versions["cuda"] else "none"
    versions.pop("cuda", None)
    versions["torch"] += f" (CUDA {cuda}, GPU {checkup.gpu or 'none'})"
    rows = list(versions.items())
    rows += [(name, f"from {path or 'nowhere'}") for name, path in checkup.locations.items()]
    rows.append(("dataset helpers", checkup.helpers))
    rows += [(f"attention, {name}", choice) for name, choice in checkup.attention.items()]
    rows.append(("rope kernel", checkup.rope))
    rows += [
        (item.role, f"{item.symbol}: {item.state}" + (f" ({item.detail})" if item.detail else ""))
        for item in checkup.symbols
    ]
    rows += [("note", note) for note in checkup.notes]
    rows += [("problem", problem) for problem in checkup.problems]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    if checkup.works:
        return [*lines, "the plugin works here"]
    return [*lines, f"the plugin would not work here: {checkup.problems[0]}"]
