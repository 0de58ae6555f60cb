import re
import shlex
from pathlib import Path

import pytest

from megatron_longrope.cli import build_parser

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(page):
    """Indented `longrope ...` lines, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^    (longrope .+)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", [item for page in PAGES for item in commands(page)])
def test_every_command_shown_is_one_that_the_tool_understands(command):
    build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_the_readme_shows_the_main_commands():
    shown = {line.split()[1] for line in commands(REPOSITORY / "README.md")}
    assert {"data", "search", "eval", "convert"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_public_names_in_the_readme_exist():
    import megatron_longrope

    for name in ("add_longrope_args", "enable"):
        assert name in (REPOSITORY / "README.md").read_text()
        assert hasattr(megatron_longrope, name)
