import re
import shlex
from pathlib import Path

import pytest
from shown_commands import shown_commands

from megatron_longrope.cli import build_parser

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]


def commands(page):
    shown = shown_commands(page.read_text(encoding="utf-8"))
    return [command for command in shown if command.startswith("longrope ")]


@pytest.mark.parametrize("command", [item for page in PAGES for item in commands(page)])
def test_every_command_shown_is_one_that_the_tool_understands(command):
    build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_the_readme_shows_the_main_commands():
    shown = {line.split()[1] for line in commands(REPOSITORY / "README.md")}
    assert {"data", "search", "eval", "convert"} <= shown


def anchors(page):
    """Names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_and_heading_exists(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if not link.startswith("https://"):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {link}"
            if heading and target.suffix == ".md":
                assert heading in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").rglob("*.md"):
        if page.name != "README.md":
            assert f"({page.relative_to(REPOSITORY / 'docs')}" in index, page.name


def test_the_names_for_a_script_of_ones_own_exist():
    import megatron_longrope

    for name in ("add_longrope_args", "enable"):
        assert name in (REPOSITORY / "docs" / "howto" / "own_script.md").read_text()
        assert hasattr(megatron_longrope, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_shown_calls_functions_with_options_that_exist(page, monkeypatch):
    import megatron_longrope

    called = []
    for name in ("search", "evaluate", "convert_to_hf"):
        monkeypatch.setitem(vars(megatron_longrope), name, called.append)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    blocks = [block for block in blocks if "import megatron_longrope" in block]
    for block in blocks:
        exec(block, {})
    assert len(called) >= len(blocks)
