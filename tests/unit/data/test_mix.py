import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from gpt_datasets import gpt_dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import make_text

from megatron_longrope.data.documents import check_set, read_documents, read_manifest
from megatron_longrope.data.mix import Source, draw, load_mix
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, ShortDocuments, WholeDocuments
from megatron_longrope.data.stream import Split
from megatron_longrope.data.tokenizer import load_tokenizer


@pytest.fixture
def two_sources(tmp_path):
    """Short and long documents, in two files."""
    for name, words in (("books", 300), ("code", 30)):
        lines = [{"text": f"{name} {k} {make_text(k, words + 10 * (k % 3))}"} for k in range(40)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def source(directory, name, **options):
    return Source(name, (str(directory / f"{name}.jsonl"),), **options)


def texts(prefix, tokenizer):
    return [load_tokenizer(tokenizer).decode(item) for item in read_documents(prefix)]


@given(st.binary(min_size=1), st.floats(0.01, 5), st.integers(0, 100), st.sampled_from([50, 51]))
def test_copies_are_the_weight_rounded_up_or_down(digest, weight, seed, length):
    copies = Source("a", ("x",), weight).copies(length, digest, seed)
    assert weight - 1 < copies < weight + 1
    doubled = Source("a", ("x",), weight, long_above=50, long_factor=2.0)
    alike = Source("a", ("x",), 2 * weight if length > 50 else weight)
    assert doubled.copies(length, digest, seed) == alike.copies(length, digest, seed)


def test_fractions_of_a_weight_are_met_on_average_and_decisions_are_independent():
    digests = [str(k).encode() for k in range(4000)]
    copies = [Source("a", ("x",), 1.3).copies(9, digest, 7) for digest in digests]
    assert set(copies) == {1, 2} and 1.27 < sum(copies) / 4000 < 1.33
    both = sum(draw(d, 7, "held out") < 0.5 and draw(d, 7, "copies") < 0.5 for d in digests)
    assert 900 < both < 1100
    assert [draw(d, 7, "a") for d in digests] != [draw(d, 8, "a") for d in digests]


def test_weights_and_long_documents_decide_how_often_each_text_stands(two_sources, model_path):
    mix = [
        source(two_sources, "books", weight=2.0, long_above=1, long_factor=1.5),
        source(two_sources, "code", weight=0.5),
    ]
    prefix = two_sources / "set"
    manifest = prepare(mix, prefix, model_path, WholeDocuments(), split=Split(seed=3))
    stored = Counter(texts(prefix, model_path))
    by_source = {"books": [], "code": []}
    for text, count in stored.items():
        by_source[text.split()[0]].append(count)
    assert by_source["books"] == [3] * 40
    assert by_source["code"] == [1] * len(by_source["code"]) and 8 < len(by_source["code"]) < 32
    books, code = manifest["sources"]
    assert (books["documents"], books["used_documents"]) == (40, 120)
    assert (code["documents"], code["used_documents"]) == (40, len(by_source["code"]))
    assert manifest["documents"] == 80 and manifest["used_tokens"] == manifest["tokens"]
    # Copies do not follow each other.
    order = texts(prefix, model_path)
    assert all(a != b for a, b in pairwise(order))


def test_every_source_has_its_own_text_key(two_sources, model_path):
    code = two_sources / "code.jsonl"
    code.write_text(code.read_text().replace('"text"', '"content"'))
    mix = {"books": {"paths": ["books.jsonl"]}, "code": {"paths": ["code.jsonl"]}}
    path, packing = two_sources / "mix.json", FixedSegments(64, "pack")

    def made(on_error="skip"):
        path.write_text(json.dumps(mix))
        sources = load_mix(path)
        return prepare(sources, two_sources / "set", model_path, packing, on_error=on_error)

    # A source of which nothing can be read would be missing from the mix.
    nothing = (
        r"source 'code' \(.*code\.jsonl\): none of 40 documents .* with text_key of the source"
    )
    with pytest.raises(ValueError, match=nothing):
        made()
    mix["code"]["text_key"] = "content"
    manifest = made("fail")
    assert [source["documents"] for source in manifest["sources"]] == [40, 40]
    mix["code"]["text_key"] = 1
    with pytest.raises(ValueError, match=r"source 'code': text_key is 1; give the name of a key"):
        made()


def test_a_source_without_any_document_is_refused(two_sources, model_path):
    (two_sources / "code.jsonl").write_text("\n")
    mix = [source(two_sources, "books"), source(two_sources, "code")]
    with pytest.raises(ValueError, match=r"source 'code' \(.*\) holds no document; leave it out"):
        prepare(mix, two_sources / "set", model_path, WholeDocuments())


def test_held_out_documents_are_whole_and_in_no_training_segment(two_sources, model_path):
    mix = [source(two_sources, "books", weight=2.0), source(two_sources, "code")]
    prefix, split = two_sources / "set", Split(held_out=0.2, seed=1)
    manifest = prepare(mix, prefix, model_path, WholeDocuments(), split=split)
    held = read_manifest(f"{prefix}_heldout")
    training, held_texts = texts(prefix, model_path), texts(f"{prefix}_heldout", model_path)
    assert not set(training) & set(held_texts)
    assert len(set(training)) + len(held_texts) == 80
    assert len(held_texts) == held["segments"] == manifest["held_out_documents"] > 5
    assert sum(item["held_out_documents"] for item in manifest["sources"]) == len(held_texts)
    assert check_set(prefix) == check_set(f"{prefix}_heldout") == []


@pytest.mark.parametrize(
    ("split", "suffix", "option"),
    [
        (Split(held_out=0.2, seed=1), "_heldout", "--held-out"),
        (Split(short=ShortDocuments(256)), "_short", "--short-window"),
    ],
)
def test_what_was_kept_out_of_a_set_is_not_left_beside_one_that_has_it(
    two_sources, model_path, split, suffix, option
):
    inputs, prefix = [two_sources / "books.jsonl", two_sources / "code.jsonl"], two_sources / "set"
    packing = FixedSegments(64)
    prepare(inputs, prefix, model_path, packing, split=split)
    with pytest.raises(ValueError, match=rf"set{suffix}\.json .* remove that set, pass {option}"):
        prepare(inputs, prefix, model_path, packing, overwrite=True)
    assert check_set(prefix) == check_set(f"{prefix}{suffix}") == []
    # One of this name that was made by itself stays.
    prepare(inputs, f"{prefix}{suffix}", model_path, WholeDocuments(), overwrite=True)
    prepare(inputs, prefix, model_path, packing, overwrite=True)
    Path(f"{prefix}{suffix}.json").write_text("[1]")  # and so does somebody's file
    prepare(inputs, prefix, model_path, packing, overwrite=True)


def test_equal_texts_are_never_divided_between_training_and_held_out(tmp_path, model_path):
    lines = [json.dumps({"text": make_text(k % 10, 20)}) + "\n" for k in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    split = Split(held_out=0.4, seed=2)
    prefix = tmp_path / "set"
    prepare([tmp_path / "a.jsonl"], prefix, model_path, WholeDocuments(), split=split)
    training, held = texts(prefix, model_path), texts(f"{prefix}_heldout", model_path)
    assert len(training) + len(held) == 200 and not set(training) & set(held)


def test_another_seed_holds_out_other_documents(two_sources, model_path):
    chosen = []
    for seed in (1, 2):
        prefix = two_sources / f"set{seed}"
        inputs, split = [two_sources / "code.jsonl"], Split(held_out=0.5, seed=seed)
        prepare(inputs, prefix, model_path, WholeDocuments(), split=split)
        chosen.append(set(texts(f"{prefix}_heldout", model_path)))
    assert chosen[0] != chosen[1]


def test_short_documents_go_beside_the_long_segments(two_sources, model_path):
    inputs = [two_sources / "books.jsonl", two_sources / "code.jsonl"]
    lengths = [len(load_tokenizer(model_path).encode(text)) for text in _texts(inputs)]
    prefix, window = two_sources / "set", 256
    split = Split(short=ShortDocuments(window, 8))
    manifest = prepare(inputs, prefix, model_path, FixedSegments(512, "pack"), split=split)
    short = read_manifest(f"{prefix}_short")
    assert short["segments"] == sum(length <= window - 2 for length in lengths) > 20
    assert short["mode"] == "short" and manifest["short_window"] == window
    assert {len(entry) for entry in read_documents(prefix)} == {512}
    assert check_set(prefix) == check_set(f"{prefix}_short") == []
    with pytest.raises(ValueError, match="goes with segments, not whole documents"):
        prepare(inputs, prefix, model_path, WholeDocuments(), split=split, overwrite=True)


def _texts(paths):
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]


def test_megatron_packs_short_documents_with_their_boundaries(two_sources, model_path):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    if not hasattr(GPTDatasetConfig, "inter_document_masking"):
        pytest.skip("this megatron-core has no inter-document masking")
    prefix, window, multiple, length = two_sources / "set", 128, 8, 512
    inputs = [two_sources / "books.jsonl", two_sources / "code.jsonl"]
    split = Split(short=ShortDocuments(window, multiple))
    prepare(inputs, prefix, model_path, FixedSegments(length, "pack"), split=split)
    tokenizer = load_tokenizer(model_path)

    def samples(data):
        cache, masking = two_sources / "cache", {"inter_document_masking": True}
        train = gpt_dataset(data, tokenizer, length, 4, cache, **masking)
        return [train[k] for k in range(4)]

    known = {entry.tobytes() for entry in read_documents(f"{prefix}_short")}
    for sample in samples(f"{prefix}_short"):
        offsets = sample["cu_seqlens"].unique()
        documents = sample["tokens"].numpy()
        sizes = offsets.diff()
        assert offsets[-1] == length and sizes.max() <= window and not (sizes % multiple).any()
        whole = [documents[a:b] for a, b in pairwise(offsets[1:-1])]
        # Only the first and the last may be cut by the end of the sample.
        assert len(whole) > 2 and all(item.tobytes() in known for item in whole)
    for sample in samples(prefix):  # a long segment is one document
        assert sample["cu_seqlens"].unique().tolist() == [0, length]


def test_a_mix_file_names_sources_relative_to_itself(two_sources):
    path = two_sources / "mix.json"
    books = {"paths": ["books.jsonl"], "weight": 2, "upsample_long": {"above": "4k", "factor": 3}}
    path.write_text(json.dumps({"books": books, "code": {"paths": ["code.jsonl"]}}))
    assert load_mix(path) == [
        source(two_sources, "books", weight=2, long_above=4096, long_factor=3),
        source(two_sources, "code"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not a mix"),
        ({"a": "x"}, "source 'a' is 'x'; give an object"),
        ({"a": {"paths": "x"}}, "paths is 'x'; give a list"),
        ({"a": {"paths": ["x"], "wieght": 2}}, "unknown key 'wieght'; known are paths, tex"),
        ({"a": {"paths": ["x"], "weight": 0}}, "weight is 0; it must be a number above 0"),
        ({"a": {"paths": ["x"], "weight": True}}, "weight is True"),
        ({"a": {"paths": ["x"], "upsample_long": {"above": 9}}}, "needs both above"),
        *(
            (
                {"a": {"paths": ["x"], "upsample_long": {"above": 9, "factor": 2, **wrong}}},
                rf"mix\.json: source 'a': upsample_long {message}",
            )
            for wrong, message in (
                ({"above": "x"}, "above: length 'x' is not a positive integer"),
                ({"factor": "two"}, "factor is 'two'; it must be a number above 0"),
            )
        ),
    ],
)
def test_a_mix_that_breaks_a_rule_is_refused(tmp_path, content, message):
    (tmp_path / "mix.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_mix(tmp_path / "mix.json")


def test_a_mix_in_which_a_name_stands_twice_is_refused(tmp_path):
    (tmp_path / "mix.json").write_text('{"a": {"paths": ["x"]}, "a": {"paths": ["y"]}}')
    with pytest.raises(ValueError, match=r"mix\.json: the key 'a' stands twice in one object"):
        load_mix(tmp_path / "mix.json")


def test_sources_that_contradict_each_other_are_refused(two_sources, model_path):
    books = source(two_sources, "books")
    other = Source("other", books.paths)
    with pytest.raises(ValueError, match="belongs to the sources 'books' and 'other'"):
        prepare([books, other], two_sources / "set", model_path, WholeDocuments())
    with pytest.raises(ValueError, match="held_out is 1"):
        Split(held_out=1.0)
    with pytest.raises(ValueError, match="is held out; raise --held-out"):
        prepare(
            [books], two_sources / "set", model_path, WholeDocuments(), split=Split(held_out=1e-9)
        )
