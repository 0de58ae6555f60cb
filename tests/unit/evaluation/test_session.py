"""What is measured, in which order, and when the user is asked."""

import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_longrope.baselines import extended_config
from megatron_longrope.config import identity_config
from megatron_longrope.evaluation import passes as passes_module
from megatron_longrope.evaluation import records as records_module
from megatron_longrope.evaluation import session as session_module
from megatron_longrope.evaluation import targets
from megatron_longrope.evaluation.kind import TARGET_KEY
from megatron_longrope.evaluation.records import Records
from megatron_longrope.evaluation.session import Cell, Plan, Session
from megatron_longrope.evaluation.targets import NamedModel, Target

SHAPE = SimpleNamespace(
    sliding_window=None, params_dtype=torch.float32,
    num_attention_heads=4, head_dim=8, num_query_groups=2, hidden_size=32, ffn_hidden_size=64,
    num_layers=2, vocab_size=100, hybrid_layer_pattern=None, num_experts=None,
)  # fmt: skip
PLAIN = identity_config(10000.0, 8, 64)


class FakeEngine:
    """Takes no time, remembers its factors."""

    replica = (0, 1)
    cp_group = SimpleNamespace(size=lambda: 1)
    shape = SHAPE

    def __init__(self):
        self.configs = []

    def set_config(self, config):
        self.configs.append(config)

    def nll(self, tokens):
        return torch.zeros(1, tokens.shape[1] - 1)


def model(label, dtype=None):
    checkpoint = SimpleNamespace(iteration=3, shape=SHAPE)
    named = NamedModel(label, f"/runs/{label}", checkpoint, dtype=dtype)
    vars(named)["content_sha256"] = f"content of {label}"  # there are no files to hash
    return named


def cells(*labels, lengths=(64, 128), forwards=1, dtype=None):
    config = extended_config("pi", PLAIN, 128)
    return [
        Cell(Target(model, "pi", config), {"length": length}, {length: forwards})
        for model in [model(label, dtype) for label in labels]
        for length in lengths
    ]


@pytest.fixture
def make(tmp_path):
    """A session and the labels of the models that it loaded."""

    def session(**limit):
        loaded, engines = [], []

        def load(model):
            assert not any(engine() for engine in engines), "two models in memory"
            loaded.append(model.label)
            engine = FakeEngine()
            engines.append(weakref.ref(engine))
            return engine

        records = Records(tmp_path / "cells.jsonl", (*TARGET_KEY, "length"))
        return Session(records, load, "fake", "passes", max_hours=1.0, **limit), loaded

    return session


def each(cells):
    """All copies of the model work on the same cell."""

    def measure(engine, cell, on_forward, passes):
        on_forward()
        return {"value": cell.fields["length"] * 2}

    return Plan(cells, measure, shared=False)


def shared(cells, measure):
    """Copies of the model take different cells."""
    return Plan(cells, measure, shared=True)


def test_every_cell_is_recorded_with_its_subject_under_the_subjects_factors(make, monkeypatch):
    hashed, of_factors = [], targets.config_sha256
    monkeypatch.setattr(targets, "config_sha256", lambda of: hashed.append(of) or of_factors(of))
    session, loaded = make()
    session.run(each(cells("a", "b")))
    assert len(hashed) == 4  # each target's once, however many of its records are looked up
    assert loaded == ["a", "b"]
    assert [(row["model"], row["length"], row["value"]) for row in session.records.rows] == [
        ("a", 64, 128), ("a", 128, 256), ("b", 64, 128), ("b", 128, 256),
    ]  # fmt: skip
    assert {row["iteration"] for row in session.records.rows} == {3}
    assert all(len(row["config_sha256"]) == 64 for row in session.records.rows)


def test_a_model_with_nothing_left_to_measure_is_not_loaded(make, capsys):
    session, _ = make()
    session.run(each(cells("a")))
    again, loaded = make()
    again.run(each(cells("a", "b")))
    assert loaded == ["b"]
    nothing, loaded = make()
    nothing.run(shared(cells("a", "b"), pytest.fail))
    assert loaded == [] and "already measured" in capsys.readouterr().out


def test_the_first_rank_says_what_is_left_to_measure(make, monkeypatch):
    where = "megatron_longrope.engine.process_groups.from_first_rank"
    monkeypatch.setattr(where, lambda found: [True] * len(found))
    session, loaded = make()
    session.run(each(cells("a")))
    assert loaded == []


def test_a_model_is_gone_before_the_next_one_is_loaded(make):
    for plan in (each(cells("a", "b", "c")), shared(cells("d", "e"), lambda *_: {"value": 1})):
        session, loaded = make()
        session.run(plan)
        assert len(loaded) == len(plan.cells) / 2


def test_a_model_that_is_called_otherwise_now_is_called_so_in_all_its_records(make):
    session, _ = make()
    session.run(each(cells("a", "c")))
    for cell in (renamed := cells("b", lengths=(64, 256))):
        vars(cell.target.model)["content_sha256"] = "content of a"
    again, loaded = make()
    again.run(each(renamed[:1]))
    assert loaded == []
    assert [row["model"] for row in again.records.rows] == ["b", "b", "c", "c"]
    before = again.records.path.read_bytes()
    make()[0].run(each(renamed[:1]))
    assert again.records.path.read_bytes() == before


