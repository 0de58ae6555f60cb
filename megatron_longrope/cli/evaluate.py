"""`longrope eval`: measure models under factors; what there is to measure the kinds say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_longrope import api
from megatron_longrope.cli.flags import add_command
from megatron_longrope.evaluation.kinds import KINDS

if TYPE_CHECKING:
    from megatron_longrope.evaluation.options import EvaluationOptions


def add_parser(commands: Any, about: str | None = None) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("eval", help=about)
    names = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in KINDS.values():
        add_command(
            names, kind.name, kind.options, run, help=kind.help, description=kind.description
        )


def run(options: EvaluationOptions) -> None:
    """Measure what is not measured yet, print the tables and write the records."""
    if rows := api.evaluate(options):
        kind = api.kind_of(options)
        for section in kind.sections_of(rows):
            print(f"{section.text(details=True)}\n")
        print(f"wrote {options.output}/{kind.name}.jsonl and {kind.name}.csv beside it")
