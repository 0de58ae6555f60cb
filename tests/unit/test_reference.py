"""docs/reference/ is written from the parser and the kinds of evaluation; it equals them."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest

from megatron_longrope.cli import build_parser
from megatron_longrope.evaluation.kind import TARGET_KEY
from megatron_longrope.evaluation.kinds import KINDS

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
COMMANDS = """\
# Commands

Every flag of every command, as `longrope COMMAND --help` prints it. A group of flags that
an earlier command has, too, is a line that names it. A test compares them.
"""
RECORDS = """\
# Records

`longrope eval KIND` appends a line of JSON to `OUTPUT/KIND.jsonl` for every measurement, and
goes on from there when it is run again. `OUTPUT/KIND.csv` is made from it. A
number that is not finite is the text "NaN", "Infinity" or "-Infinity"; older records have null
there. A field beyond those listed is information for the reader.
"""


def parsers(parser, name=("longrope",)):
    """(words, parser) of every command and of every group of commands."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from parsers(below, (*name, word))


def test_every_flag_has_a_help_that_names_its_default_once():
    for name, parser in parsers(build_parser()):
        for action in parser._actions:
            if action.option_strings:
                assert action.help, (name, action.option_strings)
                assert not re.search(r"default.*\(default: ", action.help), (name, action.help)


def commands():
    """The page of commands: a group of flags stands once among commands of one parent."""
    parts, first = [COMMANDS], {}
    for name, parser in parsers(build_parser()):
        command, sections = " ".join(name), []
        for section in re.split(r"\n\n(?=\S)", parser.format_help().rstrip()):
            owner = first.setdefault((name[:-1], section), command)
            heading = section.partition("\n")[0]
            sections.append(section if owner == command else f"{heading} as in `{owner}`")
        text = "\n\n".join(sections)
        parts.append(f"## {command}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def records():
    """The page of records."""
    parts = [RECORDS]
    for kind in KINDS.values():
        rows = [
            f"## {kind.name}\n",
            kind.description + "\n",
            "| field | what it holds |",
            "|---|---|",
        ]
        key = ", ".join(f"`{item}`" for item in sorted({*TARGET_KEY, *kind.key}))
        for field, (_, words) in kind.required.items():
            rows.append(f"| `{field}` | {words or 'any value'} |")
        rows += [
            "",
            f"A measurement is told from others by {key}.\n",
        ]
        parts.append("\n".join(rows))
    return "\n".join(parts)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 12), reason="Python 3.13 breaks usage lines elsewhere"
)
@pytest.mark.parametrize("write", [commands, records], ids=lambda write: write.__name__)
def test_the_reference_says_what_the_code_does(write, monkeypatch):
    """A flag is a promise: who changes one changes its page and the changelog."""
    monkeypatch.setenv("COLUMNS", "100")
    made, page = write(), REFERENCE / f"{write.__name__}.md"
    if os.environ.get("REWRITE_REFERENCE"):
        page.write_text(made, encoding="utf-8")
    assert made == page.read_text(encoding="utf-8"), (
        f"if this change is meant: REWRITE_REFERENCE=1 pytest {__file__} writes {page.name}"
    )
