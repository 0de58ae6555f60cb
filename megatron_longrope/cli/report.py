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
    """holds, at any depth, what `longrope eval` wrote (ppl.jsonl, passkey.jsonl, ...) or a search
    that may still run (*.journal.jsonl); also LongRoPE JSON files and, at its top, facts.json"""
    output: str | None = flag(None, metavar="FILE")
    """the page to write (default: DIR/report.html, and with several DIR ./report.html)"""
    expect: str | None = flag(None, metavar="F.csv")
    """published values to set beside ours, with the difference: lines of
    table,row,column,value,source that name a cell of tables/"""


def add_parser(commands: Any, about: str | None = None) -> None:
    """Add `report`."""
    add_command(
        commands,
        "report",
        ReportOptions,
        run,
        help=about,
        description="Write a self-contained HTML page about one evaluated run or a search, or one "
        "that compares several models, and beside it figures/ with PNG images and the CSV data "
        "behind them.",
    )


def run(options: ReportOptions) -> None:
    """Run the command."""
    from megatron_longrope.report.page import write_report

    page, tables = write_report(options.directory, options.output, options.expect)
    if tables:
        print(tables)
    beside = [page.parent / name for name in ("figures", "tables")]
    *written, last = [str(path) for path in (page, *beside) if path.exists()]
    print(f"wrote {', '.join(written)} and {last}" if written else f"wrote {last}")