def test_records_are_renamed_at_once_and_whatever_the_weights_were_loaded_as(make, monkeypatch):
    make()[0].run(each(cells("a")))
    for cell in (renamed := cells("b", dtype="bfloat16")):
        vars(cell.target.model)["content_sha256"] = "content of a"
    syncs = []
    monkeypatch.setattr(records_module.os, "fsync", syncs.append)
    session, loaded = make()
    session.run(each(renamed))
    assert loaded == ["b"]
    assert [row["model"] for row in make()[0].records.rows] == ["b"] * 4
    assert len(syncs) == 1 + len(renamed)


def test_nothing_is_measured_twice(make):
    session, loaded = make()
    same = cells("a", "b")
    for cell in same:
        vars(cell.target.model)["content_sha256"] = "one"
    with pytest.raises(ValueError, match=r"a and b are the same model .*; give one of them"):
        session.run(each(same))
    with pytest.raises(ValueError, match="a pi at 64 tokens was asked for twice; ask for it once"):
        session.run(each(cells("a")[:1] * 2))
    assert loaded == []


def test_ranks_that_would_not_measure_the_same_are_refused(make, monkeypatch):
    where = "megatron_longrope.engine.process_groups.from_every_rank"
    monkeypatch.setattr(where, lambda mine: [mine, [*mine[:1], "other"]])
    session, loaded = make()
    with pytest.raises(ValueError, match="a pi at 128 tokens: rank 1 would measure something"):
        session.run(each(cells("a")))
    assert loaded == []


def test_a_crash_loses_only_the_cell_in_flight(make):
    session, _ = make()
    seen = []

    def dies_at_the_third(engine, cell):
        seen.append(cell)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"value": 1}

    with pytest.raises(KeyboardInterrupt):
        session.run(shared(cells("a", "b"), dies_at_the_third))
    again, _ = make()
    assert len(again.records.rows) == 2
    measured = []
    again.run(shared(cells("a", "b"), lambda engine, cell: measured.append(cell) or {"value": 2}))
    assert len(measured) == 2 and len(again.records.rows) == 4


def test_other_factors_under_the_same_label_are_measured_anew(make):
    session, _ = make()
    session.run(each(cells("a")))
    others = [
        Cell(
            Target(cell.target.model, "pi", extended_config("ntk", PLAIN, 128)),
            cell.fields,
            cell.forwards,
        )
        for cell in cells("a")
    ]
    again, loaded = make()
    again.run(each(others))
    assert loaded == ["a"] and len(again.records.rows) == 4


def test_the_bill_counts_only_what_is_left(make, capsys):
    session, _ = make()
    session.run(each(cells("a", lengths=(64,))))
    capsys.readouterr()
    again, _ = make()
    again.run(each(cells("a", forwards=3)))
    assert "3 forward passes of up to 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("kept", "bill"), [((0, 1, 3, 4), "1 forward pass of"), (range(5), "")])
def test_the_bill_leaves_out_what_a_run_kept_that_was_killed(make, capsys, monkeypatch, kept, bill):
    monkeypatch.setattr(session_module, "_timed", lambda *_: 1500.0)  # seconds; an hour is allowed
    (cell,) = cells("a", lengths=(128,))
    cell = replace(cell, forwards={64: 2, 128: 3}, passes=(128, 64, 128, 64, 128))

    def measure(engine, cell, on_forward, passes, killed=False):
        for number in kept:
            passes.add(number, number)
        if killed:
            raise KeyboardInterrupt
        return {"value": len(passes.results)}

    monkeypatch.setattr(passes_module, "_INTERVAL", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(confirmed=True)[0].run(Plan([cell], partial(measure, killed=True), shared=False))
    assert "5 forward passes of up to 128 tokens" in capsys.readouterr().out
    session, _ = make()
    session.run(Plan([cell], measure, shared=False))
    shown = capsys.readouterr().out
    assert bill in shown and bool(bill) == ("forward" in shown)
    assert session.records.rows[0]["value"] == len(kept)


def test_trial_passes_are_no_longer_than_what_comes(make, capsys):
    session, _ = make()
    session.run(each(cells("a", lengths=(64, 2), forwards=3)))
    assert "trial passes of up to 64 tokens" in capsys.readouterr().out


def test_more_than_the_limit_is_refused_without_a_yes(make, monkeypatch):
    monkeypatch.setattr(session_module, "_timed", lambda *_: 1e6)  # seconds
    session, _ = make()
    with pytest.raises(ValueError, match=r"above --max-hours 1; give --yes"):
        session.run(each(cells("a")))
    assert not session.records.rows
    confirmed, _ = make(confirmed=True)
    confirmed.run(each(cells("a")))
    assert len(confirmed.records.rows) == 2


def test_running_out_of_memory_names_the_cell_and_the_remedy(make):
    def too_much(engine, cell):
        raise torch.OutOfMemoryError("CUDA out of memory")

    session, _ = make()
    with pytest.raises(RuntimeError, match=r"for a pi at 64 tokens: start more .*--context"):
        session.run(shared(cells("a"), too_much))
    session, _ = make()
    task = Cell(cells("a")[0].target, {"task": "mmlu"}, {64: 1})
    with pytest.raises(RuntimeError, match=r"for a pi mmlu: lower --batch-size, start .*--context"):
        session.run(shared([task], too_much))
