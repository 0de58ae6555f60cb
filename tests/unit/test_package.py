import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import megatron_longrope

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip would build, and install, from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "megatron_longrope", source / "megatron_longrope", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    # A process of its own: setuptools takes over the working directory, sys.argv and logging.
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    path = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(path))


def requirements(metadata, extra):
    stated = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return {
        item.name: item
        for item in stated
        if (item.marker is None) == (extra is None)
        and (extra is None or item.marker.evaluate({"extra": extra}))
    }


def test_a_wheel_holds_every_file_of_the_package(wheel):
    package = REPOSITORY / "megatron_longrope"
    there = {
        str(path.relative_to(REPOSITORY))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == there
    assert {
        "megatron_longrope/py.typed",
        "megatron_longrope/published/llama2-256k.json",
        "megatron_longrope/report/page.html.j2",
    } <= packed


def test_the_version_is_stated_in_one_place(metadata):
    assert metadata["Version"] == megatron_longrope.__version__
    headings = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    version = Version(megatron_longrope.__version__)
    if version.is_devrelease:  # what the next release will be called
        assert headings[0] == "Unreleased" and Version(headings[1]) < version
    else:
        assert headings[0] == str(version)


@pytest.mark.parametrize(
    ("name", "installed"),
    [
        ("torch", "2.11.0"),
        ("torch", "2.11.0a0+eb65b36914.nv26.02"),  # what NVIDIA's images call theirs
        ("torch", "2.15.0"),
        ("megatron-core", "0.17.1"),
        ("megatron-core", "0.20.0rc0"),
        ("transformers", "4.57.6"),
        ("transformers", "5.24.0"),
    ],
)
def test_installing_it_replaces_nothing_of_a_supported_environment(metadata, name, installed):
    requirement = requirements(metadata, extra=None)[name]
    assert requirement.specifier.contains(installed, prereleases=True)
    # An extra of theirs would bring bounds of theirs: 0.17's `training` has transformers<=5.3.0.
    assert not requirement.extras


def test_the_python_releases_are_those_of_megatron_core(metadata):
    assert metadata["Requires-Python"] == ">=3.12"


def test_every_extra_is_explained(metadata):
    page = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(metadata.get_all("Provides-Extra"))


def test_developers_have_what_recipes_and_training_need(metadata):
    dev = requirements(metadata, "dev")
    assert requirements(metadata, "recipes").keys() <= dev.keys()
    assert dev["megatron-core"].extras == {"training"}
