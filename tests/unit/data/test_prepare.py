import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gpt_datasets import gpt_dataset

from megatron_longrope.data import prepare as prepare_module
from megatron_longrope.data import tokenization, writer
from megatron_longrope.data.documents import check_set, read_documents, read_manifest
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, ShortDocuments, WholeDocuments
from megatron_longrope.data.stream import Split
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.data.writer import output_paths
from megatron_longrope.errors import LongRopeError

S = 64


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "out" / "set.v1"


def names(prefix):
    """What a user sees: parts that wait for another run are hidden."""
    return sorted(path.name for path in prefix.parent.glob("[!.]*"))


@pytest.mark.parametrize("tail", ["drop", "pad", "pack"])
def test_prepared_segments_are_sound_and_described(corpus, model_path, prefix, tail):
    manifest = prepare([corpus], prefix, model_path, FixedSegments(S, tail))
    segments = read_documents(prefix)
    tokenizer = load_tokenizer(model_path)
    assert manifest == read_manifest(prefix)
    assert check_set(prefix) == []
    assert {len(segment) for segment in segments} == {S}
    assert manifest["mode"] == "segments" and manifest["tail"] == tail
    assert manifest["segments"] == len(segments) and manifest["tokens"] == S * len(segments)
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert manifest["documents"] == 12 == sum(manifest["length_histogram"].values())
    assert manifest["dtype"] == "uint16"
    assert names(prefix) == ["set.v1.bin", "set.v1.idx", "set.v1.json"]
    text = json.loads(corpus.read_text().splitlines()[1])["text"]
    # The first document is all tail: padded it comes first, packed it waits for company.
    first = segments[1 if tail == "pad" else 0]
    assert text.startswith(tokenizer.decode(first[1:-1]))


def test_whole_documents_round_trip_to_the_text(corpus, model_path, prefix):
    manifest = prepare([corpus], prefix, model_path, WholeDocuments())
    tokenizer = load_tokenizer(model_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert [tokenizer.decode(item) for item in read_documents(prefix)] == texts
    assert manifest["tokens"] == manifest["source_tokens"]
    assert check_set(prefix) == []


def test_stock_gpt_dataset_samples_are_the_segments(corpus, model_path, prefix, tmp_path):
    prepare([corpus], prefix, model_path, FixedSegments(S, "pack"))
    segments = read_documents(prefix)
    tokenizer = load_tokenizer(model_path)
    epochs = 3
    train = gpt_dataset(prefix, tokenizer, S, epochs * len(segments) - 1, tmp_path / "cache")
    known = {segment.tobytes(): index for index, segment in enumerate(segments)}
    counts = np.zeros(len(segments), dtype=int)
    for index in range(epochs * len(segments) - 1):
        sample = train[index]
        counts[known[sample["tokens"].numpy().tobytes()]] += 1
        assert sample["labels"][-1] == tokenizer.bos_id
    # The very last segment has no extra token for its labels, so one sample is missing.
    assert counts.sum() == epochs * len(segments) - 1
    assert counts.min() >= epochs - 1


def test_large_vocabularies_are_stored_as_int32(corpus, model_path, prefix, monkeypatch):
    real = load_tokenizer(model_path)

    class Shifted:
        path, sha256, vocab_size = "x", "y", 128_000
        bos_id, eos_id = 127_000, 127_001

        def encode(self, text):
            return [token + 100_000 for token in real.encode(text)]

    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda path, bos: Shifted())
    manifest = prepare([corpus], prefix, "x", FixedSegments(S))
    assert manifest["dtype"] == "int32"
    assert read_documents(prefix)[0][0] == 127_000
    assert check_set(prefix) == []
    Shifted.vocab_size = 100_100
    with pytest.raises(ValueError, match="is not below the vocabulary size 100100"):
        prepare([corpus], prefix, "x", WholeDocuments(), overwrite=True)
    Shifted.eos_id = None
    with pytest.raises(ValueError, match=r"has no EOS token, .*eos_token"):
        prepare([corpus], prefix, "x", FixedSegments(S), overwrite=True)


