"""`longrope report`: one HTML page, figures and their data from finished evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.cli.flags import add_command
from megatron_longrope.options import Options, flag


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What `longrope report` is told."""

    directory: tuple[Path, ...] = flag(positional=True, type=Path, nargs="+", metavar="DIR")
    """holds, at any depth, what `longrope eval` wrote (ppl.jsonl, passkey.jsonl, needle.jsonl,
    short.jsonl); also LongRoPE JSON files, *.journal.jsonl and, at its top, facts.json"""

    output: str | None = flag(None, metavar="FILE")
    """the page to write (default: DIR/report.html, and with several DIR ./report.html)"""


def add_parser(commands: Any) -> None:
    """Add `report`."""
    add_command(
        commands,
        "report",
        ReportOptions,
        run,
        help="one self-contained HTML page, PNG figures and CSV data from evaluations",
        description="Write a self-contained HTML page about one evaluated run, or one that "
        "compares several models, and beside it figures/ with PNG images and the CSV data behind "
        "them.",
    )


def run(options: ReportOptions) -> None:
    """Run the command."""
    from megatron_longrope.report.page import report_tables, write_report
    from megatron_longrope.report.reading import read_measurements

    measurements = read_measurements(options.directory)
    output = None if options.output is None else Path(options.output)
    page = write_report(options.directory, output, measurements=measurements)
    print(report_tables(options.directory, measurements=measurements))
    print(f"wrote {page}, {page.parent / 'figures'} and {page.parent / 'tables'}")
