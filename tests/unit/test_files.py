"""Artifacts appear whole or not at all, and unreadable files give one sentence."""

import os
import stat
from pathlib import Path

import pytest

from megatron_longrope.evaluation.ruler.sources import read_words
from megatron_longrope.files import read_json, write_json_atomic, write_text_atomic
from megatron_longrope.report.expected import FIELDS, read_expected


def entries(folder) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def read_error(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


# Writing


def test_a_text_replaces_the_whole_earlier_one_and_its_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "runs" / "one" / "a.json", "b.json"):
        write_text_atomic(path, "a long first version")
        write_text_atomic(path, "λ = 1.5\n")
        assert Path(path).read_text(encoding="utf-8") == "λ = 1.5\n"
    assert entries(tmp_path) == ["b.json", "runs"] and entries(tmp_path / "runs/one") == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path, monkeypatch, step, error
):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a.json"]


def test_a_written_file_has_the_permissions_that_open_would_give(tmp_path):
    previous = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "ours", "x")
        (tmp_path / "theirs").write_text("x")
        assert os.umask(0o027) == 0o027  # the write leaves the umask as it found it
    finally:
        os.umask(previous)
    ours, theirs = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs"))
    assert ours == theirs == 0o640


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"new": value})
    assert read_json(path) == {"old": 1}
    assert entries(tmp_path) == ["a.json"]


# Reading


def test_a_missing_file_is_named(tmp_path):
    assert read_error(tmp_path / "none.json").endswith("no such file; check the path")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_json, '{"a": 1}'),
        (read_words, "\n".join(f"word{index}" for index in range(40))),
        (read_expected, ",".join(FIELDS)),
    ],
    ids=["json", "words", "expected"],
)
def test_the_mark_that_editors_of_windows_put_in_front_is_no_text(tmp_path, read, text):
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding)
    assert read(tmp_path / "marked") == read(tmp_path / "plain")


def test_a_folder_is_refused(tmp_path):
    assert "cannot be read as UTF-8 text" in read_error(tmp_path)


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"", "the file is empty; expected a JSON object"),
        (b" \n\t\n", "the file is empty; expected a JSON object"),
        (b'{"name": "\xff\xfe"}', "cannot be read as UTF-8 text: 'utf-8' codec can't decode byte"),
        (b"schema: 1\nrope_type: a\n", "not valid JSON at line 1 column 1: Expecting value"),
        (b'{"a": 1\n "b": 2}', "not valid JSON at line 2 column 2: Expecting ',' delimiter"),
        (b'{"a": 1}\n{"a": 2}', "not valid JSON at line 2 column 1: Extra data"),
        (b'{"a": [1, 2', "not valid JSON at line 1 column 12: Expecting ',' delimiter"),
        (b"[" * 200_000 + b"]" * 200_000, "cannot be read as JSON"),
        (b'{"schema": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
    ],
    ids=["empty", "blank", "bytes", "text", "comma", "two", "cut", "nested", "digits"],
)
def test_a_file_that_is_no_json_is_refused_with_the_reason(tmp_path, content, refusal):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal in read_error(path)