def test_without_bos_a_set_has_eos_alone_and_a_given_id_takes_its_place(
    corpus, model_path, prefix, monkeypatch
):
    real = load_tokenizer(model_path)

    def load(path, bos=None):  # sentencepiece models have a BOS; stock Qwen's folder has none
        loaded = load_tokenizer(path, bos)
        loaded.bos_id = bos
        return loaded

    monkeypatch.setattr(prepare_module, "load_tokenizer", load)
    short = Split(short=ShortDocuments(32, 16))
    for bos in (None, 5):
        packing = FixedSegments(S, "pack")
        manifest = prepare(
            [corpus], prefix, model_path, packing, split=short, bos=bos, overwrite=True
        )
        assert manifest["bos_id"] == bos
        for suffix in ("", "_short"):
            assert check_set(f"{prefix}{suffix}") == []
            for entry in read_documents(f"{prefix}{suffix}"):
                assert (entry[0] == 5) == (bos == 5) and entry[-1] == real.eos_id
    with pytest.raises(ValueError, match=r"--bos 99999 is no token id; the tokenizer has 0 to"):
        load_tokenizer(model_path, 99999)


def test_skipped_lines_are_listed_in_the_manifest(corpus, model_path, prefix):
    corpus.write_text(corpus.read_text() + "broken\n{}\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:13: not valid JSON"):
        prepare([corpus], prefix, model_path, WholeDocuments())
    assert names(prefix) == []
    manifest = prepare([corpus], prefix, model_path, WholeDocuments(), on_error="skip")
    assert manifest["skipped"]["count"] == 2
    assert [item["line"] for item in manifest["skipped"]["lines"]] == [13, 14]
    assert manifest["documents"] == 12


def test_a_wrong_text_key_is_named_with_those_that_are_there(corpus, model_path, prefix):
    (corpus.parent / ".git").mkdir()
    keys = r"no key 'body' \(keys: \['text'\]\); name the text with --text-key"
    with pytest.raises(ValueError, match=rf"corpus\.jsonl:1: there is {keys}"):
        prepare([corpus], prefix, model_path, WholeDocuments(), text_key="body")
    with pytest.raises(ValueError, match=rf"none of 12 documents can be read, such as .*{keys}"):
        prepare([corpus], prefix, model_path, WholeDocuments(), text_key="body", on_error="skip")
    (corpus.parent / "README.md").touch()
    manifest = prepare([corpus.parent], prefix, model_path, WholeDocuments())
    assert manifest["hidden_skipped"] == 1 and manifest["documents"] == 12
    assert manifest["other_files"] == 1


def test_many_skipped_lines_are_counted_but_not_all_listed(corpus, model_path, prefix, monkeypatch):
    monkeypatch.setattr(tokenization, "MAX_REPORTED_SKIPS", 3)
    corpus.write_text(corpus.read_text() + "broken\n" * 10)
    manifest = prepare([corpus], prefix, model_path, WholeDocuments(), on_error="skip")
    assert manifest["skipped"]["count"] == 10
    assert len(manifest["skipped"]["lines"]) == 3


def test_existing_output_is_refused_until_overwrite(corpus, model_path, prefix):
    prepare([corpus], prefix, model_path, FixedSegments(S))
    with pytest.raises(ValueError, match=r"exists; .*--overwrite"):
        prepare([corpus], prefix, model_path, FixedSegments(S))
    prepare([corpus], prefix, model_path, WholeDocuments(), overwrite=True)
    assert read_manifest(prefix)["mode"] == "whole"
    assert check_set(prefix) == []


def test_a_training_on_a_new_set_of_an_old_name_reads_the_new_samples(
    corpus, model_path, prefix, tmp_path, monkeypatch
):
    tokenizer = load_tokenizer(model_path)

    def samples(set_prefix):  # with Megatron's indices where it keeps them unless told otherwise
        dataset = gpt_dataset(set_prefix, tokenizer, 32, 20, None)
        return [dataset[i]["tokens"].tolist() for i in range(20)]

    publish = prepare_module.publish

    def meanwhile(*args):  # another training on the old set begins
        samples(prefix)
        publish(*args)

    prepare([corpus], prefix, model_path, FixedSegments(S))
    samples(prefix)
    (prefix / "cache/texts").mkdir()  # somebody else's
    monkeypatch.setattr(prepare_module, "publish", meanwhile)
    prepare([corpus], prefix, model_path, WholeDocuments(), overwrite=True)
    monkeypatch.undo()
    prepare([corpus], tmp_path / "fresh", model_path, WholeDocuments())
    assert samples(prefix) == samples(tmp_path / "fresh")
    assert (prefix / "cache/texts").exists()


