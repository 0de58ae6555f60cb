import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.data.segments import (
    FixedSegments,
    ShortDocuments,
    TokenizedDocument,
    WholeDocuments,
    length_bucket,
)

BOS, EOS = 1, 2


def numbered(lengths):
    """Documents whose tokens are all distinct and above the special ids."""
    starts = np.cumsum([3, *lengths])
    return [np.arange(n) + start for n, start in zip(lengths, starts, strict=False)]


def wrapped(documents):
    return map(TokenizedDocument, documents)


def arrange(length, tail, documents, joined=1, bos=BOS):
    return list(FixedSegments(length, tail, joined).arrange(wrapped(documents), bos, EOS))


lengths = st.lists(st.integers(0, 40), max_size=12)
segment_lengths = st.integers(3, 17)


@given(lengths, segment_lengths, st.sampled_from(("drop", "pad", "pack")))
def test_every_segment_has_exactly_s_tokens_between_bos_and_eos(lengths, length, tail):
    for segment in arrange(length, tail, numbered(lengths)):
        assert segment.shape == (length,) and segment.dtype == np.int64
        assert segment[0] == BOS and segment[-1] == EOS


@given(lengths, segment_lengths, st.sampled_from(("pad", "pack")))
def test_pad_and_pack_keep_every_token_once_and_each_document_in_order(lengths, length, tail):
    documents = numbered(lengths)
    segments = arrange(length, tail, documents)
    stored = np.concatenate([np.array([], dtype=np.int64), *segments])
    stored = stored[stored > EOS]
    assert sorted(stored) == list(range(3, 3 + sum(lengths)))
    for document in documents:
        assert list(stored[np.isin(stored, document)]) == list(document)


@given(lengths, segment_lengths, st.sampled_from(("drop", "pad", "pack")))
def test_without_bos_segments_are_text_and_eos_alone(lengths, length, tail):
    documents = numbered(lengths)
    segments = arrange(length, tail, documents, bos=None)
    stored = np.concatenate([np.array([], dtype=np.int64), *segments])
    for segment in segments:
        assert segment.shape == (length,) and segment[0] > EOS and segment[-1] == EOS
    assert BOS not in stored
    size = length - 1
    kept = [d[: len(d) // size * size] if tail == "drop" else d for d in documents]
    assert sorted(stored[stored > EOS]) == [n for document in kept for n in document]


@given(lengths, segment_lengths)
def test_drop_keeps_the_full_pieces_and_nothing_else(lengths, length):
    documents = numbered(lengths)
    size = length - 2
    expected = [
        [BOS, *document[start : start + size], EOS]
        for document in documents
        for start in range(0, len(document) - size + 1, size)
    ]
    assert [list(segment) for segment in arrange(length, "drop", documents)] == expected


@given(lengths, segment_lengths)
def test_packed_pieces_each_stand_between_their_own_bos_and_eos(lengths, length):
    documents = numbered(lengths)
    owner = {int(token): k for k, document in enumerate(documents) for token in document}
    for segment in map(list, arrange(length, "pack", documents)):
        for here, after in itertools.pairwise(segment):
            if here > EOS and after > EOS:
                assert owner[here] == owner[after]
            assert not (here == BOS and after <= EOS)  # no empty piece
            assert not (here > EOS and after == BOS)


def test_tails_of_two_documents_by_hand():
    documents = [np.array([11, 12, 13, 14, 15, 16, 17]), np.array([21, 22, 23])]
    first = [1, 11, 12, 13, 14, 15, 16, 2]
    as_lists = {
        tail: [list(segment) for segment in arrange(8, tail, documents)]
        for tail in ("drop", "pad", "pack")
    }
    assert as_lists == {
        "drop": [first],
        "pad": [first, [1, 17, 2, 2, 2, 2, 2, 2], [1, 21, 22, 23, 2, 2, 2, 2]],
        "pack": [first, [1, 17, 2, 1, 21, 22, 23, 2]],
    }


def test_tail_that_does_not_fit_goes_on_behind_a_new_bos():
    documents = [np.array([11, 12]), np.array([21, 22, 23])]
    assert [list(segment) for segment in arrange(7, "pack", documents)] == [
        [1, 11, 12, 2, 1, 21, 2],
        [1, 22, 23, 2, 2, 2, 2],
    ]


@given(lengths, segment_lengths, st.sampled_from(("drop", "pad", "pack")), st.integers(1, 4))
def test_joined_entries_are_the_segments_in_groups(lengths, length, tail, joined):
    documents = numbered(lengths)
    segments = arrange(length, tail, documents)
    full = len(segments) // joined * joined
    entries = arrange(length, tail, documents, joined)
    assert [len(entry) for entry in entries] == [length * joined] * (full // joined)
    parts = [part for entry in entries for part in np.split(entry, joined)]
    assert [list(part) for part in parts] == [list(segment) for segment in segments[:full]]


def test_short_documents_stand_alone_filled_to_the_multiple_and_long_ones_are_left_out():
    packing = ShortDocuments(window=8, multiple=4)
    documents = numbered([2, 3, 0, 6, 7])
    assert [list(entry) for entry in packing.arrange(wrapped(documents), BOS, EOS)] == [
        [1, *documents[0], 2],
        [1, *documents[1], 2, 2, 2, 2],
        [1, *documents[3], 2],
    ]


def test_whole_documents_are_filtered_truncated_and_limited():
    documents = numbered([5, 2, 9, 4, 7])
    packing = WholeDocuments(min_length=4, max_length=6, max_documents=3)
    kept = list(packing.arrange(wrapped(documents), None, None))
    assert [list(item) for item in kept] == [
        list(documents[0]),
        list(documents[2][:6]),
        list(documents[3]),
    ]


def test_whole_documents_stop_reading_at_the_limit():
    stream = wrapped(numbered([5, 5, 5]))
    list(WholeDocuments(max_documents=2).arrange(stream, None, None))
    assert len(list(stream)) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedSegments(2), "segment_length is 2; .* at least 3"),
        (lambda: ShortDocuments(20, 16), "window 20 must be .* multiple of 16"),
        (lambda: WholeDocuments(8, 4), "max_length 4 is below min_length 8"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_length_buckets_are_powers_of_two():
    assert [length_bucket(n) for n in (0, 1, 2, 3, 4, 1023, 1024)] == [0, 1, 2, 2, 4, 512, 1024]
