import json

import evaluated
import pytest

from megatron_longrope.evaluation.kinds import KINDS
from megatron_longrope.evaluation.records import Records, write_csv


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


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1]", "JSON object, got list; move"), ('{"length": 1}', "lacks 'protocol'; move .* again")],
)
def test_a_record_that_is_none_is_refused_before_anything_is_measured(tmp_path, line, message):
    path = tmp_path / "cells.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"cells.jsonl, line 2: .*{message}"):
        Records(path, ("name",), KINDS["ppl"].check)


@pytest.mark.parametrize(("kind", "row"), [
    ("ppl", {k: v for k, v in evaluated.ppl(4096, 3.0).items() if k != "original_length"}),
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


def test_numbers_that_json_has_no_word_for_are_texts(tmp_path):
    records = Records(tmp_path / "cells.jsonl", ("name",))
    records.append({"name": "a", "ppl": float("inf"), "nlls": [1.0, float("nan")]})
    row = {"name": "a", "ppl": "Infinity", "nlls": [1.0, "NaN"]}
    assert json.loads(records.path.read_text()) == row


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    records = Records(tmp_path / "cells.jsonl", ("name",))
    records.append({"name": "a"})
    assert records.find({"name": "a"}) and not records.path.exists()


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
    [(kind, field) for kind in ("ppl", "short", "tasks") for field in KINDS[kind].cell_fields],
)
def test_two_cells_never_have_one_line_of_a_csv(kind, field):
    row = evaluated.ppl(4096, 3.0) if kind == "ppl" else evaluated.short("arc", 0.5)
    one, other = KINDS[kind].summary([row | {field: 1}, row | {field: 2}])
    assert one != other