def test_failed_overwrite_leaves_the_old_set_intact(corpus, model_path, prefix):
    prepare([corpus], prefix, model_path, FixedSegments(S))
    corpus.write_text(corpus.read_text() + "broken\n")
    with pytest.raises(ValueError, match="not valid JSON"):
        prepare([corpus], prefix, model_path, FixedSegments(S), overwrite=True)
    assert check_set(prefix) == []
    assert len(names(prefix)) == 3


def test_an_overwrite_cut_off_between_its_sets_leaves_no_sound_set_of_the_earlier_run(
    corpus, model_path, prefix, monkeypatch
):
    def overwrite(seed):
        split = Split(held_out=0.5, seed=seed)
        prepare([corpus], prefix, model_path, FixedSegments(S), split=split, overwrite=True)

    overwrite(0)
    replace = os.replace

    def die(source, target):  # the held-out set is there, nothing of the training set is
        replace(source, target)
        if target == output_paths(f"{prefix}_heldout")[2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        overwrite(1)
    monkeypatch.undo()
    assert read_manifest(f"{prefix}_heldout")["seed"] == 1
    with pytest.raises(LongRopeError, match="no such manifest"):
        check_set(prefix)
    overwrite(1)
    assert check_set(prefix) == [] and read_manifest(prefix)["seed"] == 1


def test_killed_run_leaves_nothing_under_the_final_names(corpus, model_path, prefix):
    script = """
import os, sys
from megatron_longrope.data import prepare as module, writer
from megatron_longrope.data.segments import FixedSegments
def die(digest, tokens):
    os.kill(os.getpid(), 9)
writer.update_digest = die
module.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], FixedSegments(64))
"""
    command = [sys.executable, "-c", script, str(corpus), str(prefix), str(model_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert names(prefix) == []
    prepare([corpus], prefix, model_path, FixedSegments(S))
    assert check_set(prefix) == []
    assert {path.name for path in prefix.parent.iterdir()} == set(names(prefix))


def test_a_set_that_appears_while_another_run_makes_it_too_is_not_replaced(
    corpus, model_path, prefix, monkeypatch
):
    finish, beside = prepare_module._finish, f"{prefix}_heldout"

    def meanwhile(*args):
        monkeypatch.setattr(prepare_module, "_finish", finish)
        prepare([corpus], beside, model_path, WholeDocuments())
        return finish(*args)

    monkeypatch.setattr(prepare_module, "_finish", meanwhile)
    with pytest.raises(ValueError, match=r"set\.v1_heldout\.bin exists; .*not replaced silently"):
        prepare([corpus], prefix, model_path, WholeDocuments(), split=Split(held_out=0.5))
    assert check_set(beside) == [] and len(names(prefix)) == 3


def test_nothing_to_write_is_an_error_with_the_longest_length(corpus, model_path, prefix):
    with pytest.raises(ValueError, match=r"none of the 12 documents .* longest has \d+ tokens"):
        prepare([corpus], prefix, model_path, FixedSegments(100_000))
    with pytest.raises(ValueError, match="lower --min-length"):
        prepare([corpus], prefix, model_path, WholeDocuments(min_length=100_000))
    assert names(prefix) == []


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, model_path):
    (tmp_path / "file").touch()
    with pytest.raises(LongRopeError, match=r"cannot be a folder: .*file is a file"):
        prepare(["absent.txt"], tmp_path / "file/set", model_path, WholeDocuments())


def test_a_full_disk_is_one_sentence_and_finished_parts_stay(
    corpus, model_path, prefix, monkeypatch
):
    def full(_, entries):
        next(entries)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module.SetWriter, "extend", full)
    with pytest.raises(LongRopeError, match=r"the disk is full; make room .* finished parts are"):
        prepare([corpus], prefix, model_path, FixedSegments(S))
    assert names(prefix) == [] and list((prefix.parent / f".{prefix.name}.parts").glob("*.npz"))


def test_bad_options_are_refused(corpus, model_path, prefix):
    with pytest.raises(ValueError, match=r"x\.bin is not a prefix"):
        prepare([corpus], "x.bin", model_path, WholeDocuments())
