"""`longrope report`: one HTML page, figures and their data from a finished evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `report`."""
    parser = commands.add_parser(
        "report",
        help="one self-contained HTML page, PNG figures and CSV data from an evaluation",
        description="Write a self-contained HTML page about an evaluated run, and beside it "
        "figures/ with PNG images and the CSV data behind them.",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR",
        help="holds results.json and, at any depth, LongRoPE JSON files and *.journal.jsonl",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page to write (default: DIR/report.html)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.evaluation.report import load_results, summary_table, write_report

    page = write_report(args.directory, args.output)
    print(summary_table(load_results(args.directory)))
    print(f"wrote {page} and {page.parent / 'figures'}")
