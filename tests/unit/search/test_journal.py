"""A journal survives crashes, refuses mix-ups, and never loses a finished evaluation."""

import errno
import fcntl
import json
import math
import os
import signal

import pytest

from megatron_longrope.factor_search import journal as journal_module
from megatron_longrope.factor_search.journal import Evaluation, Journal

SETTINGS = {"seed": 1, "space": {"scale": 8, "start_tokens": (0, 4)}}


def record(score: float = 1.5, **fields) -> Evaluation:
    return Evaluation((1.0, 1.29, 8.0), 4, score, (score, score), 0.25, **fields)


@pytest.fixture
def path(tmp_path):
    """A journal with three records."""
    with Journal(tmp_path / "journal.jsonl", SETTINGS) as journal:
        for score in (3.0, 2.0, 1.0):
            journal.append(record(score))
    return tmp_path / "journal.jsonl"


def scores_after_resume(path, settings=SETTINGS) -> list[float]:
    with Journal(path, settings, resume=True) as journal:
        return [item.score for item in journal.records]


def refusal(path, settings=SETTINGS, **kwargs) -> str:
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        Journal(path, settings, **kwargs)
    assert path.read_bytes() == before
    return str(caught.value)


# Round trip


def test_records_come_back_equal_and_in_order(path):
    with Journal(path, SETTINGS, resume=True) as journal:
        assert journal.records == [record(3.0), record(2.0), record(1.0)]
        journal.append(record(0.5))
    assert scores_after_resume(path) == [3.0, 2.0, 1.0, 0.5]


def test_the_file_is_one_header_and_one_json_line_per_evaluation(path):
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["journal"] == 3
    assert header["settings"] == {"seed": 1, "space": {"scale": 8, "start_tokens": [0, 4]}}
    assert lines[0] == {
        "rescale_factors": [1.0, 1.29, 8.0],
        "num_start_tokens": 4,
        "score": 3.0,
        "sample_nlls": [3.0, 3.0],
        "seconds": 0.25,
        "error": None,
        "index": 0,
        "stopped": None,
    }


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_null_with_an_error(tmp_path, score):
    path = tmp_path / "journal.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.append(record(score))
        journal.append(record(score, error="out of memory"))
    line = json.loads(path.read_text().splitlines()[1])
    assert line["score"] is None and line["sample_nlls"] == [None, None]
    assert line["error"] == f"the score is {score}"
    with Journal(path, SETTINGS, resume=True) as journal:
        assert [item.score for item in journal.records] == [math.inf, math.inf]
        assert journal.records[1].error == "out of memory"


def test_a_line_is_on_disk_before_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal_module.os, "fsync", synced.append)
    with Journal(tmp_path / "journal.jsonl", SETTINGS) as journal:
        assert len(synced) == 1
        journal.append(record())
        assert len(synced) == 2
        assert len(journal.path.read_bytes().splitlines()) == 2


# Opening


def test_resuming_without_a_file_starts_one(tmp_path):
    assert scores_after_resume(tmp_path / "new" / "journal.jsonl") == []


def test_an_existing_journal_is_not_touched_without_resume_or_overwrite(path):
    message = refusal(path)
    assert "--resume" in message and "--overwrite" in message


def test_overwrite_starts_fresh(path):
    with Journal(path, {"seed": 2}, overwrite=True) as journal:
        assert journal.records == []
    assert scores_after_resume(path, {"seed": 2}) == []


def test_changed_settings_are_refused_with_their_differences(path):
    new = {"seed": 2, "space": {"scale": 8, "start_tokens": (0,)}, "data": "sha256:1"}
    message = refusal(path, new, resume=True)
    assert "seed: 1 -> 2" in message
    assert "space.start_tokens: [0, 4] -> [0]" in message
    assert "data: '(absent)' -> 'sha256:1'" in message
    assert "scale" not in message


def test_changed_vectors_of_factors_are_named_and_not_printed(tmp_path):
    factors = {"yarn": [1.25] * 65}
    tokens = [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256]
    Journal(tmp_path / "x", {"references": factors, "start_tokens": [0]}).close()
    changed = {"references": {"yarn": [2.5] * 65, "warm": [1.5] * 65}, "start_tokens": tokens}
    assert (
        "other settings: references.warm: other values; references.yarn: other values; "
        f"start_tokens: [0] -> {tokens}; resume"
    ) in refusal(tmp_path / "x", changed, resume=True)


