import errno
import gzip
import json

import pytest

from megatron_longrope.data.columns import source_size
from megatron_longrope.data.sources import find_source_files, iterate_documents
from megatron_longrope.errors import LongRopeError


def read(*paths, **options):
    return [(item.id, item.text) for item in iterate_documents(paths, **options)]


def test_text_file_is_one_document_with_its_white_space(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  a\r\n\n\tb \n".encode())
    assert read(path) == [(str(path), "  a\r\n\n\tb \n")]


def test_json_lines_plain_and_compressed_are_the_same_documents(tmp_path):
    lines = '{"body": "one\\n", "n": 1}\n\n  \n{"body": "zwölf"}'.encode()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(lines)
    packed.write_bytes(gzip.compress(lines))
    expected = [(":1", "one\n"), (":4", "zwölf")]
    for path in (plain, packed):
        assert read(path, text_key="body") == [(str(path) + end, text) for end, text in expected]


def test_directories_are_read_recursively_in_sorted_order(tmp_path):
    for name in ("b/2.TXT", "b/1.jsonl", "a.txt", "c.md", "b/a/x.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = [path.relative_to(tmp_path).as_posix() for path in find_source_files([tmp_path])]
    assert names == ["a.txt", "b/1.jsonl", "b/2.TXT", "b/a/x.jsonl.gz"]
    assert read(tmp_path / "b/2.TXT") == [(str(tmp_path / "b/2.TXT"), "")]


def test_hidden_files_and_folders_are_passed_over_unless_they_are_given_themselves(tmp_path):
    for name in ("a.txt", ".b.txt", ".git/c.txt", "d/.ipynb_checkpoints/e.jsonl", "d/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "d/README.md").write_text("of another kind")
    unread = []
    found = find_source_files([tmp_path], unread.append)
    assert [path.name for path in found] == ["a.txt", "f.jsonl"]
    assert {path.name for path in unread} == {".b.txt", ".git", ".ipynb_checkpoints", "README.md"}
    given = [tmp_path / ".b.txt", tmp_path / ".git"]
    assert [path.name for path in find_source_files(given)] == [".b.txt", "c.txt"]


def test_linked_folders_are_read_and_a_link_back_up_ends_nothing(tmp_path):
    for name in ("far/b.txt", "here/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "here")
    found = find_source_files([tmp_path / "here"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "here/a.txt",
        "here/linked/b.txt",
    ]
    # Other names of what is there, such as `latest` beside versions: one source, in order.
    (tmp_path / "here" / "now").symlink_to(tmp_path / "far")
    assert find_source_files([tmp_path / "here"]) == found
    (tmp_path / "here" / "a").symlink_to(tmp_path / "far")
    assert [path.name for path in find_source_files([tmp_path / "here"])] == ["b.txt", "a.txt"]


def test_a_link_to_nothing_and_a_closed_folder_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").symlink_to("gone/blob")
    with pytest.raises(LongRopeError, match=r"b\.txt is a link to gone/blob, where nothing is"):
        find_source_files([tmp_path])
    (tmp_path / "b.txt").rename(tmp_path / "b.md")
    assert find_source_files([tmp_path]) == [tmp_path / "a.txt"]

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "closed"))

    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    for scan in (lambda: find_source_files([tmp_path]), lambda: source_size(tmp_path)):
        with pytest.raises(LongRopeError, match="closed cannot be read: Permission denied"):
            scan()


def test_a_json_file_is_read_as_json_lines_where_it_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(*find_source_files([path])) == [(f"{path}:1", "one"), (f"{path}:2", "two")]
    with pytest.raises(ValueError, match="holds no"):  # beside text lie manifests and settings
        find_source_files([tmp_path])
    # A compressed one is data, as C4 and RedPajama have them.
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [text for _, text in read(*find_source_files([tmp_path]))] == ["one", "two"]


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", denied)
    for on_skip in (None, lambda _: None):
        with pytest.raises(LongRopeError, match=r"a\.jsonl cannot be read: Permission denied"):
            read(path, on_skip=on_skip)


def test_bytes_reported_add_up_to_the_file_sizes(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"]
    line = json.dumps({"text": "x" * 500}).encode() + b"\n"
    for path in paths:
        path.write_bytes(gzip.compress(line * 50) if path.suffix == ".gz" else line * 50)
    counts = []
    read(*paths, on_bytes=counts.append)
    assert sum(counts) == sum(path.stat().st_size for path in paths)


BROKEN = [
    (b'{"text": "a"', "not valid JSON at column"),
    (b'["a"]', "expected a JSON object on each line, got list"),
    (b'{"txt": "a"}', r"no key 'text' \(keys: \['txt'\]\)"),
    (b'{"text": null}', "'text' holds NoneType, not a string"),
    (b'{"text": "\xff"}', "byte 0xff is not valid UTF-8"),
    (b'{"text": "\\ud800"}', "unpaired surrogate"),
    (b"[" * 100_000, "nested too deeply"),
    (b"1" * 5000, "not valid JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_broken_line_is_named_with_file_line_and_remedy(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    remedy = "--text-key" if "no key" in reason else "--on-error skip"
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{reason}.*{remedy}"):
        read(path)


def test_skipping_reports_every_broken_line_and_keeps_the_rest(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(b"".join(good + line + b"\n" for line, _ in BROKEN) + good)
    skipped = []
    documents = read(path, on_skip=skipped.append)
    assert len(documents) == len(BROKEN) + 1
    assert [item.line for item in skipped] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_broken_text_file_is_named_with_the_line_of_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree")
    with pytest.raises(ValueError, match=r"a\.txt:3: byte 0xff is not valid UTF-8"):
        read(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no gzip"])
def test_damaged_gzip_stops_the_file_but_not_the_run(tmp_path, damage):
    bad, good = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"
    lines = b"".join(json.dumps({"text": str(k**9)}).encode() + b"\n" for k in range(2000))
    bad.write_bytes(damage(gzip.compress(lines)))
    good.write_text('{"text": "last"}')
    with pytest.raises(ValueError, match="gzip data is damaged"):
        read(bad, good)
    skipped = []
    assert read(bad, good, on_skip=skipped.append)[-1] == (f"{good}:1", "last")
    assert len(skipped) == 1


def test_unfit_inputs_are_refused(tmp_path):
    for inputs, message in (
        ([], "no input was given"),
        ([tmp_path / "none.txt"], "does not exist"),
        ([tmp_path], r"holds no \.txt, .*\.parquet file and no saved dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            find_source_files(inputs)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="unknown kind"):
        find_source_files([tmp_path / "a.csv"])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="given twice"):
        find_source_files([tmp_path, tmp_path / "a.txt"])
