"""`longrope report`: one HTML page, figures and their data from finished evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `report`."""
    parser = commands.add_parser(
        "report",
        help="one self-contained HTML page, PNG figures and CSV data from evaluations",
        description="Write a self-contained HTML page about one evaluated run, or one that "
        "compares several models, and beside it figures/ with PNG images and the CSV data behind "
        "them.",
    )
    parser.add_argument(
        "directory", type=Path, nargs="+", metavar="DIR",
        help="holds, at any depth, what `longrope eval` wrote (ppl.jsonl, passkey.jsonl, "
        "needle.jsonl, short.jsonl); also LongRoPE JSON files, *.journal.jsonl and, at its top, "
        "facts.json",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the page to write (default: DIR/report.html, and with several DIR ./report.html)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.report.page import report_tables, write_report
    from megatron_longrope.report.reading import read_measurements

    measurements = read_measurements(args.directory)
    page = write_report(args.directory, args.output, measurements=measurements)
    print(report_tables(args.directory, measurements=measurements))
    print(f"wrote {page}, {page.parent / 'figures'} and {page.parent / 'tables'}")
