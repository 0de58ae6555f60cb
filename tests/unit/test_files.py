"""Artifacts appear whole or not at all, and unreadable files give one sentence."""

import json
import os
import stat
import threading

import pytest

from megatron_longrope.files import read_json, write_json_atomic, write_text_atomic


def entries(folder) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def read_error(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


# Writing


def test_a_written_text_reads_back_and_leaves_no_other_file(tmp_path):
    write_text_atomic(tmp_path / "a.json", "λ = 1.5\n")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "λ = 1.5\n"
    assert entries(tmp_path) == ["a.json"]


def test_a_second_write_replaces_the_whole_first_one(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "a long first version")
    write_text_atomic(tmp_path / "a.txt", "short")
    assert (tmp_path / "a.txt").read_text() == "short"
    assert entries(tmp_path) == ["a.txt"]


def test_missing_parent_folders_are_created(tmp_path):
    write_text_atomic(str(tmp_path / "runs" / "one" / "a.txt"), "x")
    assert (tmp_path / "runs" / "one" / "a.txt").read_text() == "x"


def test_a_name_without_a_folder_is_written_to_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text_atomic("a.txt", "x")
    assert entries(tmp_path) == ["a.txt"]


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


def test_a_first_write_that_fails_leaves_an_empty_folder(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(tmp_path / "a.json", "new")
    assert entries(tmp_path) == []


def test_a_text_that_utf_8_cannot_hold_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a.json"]


def test_writing_over_a_folder_fails_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError):
        write_text_atomic(tmp_path / "a.json", "x")
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


def test_a_reader_never_sees_a_part_of_a_write(tmp_path):
    path = tmp_path / "a.txt"
    versions = ["a" * 200_000, "b" * 300_000]
    write_text_atomic(path, versions[0])
    stop = threading.Event()

    def write_on():
        while not stop.is_set():
            for text in versions:
                write_text_atomic(path, text)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        assert all(path.read_text() in versions for _ in range(50))
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"new": value})
    assert read_json(path) == {"old": 1}
    assert entries(tmp_path) == ["a.json"]


def test_written_json_is_indented_and_ends_in_a_newline(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": [1, 2.5]})
    text = (tmp_path / "a.json").read_text()
    assert text == json.dumps({"x": [1, 2.5]}, indent=2) + "\n"


# Reading


def test_a_missing_file_is_named(tmp_path):
    assert read_error(tmp_path / "none.json").endswith("no such file; check the path")


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
        (b'{"a": 1}\n{"a": 2}', "not valid JSON at line 2 column 1: Extra data"),  # not truncated
        (b"[" * 200_000 + b"]" * 200_000, "cannot be read as JSON"),
        (b'{"schema": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
    ],
    ids=["empty", "blank", "not UTF-8", "no JSON", "no comma", "two values", "nested", "digits"],
)
def test_a_file_that_is_no_json_is_refused_with_the_reason(tmp_path, content, refusal):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal in read_error(path)


def test_json_cut_anywhere_is_called_truncated(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps({"a key": [1, -2.5, 1e-7, True, None], "b\\": {"c": 'é "q"'}}, indent=1)
    for end in range(1, len(text)):
        path.write_text(text[:end])
        message = read_error(path)
        assert "the file is truncated, write or copy it again" in message, text[:end]
