"""`longrope doctor` says what it found and exits with 1 when the plugin would not work."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_longrope import checkup
from megatron_longrope.cli import main
from megatron_longrope.integration import compat, launcher

pytest.importorskip("megatron.training")

PARSER = "megatron.training.arguments.add_megatron_arguments"


def doctor(capsys, status: int) -> str:
    assert main(["doctor"]) == status
    return capsys.readouterr().out


def test_every_symbol_fits_this_megatron(capsys):
    printed = doctor(capsys, 0)
    assert "MISSING" not in printed and "SIGNATURE CHANGED" not in printed
    assert "megatron.core.models.gpt.gpt_model.RotaryEmbedding: found" in printed
    assert printed.endswith("\nthe plugin works here\n")


def test_it_says_which_megatron_and_which_kernels(capsys):
    import megatron.core

    lines = {line.partition("  ")[0]: line for line in doctor(capsys, 0).splitlines()}
    assert compat.megatron_version() in lines["megatron-core"]
    assert str(Path(megatron.core.__file__).parents[2]) in lines["megatron.core"]
    assert lines["dataset helpers"].endswith(" compiled")
    assert {"attention, local", "attention, transformer_engine", "rope kernel"} <= lines.keys()


def test_json_holds_the_same_as_one_object(capsys):
    printed = doctor(capsys, 0)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is True and found["problems"] == []
    for item in found["symbols"]:
        assert f"{item['symbol']}: {item['state']}" in printed
    assert sum(": found" in line for line in printed.splitlines()) == len(found["symbols"])
    for distribution, version in found["versions"].items():
        assert distribution in printed.lower() and (version or "not installed") in printed


def test_a_symbol_that_is_gone_is_named(monkeypatch, capsys):
    gone = compat.Symbol("megatron.core.models.backends", "LocalSpecProvider.gone")
    monkeypatch.setattr(compat, "LOCAL_ATTENTION", gone)
    printed = doctor(capsys, 1)
    assert f"{gone}: MISSING" in printed
    assert printed.endswith(f"\nthe plugin would not work here: {gone} is missing\n")


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (lambda other: None, "has no parameter 'parser' any more"),
        (lambda parser, groups: None, "requires 'groups', which the plugin does not know"),
    ],
)
def test_a_symbol_with_other_parameters_is_reported_with_what_changed(
    monkeypatch, capsys, function, change
):
    monkeypatch.setattr(PARSER, function)
    printed = doctor(capsys, 1)
    assert f"{PARSER}: SIGNATURE CHANGED ({change})" in printed
    assert f"the plugin would not work here: {PARSER} {change}\n" in printed
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False and found["problems"] == [f"{PARSER} {change}"]


def test_megatron_without_its_training_loop_is_a_problem(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    printed = doctor(capsys, 1)
    assert "the plugin would not work here: megatron.training cannot be imported" in printed


def test_a_package_that_breaks_megatrons_import_is_a_problem_and_no_traceback(monkeypatch, capsys):
    """As a Transformer Engine whose CUDA is not there: an OSError, which Megatron lets through."""

    import_module = importlib.import_module

    def broken(name, *args):
        if name.startswith("megatron."):
            raise OSError("libcudart.so.12: cannot open shared object file")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", broken)
    printed = doctor(capsys, 1)
    assert re.search(r"megatron-core +not installed", printed)
    reason = r"megatron\.core cannot be imported \(libcudart\.so\.12: cannot open"
    assert re.search(rf"the plugin would not work here: {reason}.*`python -c 'import", printed)


def test_helpers_that_nothing_can_compile_are_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(compat, "helpers_are_compiled", lambda: False)
    monkeypatch.setattr(compat, "helpers_obstacle", lambda: None)
    assert "compiled by Megatron when a run starts" in doctor(capsys, 0)
    monkeypatch.undo()
    monkeypatch.setattr(compat, "helpers_are_compiled", lambda: False)
    printed = doctor(capsys, 1)
    assert "helpers_cpp is not compiled for this Python, and there is no Makefile" in printed


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A Megatron-LM checkout whose helpers are not compiled, and a PATH with the tools for it."""
    makefile = tmp_path / "megatron/core/datasets/Makefile"
    makefile.parent.mkdir(parents=True)
    makefile.touch()
    monkeypatch.setattr(compat, "megatron_location", lambda *_: tmp_path)
    monkeypatch.setattr(compat, "helpers_are_compiled", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("make", "c++", "python3-config", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_what_a_checkout_lacks_for_its_dataset_helpers_is_named_before_a_run_starts(
    monkeypatch, checkout
):
    assert compat.helpers_obstacle() is None
    (checkout / "python3").write_text("#!/bin/sh\nexit 1\n")
    assert compat.helpers_obstacle().startswith("the python3 on the PATH has no pybind11, whose he")
    monkeypatch.setattr(launcher, "_default_rendezvous", lambda: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = checkout / "pretrain_gpt.py"
    script.touch()
    with pytest.raises(ValueError, match=r"dataset helpers are not compiled .* install pybind11"):
        launcher.launch(str(script), [])
    (checkout / "make").unlink()
    assert "make, which Megatron's Makefile calls, is not on the PATH" in compat.helpers_obstacle()


def test_an_untested_release_whose_symbols_fit_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr(compat, "megatron_version", lambda: "0.20.0")
    assert "megatron-core 0.20.0 is untested" in doctor(capsys, 0)


def test_two_megatrons_in_one_process_are_a_note(monkeypatch, capsys):
    monkeypatch.setattr(compat, "megatron_location", Path)
    assert "come from different folders" in doctor(capsys, 0)


@pytest.mark.parametrize(("version", "reason"), [(None, "installed"), ("2.9", "imported")])
def test_transformer_engine_that_megatron_cannot_use_is_said_so(
    monkeypatch, capsys, version, reason
):
    monkeypatch.setattr(compat, "transformer_engine_version", lambda: version)
    monkeypatch.setattr(compat, "transformer_engine_is_usable", lambda: False)
    printed = doctor(capsys, 0)
    assert f"not available: Transformer Engine {'is not' if version is None else 'cannot be'} " in (
        printed
    )
    assert reason in printed


def test_kernels_of_transformer_engine_are_named_where_it_is_usable(monkeypatch):
    monkeypatch.setattr(compat, "transformer_engine_is_usable", lambda: True)
    monkeypatch.setattr(compat, "fused_rope_is_available", lambda: True)
    found = checkup.examine()
    assert found.attention["transformer_engine"] == "te"
    assert found.rope.startswith("fused (Transformer Engine)")


def test_no_megatron_at_all_is_a_problem(monkeypatch, capsys):
    for package in ("megatron.core", "megatron.training"):
        monkeypatch.setitem(sys.modules, package, None)
    printed = doctor(capsys, 1)
    assert "megatron-core" in printed and "the plugin would not work here: megatron.core" in printed
