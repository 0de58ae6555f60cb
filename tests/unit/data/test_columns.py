"""Compressed lines, parquet files and saved datasets hold the same documents as plain lines."""

import errno
import json
import sys
from unittest.mock import Mock

import pytest

from megatron_longrope.data import columns
from megatron_longrope.data.sources import find_source_files, iterate_documents
from megatron_longrope.errors import LongRopeError

TEXTS = [f"document {k}\n" * (k % 5) for k in range(200)]


def read(path, **options):
    documents = list(iterate_documents(find_source_files([path]), **options))
    return [(item.id.removeprefix(str(path)), item.text) for item in documents]


EXPECTED = [(f":{k + 1}", text) for k, text in enumerate(TEXTS)]


def write_parquet(path, rows, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(rows), path, **options)
    return path


def save_dataset(path, rows, **options):
    pytest.importorskip("datasets").Dataset.from_dict(rows).save_to_disk(path, **options)
    return path


def test_a_parquet_file_is_read_across_row_groups(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", {"n": list(range(200)), "text": TEXTS}, row_group_size=70
    )
    counts = []
    assert read(path, on_bytes=counts.append) == EXPECTED
    assert sum(counts) == path.stat().st_size


def test_a_saved_dataset_is_read_over_all_its_files(tmp_path):
    path = save_dataset(tmp_path / "saved", {"body": TEXTS}, num_shards=3)
    counts = []
    assert read(path, text_key="body", on_bytes=counts.append) == EXPECTED
    assert sum(counts) == columns.source_size(path)


def test_saved_datasets_within_a_directory_are_sources_and_their_files_are_not(tmp_path):
    save_dataset(tmp_path / "splits/train", {"text": ["a"]})
    (tmp_path / "splits/train/stray.txt").write_text("no source")
    (tmp_path / "splits/z.txt").write_text("last")
    found = [item.relative_to(tmp_path).as_posix() for item in find_source_files([tmp_path])]
    assert found == ["splits/train", "splits/z.txt"]


def test_zstd_lines_are_read_across_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(b"".join(lines[:80])) + compress(b"".join(lines[80:])))
    assert read(path) == EXPECTED
    path.write_bytes(b"no zstd at all")
    with pytest.raises(ValueError, match="zstd data is damaged"):
        read(path)


@pytest.mark.parametrize(
    "rest", [lambda frame: frame[:20], lambda frame: frame[:-1], lambda _: b"\0" * 99]
)
def test_zstd_lines_end_at_damage_or_a_missing_end_and_all_before_it_are_read(tmp_path, rest):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(b"".join(lines[:80])) + rest(compress(b"".join(lines[80:]))))
    with pytest.raises(ValueError, match=r"zst:\d+: the zstd data is damaged from here on"):
        read(path)
    skipped = []
    documents = read(path, on_skip=skipped.append)
    assert documents == EXPECTED[: len(documents)] and len(documents) >= 80
    assert [item.line for item in skipped] == [len(documents) + 1]


def test_zstd_lines_of_a_window_over_128_mb_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    path = tmp_path / "a.jsonl.zst"
    with zstandard.open(path, "wb", zstandard.ZstdCompressor(compression_params=parameters)) as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    assert read(path) == EXPECTED


@pytest.mark.parametrize(
    ("module", "name"),
    [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "saved")],
)
def test_a_missing_library_is_one_sentence_with_the_remedy(tmp_path, monkeypatch, module, name):
    path = tmp_path / name
    if module == "datasets":
        path.mkdir()
        (path / "state.json").write_text("{}")
        (path / "dataset_info.json").write_text("{}")
    else:
        path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs {module}, which is not installed; run `pip"):
        read(path)


@pytest.mark.parametrize("write", [write_parquet, save_dataset])
def test_rows_without_text_are_named_or_skipped(tmp_path, write):
    path = write(tmp_path / "a.parquet", {"text": ["good", None, "last"]})
    with pytest.raises(ValueError, match=r"a\.parquet:2: 'text' holds NoneType.*--on-error skip"):
        read(path)
    skipped = []
    assert read(path, on_skip=skipped.append) == [(":1", "good"), (":3", "last")]
    assert [item.line for item in skipped] == [2]
    for on_skip in (None, skipped.append):  # a file without the column is no skipped document
        with pytest.raises(ValueError, match=r"no column 'body' \(columns: \['text'\]\); name the"):
            read(path, text_key="body", on_skip=on_skip)


def test_damage_stops_the_parquet_file_but_not_the_run(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    (tmp_path / "b.txt").write_text("last")
    with pytest.raises(ValueError, match=r"a\.parquet:1: the parquet data is damaged"):
        read(tmp_path)
    skipped = []
    assert [text for _, text in read(tmp_path, on_skip=skipped.append)] == ["last"]
    assert len(skipped) == 1
    arrow = pytest.importorskip("pyarrow")
    for error in (OSError(errno.EIO, "Input/output error"), arrow.ArrowNotImplementedError("new")):
        monkeypatch.setattr(arrow.parquet, "ParquetFile", Mock(side_effect=error))
        match = "cannot be read: Input/output" if error.args[0] == errno.EIO else "is damaged .*new"
        with pytest.raises(LongRopeError, match=match):
            read(path)
    monkeypatch.setattr(
        arrow.parquet, "ParquetFile", Mock(side_effect=arrow.ArrowMemoryError("malloc failed"))
    )
    with pytest.raises(MemoryError):
        read(path, on_skip=skipped.append)
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(ValueError, match="cannot be opened as a saved dataset"):
        read(tmp_path / "saved")
