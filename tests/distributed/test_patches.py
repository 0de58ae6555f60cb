"""The files of patches/ bind in Megatron's source what the hooks replace at run time."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from launching import HOST, pretrain_command, train
from tiny_training import EVALUATED, write_factors

pytest.importorskip("megatron.training")

from megatron_longrope.integration import compat, wrappers

PATCHES = Path(__file__).parents[2] / "patches"
# What a release cannot use: 0.17 has no function for it that could be replaced.
ABSENT = {"0.17": {"with_document_shards"}}
# Of a run without the launcher, after its end: every symbol was bound in the source, and the hooks
# leave it alone.
EVERY_WRAPPER = """\
if __name__ == "__main__":
    from megatron_longrope.integration import hooks, wrappers
    assert hooks.replaced_symbols() == []
    for symbol, _ in [*hooks.argument_wrappers(), *hooks.model_wrappers()]:
        holder, attribute = symbol.owner()
        assert wrappers.is_bound(vars(holder)[attribute]), f"{symbol} is not bound"
    hooks.apply()
    assert [name for name in hooks.replaced_symbols() if "compile_helpers" not in name] == []
"""


def patch_of(release: str) -> Path:
    return PATCHES / f"megatron-lm-{release}.patch"


def installed_patch() -> Path:
    release = ".".join(compat.megatron_version().split(".")[:2])
    if release not in compat.TESTED_RELEASES:
        pytest.skip(f"there is no patch for megatron-core {release}")
    return patch_of(release)


def installed_megatron() -> Path:
    return Path(importlib.util.find_spec("megatron.core").origin).resolve().parents[1]


def patched_files(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)


def git_apply(patch: Path, tree: Path, *options: str) -> None:
    """Run `git apply` in a tree that is no repository, even when it lies inside of one."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", *options, str(patch)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A patched copy of the installed Megatron."""
    directory = tmp_path_factory.mktemp("patched") / "tree"
    shutil.copytree(installed_megatron(), directory / "megatron")
    git_apply(installed_patch(), directory)
    return directory


# The files


def test_every_tested_release_has_a_patch():
    files = {path.name for path in PATCHES.glob("*.patch")}
    assert files == {patch_of(release).name for release in compat.TESTED_RELEASES}


@pytest.mark.parametrize("release", compat.TESTED_RELEASES)
def test_a_patch_only_adds_lines(release):
    lines = patch_of(release).read_text().splitlines()
    assert [line for line in lines if line.startswith("-") and not line.startswith("--- a/")] == []


@pytest.mark.parametrize("release", compat.TESTED_RELEASES)
def test_a_patch_uses_every_wrapper(release):
    every = {name for name in vars(wrappers) if name.startswith("with_")}
    text = patch_of(release).read_text()
    used = set(re.findall(r"^\+.*longrope\.(with_\w+)", text, re.MULTILINE))
    assert used == every - ABSENT.get(release, set())
    assert not re.search(r"^\+.*except", text, re.MULTILINE)  # no import of ours may fail silently


def test_the_patch_is_what_make_py_writes():
    make = runpy.run_path(str(PATCHES / "make.py"))
    assert installed_patch().read_text() == make["patch"](), "run: python patches/make.py"


def test_the_patch_goes_on_and_comes_off(tmp_path):
    patch, tree = installed_patch(), tmp_path / "tree"
    originals = {}
    for name in patched_files(patch):
        originals[name] = (installed_megatron().parent / name).read_bytes()
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(originals[name])
    git_apply(patch, tree, "--check")
    git_apply(patch, tree)
    assert all((tree / name).read_bytes() != text for name, text in originals.items())
    git_apply(patch, tree, "--reverse", "--check")
    git_apply(patch, tree, "--reverse")
    assert all((tree / name).read_bytes() == text for name, text in originals.items())


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH is not set")
def test_the_patch_fits_a_checkout():
    checkout = Path(os.environ["MEGATRON_LM_PATH"])
    package = runpy.run_path(str(checkout / "megatron" / "core" / "package_info.py"))
    git_apply(patch_of(f"{package['MAJOR']}.{package['MINOR']}"), checkout, "--check")


# A patched Megatron


@pytest.mark.slow
@pytest.mark.real_process  # with a Megatron of its own
@pytest.mark.parametrize(
    "has_factors",
    [pytest.param(False, marks=pytest.mark.release, id="stock"), pytest.param(True, id="factors")],
)
def test_a_patch_binds_what_the_hooks_replace_and_gives_identical_losses(
    tmp_path, monkeypatch, tree, has_factors
):
    flags = EVALUATED
    if has_factors:
        flags = [*flags, "--longrope-config", str(write_factors(tmp_path / "factors.json"))]
    hooked = train([pretrain_command(flags)], tmp_path / "hooked")
    host = tmp_path / "host.py"
    host.write_text(HOST + EVERY_WRAPPER)
    monkeypatch.setenv("PYTHONPATH", str(tree))
    command = [sys.executable, str(host), str(launching.SCRIPT), *flags]
    patched = train([command], tmp_path / "patched")
    line = "attention factor 1.08012 by softmax" if has_factors else "stock RoPE; attention sdpa"
    assert line in patched.log
    assert line in hooked.log
    assert len(patched.losses) == len(hooked.losses) == 3
    assert patched.losses == hooked.losses
    assert patched.gradient_norms == hooked.gradient_norms
    assert patched.evaluations == hooked.evaluations
