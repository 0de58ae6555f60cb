"""Sentence ends are learned from the texts, and stand where a new sentence may begin."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.evaluation.ruler import sentences
from megatron_longrope.evaluation.ruler.sentences import iterate_sentence_ends, train_splitter

PROSE = "\n".join(
    f"Dr. {name} met Mrs. {other} in the {place}. They spoke about the {thing}, which was {how}. "
    f'"Where is it?" asked Dr. {name}! Nobody knew.'
    for name, other in (("Hill", "Stone"), ("Ward", "Bell"), ("Lane", "Marsh"))
    for place, thing in (("garden", "old clock"), ("kitchen", "broken lamp"), ("mill", "river"))
    for how in ("late", "gone", "small", "loud")
)
# Short words that are only ever met before a full stop would be taken for abbreviations.
PROSE += "\nLate or gone, small or loud: nobody knew him there." * 3


@pytest.fixture(scope="module")
def splitter():
    return train_splitter([PROSE])


def parts(text, splitter):
    ends = list(iterate_sentence_ends(text, splitter))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_abbreviations_are_learned_from_the_texts(splitter):
    text = "Then Dr. Ward came home. He saw Mrs. Bell there."
    assert parts(text, splitter) == ["Then Dr. Ward came home.", " He saw Mrs. Bell there."]
    plain = train_splitter(["Doctors met in the garden. They spoke about the clock."])
    assert parts(text, plain)[0] == "Then Dr."


def test_quotes_belong_to_the_sentence_they_close(splitter):
    text = 'He asked: "Where is it?" Nobody knew. (It was gone.) They left.'
    assert parts(text, splitter) == [
        'He asked: "Where is it?"',
        " Nobody knew.",
        " (It was gone.)",
        " They left.",
    ]


@pytest.mark.parametrize("text", ["one two three", "x = os.path y = 1.5", "One sentence only."])
def test_a_text_may_have_no_place(text, splitter):
    assert list(iterate_sentence_ends(text, splitter)) == []


@settings(max_examples=150)
@given(pieces=st.lists(st.sampled_from(["a", "Bc", ". ", ".", "? ", ' "', " "])))
def test_every_end_has_text_before_it_and_white_space_and_text_behind_it(splitter, pieces):
    text = "".join(pieces).strip()
    ends = list(iterate_sentence_ends(text, splitter))
    assert ends == sorted(set(ends))
    for end in ends:
        assert not text[end - 1].isspace() and text[end].isspace()
        assert text[:end].strip() and text[end:].strip()


def test_a_long_text_is_split_like_its_parts(splitter, monkeypatch):
    whole = set(iterate_sentence_ends(PROSE, splitter))
    monkeypatch.setattr(sentences, "_PIECE", 700)
    pieced = set(iterate_sentence_ends(PROSE, splitter))
    # A piece may end at a sentence's end, which is then not seen as one.
    assert pieced < whole and len(whole - pieced) <= len(PROSE) // 600


def test_text_without_white_space_ends_nowhere_and_does_not_loop(splitter, monkeypatch):
    monkeypatch.setattr(sentences, "_PIECE", 50)
    assert list(iterate_sentence_ends("a.b" * 1000, splitter)) == []


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\n\n"]])
def test_nothing_to_learn_from_is_refused(texts):
    with pytest.raises(ValueError, match=f"{len(texts)} texts hold no word"):
        train_splitter(texts)


@pytest.mark.slow  # a process of its own, with other hashes than this one has
def test_every_process_learns_the_same():
    # Ranks compute on their own what they must agree on, and sets have another order in each.
    script = (
        "import sys; from megatron_longrope.evaluation.ruler.sentences import *\n"
        "text = sys.stdin.read(); print([*iterate_sentence_ends(text, train_splitter([text]))])"
    )
    ours = [*iterate_sentence_ends(PROSE, train_splitter([PROSE]))]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=PROSE,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{ours}\n" and len(ours) > 100
