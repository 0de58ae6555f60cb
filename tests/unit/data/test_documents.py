import json

import numpy as np
import pytest

from megatron_longrope.cli.data import histogram_lines
from megatron_longrope.data.documents import check_set, read_documents, read_manifest
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, ShortDocuments, WholeDocuments
from megatron_longrope.data.stream import Split
from megatron_longrope.errors import LongRopeError


@pytest.fixture
def whole(corpus, model_path, tmp_path):
    prepare([corpus], tmp_path / "whole", model_path, WholeDocuments())
    return tmp_path / "whole"


@pytest.fixture
def segments(corpus, model_path, tmp_path):
    prepare([corpus], tmp_path / "segments", model_path, FixedSegments(32, "pack"))
    return tmp_path / "segments"


def write_entries(prefix, entries):
    """Other tokens under a set's manifest."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for entry in entries:
        builder.add_item(torch.tensor(entry))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_documents_come_as_int64_in_file_order(whole):
    documents = read_documents(whole)
    assert len(documents) == 12
    assert {item.dtype for item in documents} == {np.dtype(np.int64)}
    long = read_documents(whole, min_length=200, limit=2)
    expected = [item for item in documents if len(item) >= 200][:2]
    assert all(np.array_equal(a, b) for a, b in zip(long, expected, strict=True))


def test_too_few_long_documents_names_count_need_and_longest(whole):
    longest = max(map(len, read_documents(whole)))
    with pytest.raises(ValueError, match=rf"holds 0 documents of at least 99999 .*{longest}"):
        read_documents(whole, min_length=99_999)
    with pytest.raises(ValueError, match=r"holds 12 documents, 13 needed"):
        read_documents(whole, limit=13)


def test_missing_and_damaged_files_are_named(whole, tmp_path):
    with pytest.raises(ValueError, match=r"none\.bin: no such file"):
        read_documents(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a prefix"):
        read_documents(f"{whole}.bin")
    data = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "whole.bin").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"whole\.bin has \d+ bytes, its index describes \d+"):
        read_documents(whole)
    (tmp_path / "whole.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"whole\.bin is empty"):
        read_documents(whole)
    (tmp_path / "whole.bin").write_bytes(data)
    index = (tmp_path / "whole.idx").read_bytes()
    for damaged in (b"", b"x" * 100, index[:20], index[: len(index) // 2], index + b"more"):
        (tmp_path / "whole.idx").write_bytes(damaged)
        with pytest.raises(
            LongRopeError, match=r"whole\.idx (is not a Megatron index|has \d+ bytes, its header)"
        ):
            read_documents(whole)


def test_missing_and_other_manifests_are_refused(whole, tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 9}))
    with pytest.raises(LongRopeError, match="not a manifest of schema 1"):
        read_manifest(whole)
    path.unlink()
    with pytest.raises(LongRopeError, match="no such manifest"):
        read_manifest(whole)


def test_one_short_segment_is_found(segments):
    entries = [item.tolist() for item in read_documents(segments)]
    entries[3] = entries[3][:-1]
    write_entries(segments, entries)
    problems = check_set(segments)
    assert problems[0] == "entry 3 has 31 tokens, not 32"
    assert any(problem.startswith("tokens is") for problem in problems)
    assert any(problem.startswith("token_sha256 is") for problem in problems)


def test_changed_token_and_missing_bos_are_found(segments):
    entries = [item.tolist() for item in read_documents(segments)]
    changed = [*entries[:-1], [*entries[-1][:5], 9, *entries[-1][6:]]]
    write_entries(segments, changed)
    assert [problem.split()[0] for problem in check_set(segments)] == ["token_sha256"]
    write_entries(segments, [[7, *entry[1:]] for entry in entries])
    problems = check_set(segments)
    assert problems[0] == "entry 0 starts with token 7, not bos_id 1"
    assert problems[10] == f"{len(entries) - 10} more of this kind"


def test_whole_documents_outside_their_limits_are_found(corpus, model_path, tmp_path):
    prepare([corpus], tmp_path / "set", model_path, WholeDocuments(100, 300))
    write_entries(tmp_path / "set", [[5] * 99, [5] * 301, [5] * 200])
    assert check_set(tmp_path / "set")[:2] == [
        "entry 0 has 99 tokens, outside 100 to 300",
        "entry 1 has 301 tokens, outside 100 to 300",
    ]


def test_joined_and_short_entries_are_checked_one_segment_at_a_time(corpus, model_path, tmp_path):
    prefix = tmp_path / "joined"
    split = Split(short=ShortDocuments(64, 8))
    prepare([corpus], prefix, model_path, FixedSegments(32, "pack", joined=2), split=split)
    for name, offset in (("joined", 2 * 32), ("joined_short", 0)):
        path = tmp_path / f"{name}.bin"
        data = bytearray(path.read_bytes())
        data[offset] = 9  # where a segment, the second one of the entry, has its BOS
        path.write_bytes(bytes(data))
        problems = check_set(tmp_path / name)
        assert problems[0] == "entry 0 starts with token 9, not bos_id 1"
        assert "token_sha256" in problems[-1] and len(problems) == 2
    manifest = json.loads((tmp_path / "joined_short.json").read_text())
    manifest["window"] = 16
    (tmp_path / "joined_short.json").write_text(json.dumps(manifest))
    assert any("not a multiple of 8 up to 16" in item for item in check_set(f"{prefix}_short"))


def test_histogram_bars_are_in_proportion():
    lines = histogram_lines({"2048": 1, "0": 10, "1024": 5}, width=10)
    assert [line.split() for line in lines] == [
        ["empty", "10", "#" * 10],
        ["1k", "to", "2k", "5", "#" * 5],
        ["2k", "to", "4k", "1", "#"],
    ]
