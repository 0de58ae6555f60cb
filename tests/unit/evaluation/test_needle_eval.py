"""Needle samples: exact lengths, needles on lines of their own, and scores of the numbers alone."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import (
    BOS,
    CharacterTokenizer,
    ForgetfulTokenizer,
    MergingTokenizer,
    SpaceTokenizer,
    save_fast,
    train_byte_level,
)

from megatron_longrope.data.needle_prompt import encode_within
from megatron_longrope.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_longrope.evaluation.needle_sample import TASKS, make_sample, score
from megatron_longrope.evaluation.needle_text import INSTRUCTION, needle_text, question_text


def prose(seed: int, sentences: int) -> str:
    """Sentences of known words, in paragraphs of several lines."""
    rng = random.Random(seed)
    words = ["the", "old", "mill", "river", "clock", "lamp", "was", "found", "near", "and", "dark"]
    text = "Café “Zénith”\n\n"
    for _ in range(sentences):
        picked = [rng.choice(words) for _ in range(rng.randint(3, 12))]
        text += " ".join(picked).capitalize() + rng.choice([".", ".", "?", "!", '."'])
        text += rng.choice([" ", " ", " ", "\n", "\n", "\n\n", "\n\n    ", "  "])
    return text.strip() + " The end of it"


TEXTS = [prose(seed, 400) for seed in range(3)]
CODE = "".join(
    f"def f{k}(x):\n    # Double it. Then go.\n    return x * {k}\n\n\n" for k in range(300)
)


CHARACTERS = CharacterTokenizer()


class CommaTokenizer(CharacterTokenizer):
    """Joins a comma to the digit before it."""

    def encode(self, text):
        ids = []
        for character in text:
            if ids and character == "," and chr(ids[-1]).isdigit():
                ids[-1] += 2**17
            else:
                ids.append(ord(character))
        return ids


class ShoutingTokenizer(CharacterTokenizer):
    """Forgets case."""

    def encode(self, text):
        return super().encode(text.upper())


def train_sentencepiece_model(path, dummy_prefix):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join([*TEXTS, CODE]).split("\n")),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    return SentencePieceTokenizer(path)


def byte_level(folder):
    inner = train_byte_level([*TEXTS, CODE], 600, ("<unk>", "<s>"))
    return HuggingFaceTokenizer(save_fast(inner, folder, eos_token=None))


KINDS = ("sentencepiece", "dummy_prefix", "byte_level", "characters")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": train_sentencepiece_model(folder / "plain.model", False),
        "dummy_prefix": train_sentencepiece_model(folder / "dummy.model", True),
        "byte_level": byte_level(folder / "byte_level"),
        "characters": CHARACTERS,
    }


def encoded(text, tokenizer=CHARACTERS):
    return np.array(tokenizer.encode(text))


BOOK = encoded(TEXTS[0])


def sample_of(task="single", length=900, document=BOOK, tokenizer=CHARACTERS, **changes):
    arguments = {"bos_id": BOS, "depth": 0.5, "seed": 0, "trial": 0, **changes}
    return make_sample(task, document, tokenizer, length, **arguments)


def is_exact(sample, tokenizer, document, length, depth):
    """What every sample promises, whatever was asked."""
    ids = sample.tokens[0].tolist()
    assert sample.tokens.shape == (1, length) and sample.tokens.dtype == torch.int64
    assert ids[0] == BOS and BOS not in ids[1:]
    whole = tokenizer.decode(ids[1:])
    # The answer is the end, and its spans are the numbers.
    numbers = [str(value) for value in sample.values[: len(sample.spans)]]
    assert whole.endswith(" " + ", ".join(numbers))
    answer = ids[-sample.num_answer_tokens :]
    for span, number in zip(sample.spans, numbers, strict=True):
        assert tokenizer.decode(answer[span]).strip() == number
        assert tokenizer.decode(answer[span][:1]).strip()
    # Each needle is a line, and without them the document's tokens are as they were.
    for position, key, value in sorted(
        zip(sample.positions, sample.keys, sample.values, strict=True), reverse=True
    ):
        assert whole.count(needle_text(key, value)) == 1
        needle = encode_within(tokenizer, needle_text(key, value))
        assert ids[position : position + len(needle)] == needle
        del ids[position : position + len(needle)]
    begin = [BOS, *tokenizer.encode(INSTRUCTION)]
    question = encode_within(tokenizer, question_text(sample.keys[: len(sample.spans)]))
    used = len(ids) - len(begin) - len(question) - len(answer)
    assert ids == [*begin, *document[:used], *question, *answer]
    assert abs(sample.depths[0] - depth) * used <= 64.5  # rounded to a token, then up to 64 on
    assert all(0 <= share <= 1 for share in sample.depths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS[:1], CODE], ids=["prose", "code"])
def test_samples_are_exact_and_needles_are_lines_near_their_depths(kind, text, tokenizers):
    tokenizer = tokenizers[kind]
    document = encoded(text, tokenizer)

    @settings(max_examples=25)
    @given(
        task=st.sampled_from(TASKS),
        depth=st.floats(0, 1),
        seed=st.integers(0, 2**40),
        needles=st.integers(2, 6),
        data=st.data(),
    )
    def check(task, depth, seed, needles, data):
        asked = data.draw(st.integers(2, needles))
        # As many tokens as the sample's length are always enough.
        length = data.draw(st.integers(1500, min(4000, len(document))))
        chosen = {"depth": depth, "seed": seed, "num_needles": needles, "num_queries": asked}
        sample = sample_of(task, length, document, tokenizer, **chosen)
        assert len(sample.keys) == (1 if task == "single" else needles)
        assert len(sample.spans) == (asked if task == "multi_query" else 1)
        is_exact(sample, tokenizer, document, length, depth)

    check()


def test_needles_stand_at_different_ends_of_lines():
    sample = sample_of("multi_key", 12000, encoded(CODE), num_needles=40, depth=0.0)
    assert sample.depths[0] == 0 and len(set(sample.depths)) == 40
    text = CHARACTERS.decode(sample.tokens[0].tolist())
    for key, value in zip(sample.keys, sample.values, strict=True):
        assert text.split(needle_text(key, value))[0].endswith("\n")


def test_no_space_is_added_where_a_tokenizer_begins_with_one(tokenizers):
    tokenizer = tokenizers["dummy_prefix"]
    assert tokenizer.decode([BOS, *tokenizer.encode("a b")]) == "a b"
    joined = tokenizer.encode("One.") + tokenizer.encode("\nTwo.")
    assert tokenizer.decode(joined) == "One. \nTwo."
    joined = tokenizer.encode("One.") + encode_within(tokenizer, "\nTwo.")
    assert tokenizer.decode(joined) == "One.\nTwo."


def test_the_arguments_alone_decide_a_sample():
    def sample(**changes):
        return sample_of(**{"task": "multi_query", "length": 3000, "depth": 0.25, **changes})

    a, b = sample(), sample()
    assert a.tokens.equal(b.tokens) and a.values == b.values and a.spans == b.spans
    for changes in (
        {"seed": 1},
        {"trial": 1},
        {"length": 3001},
        {"depth": 0.5},
        {"task": "single"},
    ):
        assert not set(sample(**changes).values) & set(a.values)
    assert sample(depth=0.0).values != sample(depth=0.0, trial=1).values


@given(seed=st.integers(0, 2**40), task=st.sampled_from(["multi_key", "multi_query"]))
def test_no_distractor_has_the_object_or_the_number_asked_for(seed, task):
    sample = sample_of(task, 4000, seed=seed, num_needles=40)
    assert len(set(sample.keys)) == len(set(sample.values)) == 40
    assert all(1_000_000 <= value <= 9_999_999 for value in sample.values)
    assert all(len(key.split()) == 2 for key in sample.keys)


def test_the_questions_read_as_intended():
    def question(task, **changes):
        sample = sample_of(task, 3000, **changes)
        text = CHARACTERS.decode(sample.tokens[0].tolist())
        return sample, text[text.index("According") :]

    for task in ("single", "multi_key"):
        sample, text = question(task)
        key, value = sample.keys[0], sample.values[0]
        assert text == f"According to a sentence in them, the {key} is kept in locker {value}"
    sample, text = question("multi_query", num_queries=3)
    (a, b, c, _), (x, y, z, _) = sample.keys, sample.values
    assert text == (
        f"According to sentences in them, the {a}, the {b} and the {c} are kept, in this order, "
        f"in the lockers {x}, {y}, {z}"
    )


def test_a_separate_space_is_no_part_of_a_number_but_a_joined_one_is():
    apart = sample_of("multi_query", 3000)
    assert apart.num_answer_tokens == 17 and apart.spans == (slice(1, 8), slice(10, 17))
    joined = sample_of("multi_query", 3000, tokenizer=SpaceTokenizer())
    assert joined.num_answer_tokens == 15 and joined.spans == (slice(0, 7), slice(8, 15))


@pytest.fixture(scope="module")
def asked():
    return sample_of("multi_query", 3000)


def test_perfect_answers_score_one_and_losses_are_those_of_the_numbers(asked):
    answer = asked.tokens[0, -17:].tolist()
    nll = [100.0, *[0.5] * 7, 100.0, 100.0, *[1.5] * 7]
    for predicted in (answer, [*answer, 7]):  # with and without the successor of the last
        assert score(asked, predicted, nll) == (1.0, 1.0)


@given(wrong=st.sets(st.integers(0, 16)), seed=st.integers(0, 99))
def test_a_number_counts_when_all_its_tokens_are_chosen(asked, wrong, seed):
    predicted = [
        token + (index in wrong) for index, token in enumerate(asked.tokens[0, -17:].tolist())
    ]
    nll = np.random.default_rng(seed).random(17)
    recall, loss = score(asked, predicted, nll.tolist())
    # Tokens 0, 8 and 9 are the spaces and the comma.
    first, second = set(range(1, 8)), set(range(10, 17))
    assert recall == ((not first & wrong) + (not second & wrong)) / 2
    assert math.isclose(loss, nll[sorted(first | second)].mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length 0 is too short"),
        ({"length": 60}, r"length 60 is too short .* needs \d+ tokens besides .* at least \d+"),
        ({"length": 10**6}, r"the document has \d+ tokens; .* 1000000 tokens needs 999\d+"),
        ({"task": "multi_key", "num_needles": 1}, "num_needles is 1; multi_key takes 2 to 768"),
        ({"task": "multi_query", "num_queries": 5}, r"num_queries is 5; .* num_needles \(4\)"),
        ({"task": "multi_query", "num_queries": 1}, "num_queries is 1"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        sample_of(**changes)


def test_the_least_length_that_an_error_names_is_enough():
    with pytest.raises(ValueError, match="at least") as refused:
        sample_of(length=60)
    least = int(str(refused.value).split()[-1])
    assert sample_of(length=least, depth=0.0).depths == (0.0,)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MergingTokenizer, "merges '.*' with what"),
        (ForgetfulTokenizer, "keeps digits"),
        (CommaTokenizer, "merges the end of"),
        (ShoutingTokenizer, "keeps text as it is"),
    ],
)
def test_a_tokenizer_that_cannot_hold_question_and_answer_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        sample_of("multi_query", 3000, tokenizer=kind())


def test_a_tokenizer_without_bos_begins_with_the_instruction():
    sample = sample_of(length=2000, bos_id=None)
    assert sample.tokens.shape == (1, 2000)
    assert CHARACTERS.decode(sample.tokens[0].tolist()).startswith(INSTRUCTION)
