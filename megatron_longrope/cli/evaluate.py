"""`longrope eval`: measure models under factors; what there is to measure the kinds say."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.cli import options
from megatron_longrope.cli.flags import add_flags, read_flags
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.ranks import rank

if TYPE_CHECKING:
    from megatron_longrope.evaluation.kind import Kind
    from megatron_longrope.evaluation.session import Session


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "eval", help="measure perplexity, passkey, needles or short benchmarks"
    )
    names = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in KINDS.values():
        of_kind = names.add_parser(kind.name, help=kind.help, description=kind.description)
        options.add_model(of_kind, several=True)
        add_flags(of_kind, kind.options)
        of_kind.set_defaults(run=functools.partial(run, kind))


def run(kind: Kind, args: argparse.Namespace) -> None:
    """Measure what is not measured yet, print the tables and write the records."""
    from megatron_longrope.evaluation.records import write_csv
    from megatron_longrope.evaluation.targets import open_models

    given = read_flags(kind.options, args)
    models = open_models(args.load, args.hf, args.iteration, args.sliding_window)
    plan = kind.plan(given, models)
    session = _session(kind, args, given)
    session.run(plan)
    if rank() != 0:
        return
    rows = [session.records.find(cell.record) for cell in plan.cells]
    for section in kind.sections_of(rows):
        for table in section.tables:
            print("\n".join([table.text(details=True), *section.warnings, ""]))
    summary = kind.summary(session.records.rows)
    write_csv(Path(given.output) / f"{kind.name}.csv", summary, list(summary[0]))
    print(f"wrote {session.records.path} and {kind.name}.csv beside it")


def _session(kind: Kind, args: argparse.Namespace, given: Any) -> Session:
    """Return what measures and records the cells of the command."""
    from megatron_longrope.engine import process_groups
    from megatron_longrope.evaluation.records import Records
    from megatron_longrope.evaluation.session import Limit, Session

    if "RANK" in os.environ:
        process_groups.initialize(
            args.tensor_model_parallel_size, args.context_parallel_size, replicas=True
        )
    return Session(
        Records(Path(given.output) / f"{kind.name}.jsonl", kind.cell_fields),
        lambda model: options.load_engine_from(args, model.checkpoint, replicas=True),
        Limit(given.max_hours, given.yes),
        kind.name,
        kind.unit,
    )
