"""A further kind of evaluation is one file: command, resuming, CSV, tables and page follow."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from copying import COPYING
from test_session import SHAPE, FakeEngine

from megatron_longrope.baselines import extended_config
from megatron_longrope.cli import main
from megatron_longrope.config import identity_config
from megatron_longrope.engine import loading
from megatron_longrope.evaluation import targets
from megatron_longrope.evaluation.kind import Section
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.table import Column, Table, Value
from megatron_longrope.files import hold


class Engine(FakeEngine):
    def copies(self, length, trial):
        return length < 128 or trial == 0


@pytest.fixture
def added(monkeypatch):
    """The kind is registered, and a model without weights is found under any path."""
    config = extended_config("pi", identity_config(10000.0, 8, 64), 128)
    checkpoint = SimpleNamespace(
        iteration=3, shape=SHAPE, longrope=config, directory=Path("absent")
    )
    monkeypatch.setitem(KINDS, "copying", COPYING)
    monkeypatch.setattr(
        targets, "open_models", lambda *given: [targets.NamedModel("m", "x", checkpoint)]
    )
    loaded = []
    monkeypatch.setattr(
        loading, "load_engine_for", lambda *given, **more: loaded.append(given) or Engine()
    )
    return loaded


def test_a_kind_is_one_file_and_one_line(added, tmp_path, capsys):
    command = ["eval", "copying", "--load", "x", "--lengths", "64,128", "--trials", "2"]
    command += ["--output", str(tmp_path)]
    assert main(command) == 0
    assert "m  100 %   50 %" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "copying.jsonl").read_text().splitlines()]
    assert [(row["length"], row["found"]) for row in rows] == [
        (64, True), (64, True), (128, True), (128, False),
    ]  # fmt: skip
    assert main(command) == 0 and len(added) == 1  # the second command finds everything measured
    assert len([*csv.DictReader((tmp_path / "copying.csv").open())]) == 4
    assert main(["report", str(tmp_path)]) == 0
    assert "At 128 tokens" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "copying.png",
        "copying.csv",
    }
    assert "m,128,0.5," in (tmp_path / "tables" / "copying.csv").read_text()


def test_its_flags_are_the_fields_of_its_options(added, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "copying", "--help"])
    assert "--distance D" in (shown := capsys.readouterr().out)
    assert "tokens between the two (default: 4)" in shown and "copying:" in shown


def test_two_commands_that_write_the_same_records_exclude_each_other(added, tmp_path, capsys):
    command = ["eval", "copying", "--load", "x", "--lengths", "64", "--output", str(tmp_path)]
    held = hold(tmp_path / ".copying.lock", "", "")
    assert main(command) == 2 and not added
    error = capsys.readouterr().err
    assert "copying.jsonl is being written by process" in error
    assert "wait for it or give another --output" in error
    held.release()
    assert main(command) == 0


def test_what_must_not_be_overlooked_stands_once_below_the_tables_of_its_section():
    columns = [Column("4k")]
    two = [Table(name, name, columns, {"a": [Value("1")]}) for name in ("first", "second")]
    assert Section("S", two, warnings=["mind this"]).text().count("mind this") == 1