def test_the_order_of_settings_does_not_matter(path):
    assert len(scores_after_resume(path, dict(reversed(SETTINGS.items())))) == 3


# Damage


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(path):
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(content)):
        path.write_bytes(content[:cut])
        assert scores_after_resume(path) == [3.0, 2.0], cut
        assert path.read_bytes() == content[:last]


def test_a_last_line_of_zero_bytes_is_dropped(path):
    with open(path, "ab") as file:
        file.write(bytes(100))
    assert scores_after_resume(path) == [3.0, 2.0, 1.0]


def test_appending_after_a_torn_line_gives_a_clean_file(path):
    path.write_bytes(path.read_bytes()[:-20])
    with Journal(path, SETTINGS, resume=True) as journal:
        journal.append(record(0.5))
    assert scores_after_resume(path) == [3.0, 2.0, 0.5]


@pytest.mark.parametrize("length", [1, 5, 12, 40])
def test_a_torn_header_starts_the_journal_again(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert scores_after_resume(path) == []


@pytest.mark.parametrize(
    "damage", [b"{\n", b"\n", b"\xff\xfe\n", b"[1]\n", b'{"score": 1.0}\n', b"1\n"]
)
def test_a_corrupt_middle_line_is_an_error_that_names_it(path, damage):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = damage
    path.write_bytes(b"".join(lines))
    assert "line 3 is corrupt" in refusal(path, resume=True)


@pytest.mark.parametrize("field", ["rescale_factors", "score", "sample_nlls", "seconds"])
def test_a_field_of_the_wrong_type_is_an_error_even_in_the_last_line(path, field):
    with open(path, "a") as file:
        file.write(json.dumps({**record().to_dict(), field: "many"}) + "\n")
    assert "line 5 is corrupt: a field has the wrong type" in refusal(path, resume=True)


def test_another_version_is_refused(path):
    path.write_bytes(path.read_bytes().replace(b'"journal": 3', b'"journal": 2', 1))
    assert "version 2, and this release goes on with version 3" in refusal(path, resume=True)


@pytest.mark.parametrize("content", [b"my notes", b"[]\n", b'{"a": 1}\n', b'{"a'])
def test_a_file_that_is_no_journal_is_never_touched(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert "is not a search journal" in refusal(path, resume=True)


def test_a_failed_write_leaves_nothing_behind(path, monkeypatch):
    write = os.write

    def full_disk(fd, data):
        if len(data) > 10:
            return write(fd, data[:10])
        raise OSError(28, "No space left on device")

    with Journal(path, SETTINGS, resume=True) as journal:
        with monkeypatch.context() as patch:
            # The first call writes 10 bytes, a later one fails.
            patch.setattr(journal_module.os, "write", full_disk)
            with pytest.raises(OSError, match="No space"):
                journal.append(record(0.5))
        assert len(journal.records) == 3
        journal.append(record(0.25))
    assert scores_after_resume(path) == [3.0, 2.0, 1.0, 0.25]


# Locking


@pytest.mark.parametrize("mode", [{"resume": True}, {"overwrite": True}])
def test_a_second_writer_is_refused_while_the_first_is_open(path, mode):
    with Journal(path, SETTINGS, resume=True) as journal:
        message = refusal(path, **mode)
        assert f"is being written by process {os.getpid()} on " in message
        journal.append(record(0.5))
    assert scores_after_resume(path) == [3.0, 2.0, 1.0, 0.5]


def test_a_refused_journal_gives_its_lock_back(path):
    refusal(path, {"seed": 9}, resume=True)
    assert len(scores_after_resume(path)) == 3


def test_a_forked_child_does_not_keep_the_lock(path):
    journal = Journal(path, SETTINGS, resume=True)
    if (child := os.fork()) == 0:
        signal.pause()
    try:
        journal.close()
        journal.close()  # harmless
        assert len(scores_after_resume(path)) == 3
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(path, monkeypatch, number):
    def no_locks(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked"):
        journal = Journal(path, SETTINGS, resume=True)
    # A process that is killed here releases nothing, and another host cannot see that it is gone.
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert len(scores_after_resume(path)) == 3
    journal.close()
