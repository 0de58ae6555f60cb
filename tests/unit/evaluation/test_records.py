import json
from pathlib import Path

import evaluated
import pytest

from megatron_longrope.evaluation.kind import TARGET_KEY
from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.records import Records, write_csv
from megatron_longrope.evaluation.series import identify, name_series


def test_a_finished_cell_is_found_again_by_its_key(tmp_path):
    path = tmp_path / "cells.jsonl"
    Records(path, ("name", "length")).append({"name": "a", "length": 1, "value": 2.5})
    again = Records(path, ("name", "length"))
    assert again.find({"name": "a", "length": 1, "other": 0})["value"] == 2.5
    assert again.find({"name": "a", "length": 2}) is None


def test_a_torn_last_line_is_dropped_and_the_next_record_stands_alone(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "a"}\n{"na')
    records = Records(path, ("name",))
    records.append({"name": "b"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_whole_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "a"}\n{"name": "b"}')
    records = Records(path, ("name",))
    assert records.find({"name": "b"})
    records.append({"name": "c"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_line_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"cells.jsonl, line 2: not a record but list; move"):
        Records(path, ("name",))


@pytest.mark.parametrize(("kind", "row"), [
    ("ppl", {k: v for k, v in evaluated.ppl(4096, 3.0).items() if k != "original_length"}),
    ("ruler", evaluated.ruler("vt", 4096, 1.0) | {"threshold": None}),
    ("ruler", evaluated.ruler("vt", 4096, 1.0) | {"num_tokens": None}),
])  # fmt: skip
def test_what_a_record_may_lack_does_not_keep_the_tables_from_being_shown(kind, row):
    assert KINDS[kind].sections_of([row])


def test_a_corrupt_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "a"}\nnonsense\n{"name": "b"}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Records(path, ("name",))


def test_the_csv_has_the_chosen_columns_in_order(tmp_path):
    write_csv(tmp_path / "x.csv", [{"b": 1, "a": 2, "c": 3}], ["a", "b"])
    assert (tmp_path / "x.csv").read_text() == "a,b\n2,1\n"


def test_of_two_records_of_one_cell_the_last_counts(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "a", "value": 1}\n{"name": "a", "value": 2}\n')
    records = Records(path, ("name",))
    assert records.rows == [{"name": "a", "value": 2}]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    records = Records(tmp_path / "cells.jsonl", ("name",))
    records.append({"name": "a", "ppl": float("inf"), "nlls": [1.0, float("nan")]})
    assert json.loads(records.path.read_text()) == {"name": "a", "ppl": None, "nlls": [1.0, None]}
    assert records.find({"name": "a"})["ppl"] is None


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    records = Records(tmp_path / "cells.jsonl", ("name",))
    records.append({"name": "a"})
    assert records.find({"name": "a"}) and not records.path.exists()


def test_a_checkpoint_is_known_by_its_content_from_any_folder_and_an_old_record_by_its_path(
    tmp_path,
):
    key = ("checkpoint", "length")
    records = Records(tmp_path / "a.jsonl", key)
    records.append({"checkpoint": "runs/a", "checkpoint_sha256": "a1", "length": 64, "ppl": 3.0})
    records.append({"checkpoint": "runs/b", "length": 64, "ppl": 5.0})  # of an older version
    moved = {"checkpoint": "/copies/a", "checkpoint_sha256": "a1", "length": 64}
    assert records.find(moved)["ppl"] == 3.0
    assert records.find({**moved, "checkpoint": "runs/a", "checkpoint_sha256": "a2"}) is None
    old = {"checkpoint": "runs/b", "checkpoint_sha256": "b1", "length": 64}
    assert records.find(old)["ppl"] == 5.0
    assert records.find({**old, "checkpoint": "/copies/b"}) is None


def test_a_record_of_an_older_version_is_one_of_the_default_dtype_and_of_full_attention(tmp_path):
    records = Records(tmp_path / "a.jsonl", (*TARGET_KEY, "length"))
    records.append({"checkpoint": "a", "checkpoint_sha256": "a1", "length": 64, "ppl": 3.0})
    cell = {"checkpoint": "a", "checkpoint_sha256": "a1", "length": 64}
    assert records.find({**cell, "sliding_window": None, "requested_dtype": None})["ppl"] == 3.0
    assert records.find({**cell, "sliding_window": 4096}) is None
    assert records.find({**cell, "requested_dtype": "bfloat16"}) is None


@pytest.mark.parametrize("field", ["iteration", "sliding_window", "requested_dtype"])
@pytest.mark.parametrize("kind", ["passkey", "needle", "ruler"])
def test_a_line_of_a_csv_never_pools_two_models(kind, field):
    right, wrong = {
        "passkey": (evaluated.passkey(4096, True), evaluated.passkey(4096, False)),
        "needle": (evaluated.needle(4096, 1.0), evaluated.needle(4096, 0.0)),
        "ruler": (evaluated.ruler("vt", 4096, 1.0), evaluated.ruler("vt", 4096, 0.0)),
    }[kind]
    summary = KINDS[kind].summary
    lines = summary([right, wrong | {field: 500}])
    found = [line.get("accuracy", line.get("recall", line.get("score"))) for line in lines]
    assert found == [1.0, 0.0]
    assert len(summary([right, wrong])) == 1


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field)
        for kind in ("ppl", "short", "tasks")
        for field in ("checkpoint_sha256", *KINDS[kind].cell_fields[1:])
    ],
)
def test_two_cells_never_have_one_line_of_a_csv(kind, field):
    row = evaluated.ppl(4096, 3.0) if kind == "ppl" else evaluated.short("arc", 0.5)
    one, other = KINDS[kind].summary([row | {field: 1}, row | {field: 2}])
    assert one != other


@pytest.mark.parametrize("left_out", ["scoring", "nll"])
def test_what_an_older_version_left_out_does_not_keep_the_csv_from_being_written(left_out):
    row = evaluated.passkey(4096, True)
    del row[left_out]
    (line,) = KINDS["passkey"].summary([row])
    assert line["trials"] == 1 and line["accuracy"] == 1.0


def test_records_with_and_without_a_hash_of_one_checkpoint_are_one_series():
    old = {"model": "m", "checkpoint": "runs/a", "iteration": 3, "length": 64}
    new = {**old, "checkpoint_sha256": "a1", "length": 128}
    moved = {**new, "checkpoint": "/copies/a", "length": 256}
    other = {**new, "checkpoint_sha256": "a2", "checkpoint": "runs/c"}
    rows = [old, new, moved, other]
    found = name_series([(identify(row), Path(), row["length"], row) for row in rows])
    assert found[0].name == found[1].name == found[2].name != found[3].name
