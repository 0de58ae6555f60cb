import os

import pytest
from recipes import tool

from megatron_longrope.recipe import fingerprint
from megatron_longrope.recipe.fingerprint import Contents, Parts
from megatron_longrope.recipe.state import Records


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were read for their hash."""
    files = []
    original = fingerprint.file_digest

    def counting(path):
        files.append(path.name)
        return original(path)

    monkeypatch.setattr(fingerprint, "file_digest", counting)
    return files


@pytest.fixture
def content(workshop):
    """The recorded content of an input of the only stage."""

    def content(path="data"):
        recipe = workshop.load({"a": tool("x", reads=[f"${{recipe}}/{path}"])})
        parts = Contents(Records(recipe.output).hashes).parts(recipe.stages[0])
        return parts.reads[f"${{recipe}}/{path}"]

    return content


def test_an_untouched_file_is_read_once(workshop, content, hashed):
    data = workshop.folder / "data"
    data.mkdir()
    for name in "abc":
        (data / name).write_text(name)
    first = content()
    assert sorted(hashed) == ["a", "b", "c"]
    assert content() == first and len(hashed) == 3
    (data / "b").write_text("other")
    assert content() != first and hashed[3:] == ["b"]


def test_a_file_that_was_only_touched_has_the_same_content(workshop, content, hashed):
    (workshop.folder / "data").write_text("x")
    first = content()
    os.utime(workshop.folder / "data", (1, 1))
    assert content() == first and len(hashed) == 2


def test_the_names_in_a_folder_count_and_so_does_the_content_behind_links(workshop, content):
    data, elsewhere = workshop.folder / "data", workshop.folder / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").write_text("x")
    (data / "link").symlink_to(elsewhere)
    (data / "circle").symlink_to(data)
    first = content()
    (elsewhere / "file").write_text("y")
    second = content()
    (elsewhere / "file").rename(elsewhere / "renamed")
    assert len({first, second, content(), "absent"}) == 4
    assert content("nowhere") == "absent"


def test_of_a_megatron_checkpoint_the_named_iteration_counts_alone(workshop, content):
    save = workshop.folder / "data" / "checkpoint"
    for iteration in (200, 400):
        (save / f"iter_{iteration:07d}").mkdir(parents=True)
        (save / f"iter_{iteration:07d}" / "weights").write_text(f"{iteration}")
    (save / "latest_checkpointed_iteration.txt").write_text("400\n")
    (save / "progress.txt").write_text("x")
    first = content()
    (save / "iter_0000200" / "weights").unlink()
    (save / "progress.txt").write_text("y")
    assert content() == first
    (save / "iter_0000400" / "weights").write_text("retrained")
    assert content() != first


def test_the_fingerprint_covers_commands_and_inputs_but_not_how_nor_where(workshop):
    def fingerprint_of(output=None, **changes):
        stage = {
            **tool("--lr ${lr}", how=["--workers 2"], reads=["${recipe}/tool.py"]),
            "environment": {"A": "1"},
            **changes,
        }
        workshop.output = workshop.folder / (output or "output")
        recipe = workshop.load({"a": stage}, values={"lr": "1e-5"}, launch={"b": "x ${command}"})
        return Contents(Records(recipe.output).hashes).parts(recipe.stages[0]).fingerprint

    first = fingerprint_of()
    assert fingerprint_of(how=["--workers 4"]) == first
    assert fingerprint_of(environment={"A": "2"}, launch="b", minutes="5", show="x") == first
    assert fingerprint_of("elsewhere") == first
    assert fingerprint_of(args=["--lr 2e-5"]) != first
    assert fingerprint_of(reads=[]) != first


def parts(*words, **reads):
    return Parts((tuple(words),), reads)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (parts("a", "--lr", "2e-5"), parts("a", "--lr", "1e-5"), ["--lr 2e-5 became --lr 1e-5"]),
        (parts("a", "--x"), parts("a", "--y", "1", "2"), ["--y 1 2 is new", "--x is gone"]),
        (parts("a", "b"), parts("a", "c"), ["a b became a c"]),
        (parts("a", "--x", "--y"), parts("a", "--y", "--x"), ["the order of its flags"]),
        (parts("a", data="1"), parts("a", data="2"), ["data has another content"]),
        (parts("a", data="1"), parts("a", more="2"),
         ["more is new among its inputs", "data is no longer an input"]),
        (parts("a"), Parts((("a",), ("b",)), {}), ["2 commands instead of 1"]),
        (parts("a", "--x", data="1"), parts("a", "--x", data="1"), []),
    ],
)  # fmt: skip
def test_a_change_is_named(old, new, said):
    assert new.changes_since(old) == said
    assert Parts.from_dict(old.to_dict()) == old
    assert (old.fingerprint == new.fingerprint) == (not said)
