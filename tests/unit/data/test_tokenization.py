"""Parts: the same bytes on any number of workers, and after any interruption."""

import json
import os
import signal
import subprocess
import sys

import pytest
from fake_slurm import wait_until
from tiny_corpus import make_text

from megatron_longrope.data import parts, tokenization
from megatron_longrope.data.documents import check_set
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, ShortDocuments, WholeDocuments
from megatron_longrope.data.stream import Split

SPLIT = Split(held_out=0.1, short=ShortDocuments(64, 8), seed=5)
RECIPE = FixedSegments(256, "pack", joined=2)


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents, one broken line, in parts of a few documents each."""
    path = tmp_path / "corpus.jsonl"
    texts = [make_text(k, 10 + 60 * (k % 7)).replace("\n", ". ", 3) for k in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[33] = "broken"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(tokenization, "_CHARACTERS", 6000)


def run(corpus, model_path, prefix, **options):
    options = {"split": SPLIT, "on_error": "skip"} | options
    prepare([corpus], prefix, model_path, RECIPE, **options)
    return sets(prefix)


def sets(prefix):
    """The bytes of the set and of those beside it."""
    found = sorted(prefix.parent.glob(f"{prefix.name}*"))
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in found}


def parts_of(prefix):
    return sorted((prefix.parent / f".{prefix.name}.parts").glob("*.npz"))


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(corpus, model_path, tmp_path):
    alone = run(corpus, model_path, tmp_path / "one")
    assert len(alone) == 9
    assert run(corpus, model_path, tmp_path / "two", workers=2) == alone
    for suffix in ("", "_heldout", "_short"):
        assert check_set(tmp_path / f"two{suffix}") == []


def test_an_interrupted_run_finds_its_parts_and_ends_with_the_same_bytes(
    corpus, model_path, tmp_path, monkeypatch
):
    expected = run(corpus, model_path, tmp_path / "whole")
    encode = parts.Encoder._encode
    encoded = []

    def until_the_power_goes(self, document):
        if len(encoded) == 30:
            raise KeyboardInterrupt
        encoded.append(document.id)
        return encode(self, document)

    monkeypatch.setattr(parts.Encoder, "_encode", until_the_power_goes)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, model_path, tmp_path / "set")
    assert sets(tmp_path / "set") == {}
    kept = len(parts_of(tmp_path / "set"))
    assert kept > 2

    def counted(self, document):
        encoded.append(document.id)
        return encode(self, document)

    encoded.clear()
    monkeypatch.setattr(parts.Encoder, "_encode", counted)
    told = []
    resumed = run(corpus, model_path, tmp_path / "set", progress=lambda *sizes: told.append(sizes))
    assert resumed == expected
    # First what the earlier run left, at the end everything.
    assert told[0][0] > 0 and told[-1] == (told[0][1], told[0][1])
    assert 0 < len(encoded) < 40
    assert not (tmp_path / ".set.parts").exists()


def test_a_broken_line_keeps_what_was_tokenized_before_it(corpus, model_path, tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.jsonl:34: not valid JSON"):
        prepare([corpus], tmp_path / "set", model_path, FixedSegments(256))
    assert parts_of(tmp_path / "set")


def test_changed_text_is_tokenized_again(corpus, model_path, tmp_path):
    corpus.write_text(corpus.read_text() + "\nbroken")
    with pytest.raises(ValueError, match="34"):
        prepare([corpus], tmp_path / "set", model_path, WholeDocuments())
    assert parts_of(tmp_path / "set")
    corpus.write_text(corpus.read_text().replace("broken", "").replace("window", "search"))
    prepare([corpus], tmp_path / "set", model_path, WholeDocuments())
    prepare([corpus], tmp_path / "fresh", model_path, WholeDocuments())
    assert sets(tmp_path / "set") == sets(tmp_path / "fresh")


def test_two_runs_do_not_write_one_set(tmp_path):
    with (
        parts.parts_directory(tmp_path / "set"),
        pytest.raises(ValueError, match="being written by process"),
        parts.parts_directory(tmp_path / "set"),
    ):
        pass


def test_a_damaged_part_is_named(corpus, model_path, tmp_path):
    with pytest.raises(ValueError, match="not valid JSON"):
        prepare([corpus], tmp_path / "set", model_path, WholeDocuments())
    for path in parts_of(tmp_path / "set"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"\.npz is damaged .* remove the file"):
        prepare([corpus], tmp_path / "set", model_path, WholeDocuments())


def test_limits_do_not_depend_on_what_lies_behind_them(corpus, model_path, tmp_path):
    packing = WholeDocuments(max_documents=5)
    manifest = prepare([corpus], tmp_path / "set", model_path, packing)  # line 34 is broken
    assert manifest["segments"] == manifest["documents"] == 5


KILLED = """
import sys, time
from pathlib import Path
from megatron_longrope.data import parts, tokenization
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, ShortDocuments
from megatron_longrope.data.stream import Split

if __name__ == "__main__":
    tokenization._CHARACTERS = 6000
    load = parts.Encoder.load
    def slow(self, path):
        time.sleep(1)  # the reader of parts, so that workers get ahead of it
        return load(self, path)
    parts.Encoder.load = slow
    prepare([sys.argv[1]], sys.argv[2], sys.argv[3],
            FixedSegments(256, "pack", joined=2),
            split=Split(0.1, ShortDocuments(64, 8), 5), on_error="skip", workers=2)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_is_taken_up_again(corpus, model_path, tmp_path):
    expected = run(corpus, model_path, tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    prefix = tmp_path / "out" / "set"
    command = [sys.executable, str(script), str(corpus), str(prefix), str(model_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_until(lambda: len(parts_of(prefix)) > 2, 600)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not group_alive(process.pid), 600)
    assert sets(prefix) == {}
    assert run(corpus, model_path, prefix, workers=2) == expected
    assert {path.name[0] for path in prefix.parent.iterdir()} == {"s"}


def group_alive(group):
    """Whether a process of the group runs; one that nobody has reaped does not."""
    states = subprocess.run(
        ["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split() for line in states]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)
