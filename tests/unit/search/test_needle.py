"""Needle samples are exactly as long as asked for, and exactly their answers are scored."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import make_text
from toy_tokenizers import BOS, CharacterTokenizer
from train_tokenizer import train_sentencepiece

from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.factor_search.needle import needle_samples

hidden = partial(needle_samples, bos_id=BOS, depths=[0.5])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_sentencepiece((make_text(seed, 100) for seed in range(20)), path, 340)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return [np.array(tokenizer.encode(make_text(seed, 4000))) for seed in range(3)]


def characters(text) -> np.ndarray:
    return np.array([ord(character) for character in text])


def check_samples(samples, tokenizer, length):
    """What every sample promises."""
    k = len(samples.numbers)
    assert samples.tokens.shape == (k, length) and samples.tokens.dtype == torch.int64
    assert samples.scored.shape == (k, length - 1) and samples.scored.dtype == torch.bool
    assert len(set(samples.numbers)) == k
    for row in range(k):
        ids, number = samples.tokens[row], str(samples.numbers[row])
        assert len(number) == 7 and ids[0] == BOS and (ids[1:] != BOS).all()
        text = tokenizer.decode(ids[1:].tolist())
        assert text.count(number) == 2 and text.endswith(f" {number}")
        assert text.count(f"\nThe registration number of the lighthouse is {number}.\n") == 1
        # Exactly the answer is scored: the targets in question are the last tokens, the number.
        targets = ids[1:][samples.scored[row]]
        assert tokenizer.decode(targets.tolist()).strip() == number
        assert tokenizer.decode(targets[:1].tolist()).strip()  # no space that stands alone
        answer = len(targets)
        assert samples.scored[row, -answer:].all() and not samples.scored[row, :-answer].any()
        of_text = tokenizer.decode(ids[1:][samples.text[row]].tolist())
        assert number not in of_text and "lighthouse" not in of_text
        assert not (samples.text[row] & samples.scored[row]).any()
        needle = tokenizer.decode(ids[samples.positions[row] :].tolist())
        assert needle.startswith("\nThe registration number of the lighthouse is")


def test_every_sample_has_the_length_the_needle_and_a_scored_answer(tokenizer, documents):
    @settings(max_examples=40, deadline=None)
    @given(
        length=st.integers(400, 2000),
        depths=st.lists(st.floats(0, 1), min_size=1, max_size=5),
        seed=st.integers(0, 2**32),
    )
    def check(length, depths, seed):
        samples = hidden(documents, tokenizer, length, depths=depths, seed=seed)
        check_samples(samples, tokenizer, length)
        count = max(len(depths), len(documents))
        assert samples.depths == tuple(depths[row % len(depths)] for row in range(count))

    check()


def test_a_needle_at_depth_0_stands_before_all_of_the_document(tokenizer, documents):
    samples = hidden(documents, tokenizer, 1500, depths=(0.0, 0.5, 1.0))
    assert list(samples.positions) == sorted(samples.positions)
    text = tokenizer.decode(samples.tokens[0, 1 : samples.positions[0]].tolist())
    assert text.endswith("asked for after the last line.\n")  # nothing of the document yet


def test_more_depths_than_documents_use_each_document_again(tokenizer, documents):
    depths = (0, 0.25, 0.5, 0.75)
    samples = hidden(documents[:2], tokenizer, 900, depths=depths)
    assert samples.tokens.shape[0] == 4 and samples.depths == depths


def placed(text: str, depth: float) -> str:
    """The 20 characters before the needle."""
    tokenizer = CharacterTokenizer()
    length = needle_length(text)
    samples = hidden([characters(text)], tokenizer, length, depths=[depth])
    at = samples.positions[0]
    return tokenizer.decode(samples.tokens[0, at - 20 : at].tolist())


def needle_length(text: str) -> int:
    """Length of a sample that holds all of the text."""
    for length in range(len(text), len(text) + 1000):
        try:
            hidden([characters(text)], CharacterTokenizer(), length + 1)
        except ValueError as error:
            if f"has {len(text)} tokens" in str(error):
                return length
    raise AssertionError


def test_a_needle_stands_at_the_nearest_end_of_a_line():
    text = "word " * 20 + "end\n" + "word. " * 20 + "\n" + "word. " * 30
    assert placed(text, 100 / len(text)).endswith("end\n")


def test_a_needle_stands_at_the_end_of_a_sentence_where_no_line_ends():
    assert placed("word " * 40 + "stop. " + "3.5 words " * 40, 210 / 606).endswith("stop.")


def test_a_needle_stands_at_its_exact_depth_where_nothing_ends():
    before = placed("abcdefghij" * 40, 0.5)
    assert before == "abcdefghij" * 2


def test_the_same_seed_gives_the_same_samples(tokenizer, documents):
    a, b, c = (hidden(documents, tokenizer, 700, seed=seed) for seed in (3, 3, 4))
    assert a.tokens.equal(b.tokens) and a.numbers == b.numbers != c.numbers


def test_the_description_is_plain_json_without_tensors(tokenizer, documents):
    samples = hidden(documents, tokenizer, 700)
    text = json.loads(json.dumps(samples.describe()))
    assert text["numbers"] == list(samples.numbers) and "{number}" in text["needle"]


def test_a_document_that_is_too_short_is_named_with_its_tokens(tokenizer, documents):
    short = [documents[0], documents[1][:500]]
    with pytest.raises(ValueError, match=r"document 1 has 500 tokens; .* of 2000 tokens needs 1"):
        hidden(short, tokenizer, 2000)


def test_tokens_of_another_tokenizer_are_refused(tokenizer):
    with pytest.raises(ValueError, match="document 0 holds token 5000, the tokenizer has 340"):
        hidden([np.full(900, 5000)], tokenizer, 900)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": [0.5, 1.5]}, r"depths\[1\] is 1.5"),
        ({"depths": [float("nan")]}, r"depths\[0\] is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        hidden([characters("a b\n" * 300)], CharacterTokenizer(), 900, **arguments)
