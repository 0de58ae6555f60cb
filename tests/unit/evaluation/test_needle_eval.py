"""Needle samples: exact lengths, needles between sentences, and scores of the numbers alone."""

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

from megatron_longrope.data.answers import encode_within
from megatron_longrope.data.sentences import iterate_sentence_ends, train_splitter
from megatron_longrope.data.sources import Document
from megatron_longrope.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_longrope.evaluation.haystack import NeedleDocument
from megatron_longrope.evaluation.needle_sample import (
    TASKS,
    make_sample,
    prepare_documents,
    score,
)
from megatron_longrope.evaluation.needle_text import INSTRUCTION, needle_text

# How GPT-2 and Llama 3 cut text before they merge; the second keeps ".\n\n" together.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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


def byte_level(folder, words):
    inner = train_byte_level([*TEXTS, CODE], 600, ("<unk>", "<s>"), words)
    return HuggingFaceTokenizer(save_fast(inner, folder, eos_token=None))


KINDS = ("sentencepiece", "dummy_prefix", "gpt2", "llama3", "characters")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": train_sentencepiece_model(folder / "plain.model", False),
        "dummy_prefix": train_sentencepiece_model(folder / "dummy.model", True),
        "gpt2": byte_level(folder / "gpt2", GPT2),
        "llama3": byte_level(folder / "llama3", LLAMA3),
        "characters": CharacterTokenizer(),
    }


@pytest.fixture(scope="module")
def splitter():
    return train_splitter([*TEXTS, CODE])


@pytest.fixture(scope="module")
def haystack(tokenizers, splitter):
    """Encoded documents by kind of tokenizer and text, each encoded once."""
    done = {}

    def of(kind, text):
        if (kind, text) not in done:
            tokenizer = tokenizers[kind]
            done[kind, text] = NeedleDocument.encode(text, splitter, tokenizer, 10**9, "a book")
        return done[kind, text]

    return of


def sample_of(document, tokenizer, task="single", length=900, **changes):
    arguments = {"bos_id": BOS, "depth": 0.5, "seed": 0, "trial": 0, **changes}
    return make_sample(task, document, tokenizer, length, **arguments)


def is_exact(sample, tokenizer, text, length, ends):
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
    # Without the needles the text is the document's, and each stood at the end of a sentence.
    rest, at, removed = whole.removeprefix(INSTRUCTION), 0, len(INSTRUCTION)
    assert len(rest) == len(whole) - len(INSTRUCTION)
    for j in sorted(range(len(sample.keys)), key=sample.positions.__getitem__):
        needle = needle_text(sample.keys[j], sample.values[j])
        found = rest.index(needle, at)
        at = len(tokenizer.decode(ids[1 : sample.positions[j]])) - removed
        before, behind = rest[:at], rest[found + len(needle) :]
        if found == at:  # at the beginning of a line, which the needle then ends
            assert before[-1:] in ("", "\n") and behind[:1] == "\n"
            behind = behind[1:]
        else:
            assert rest[at:found] in (" ", "\n") and behind[:1].isspace()
        assert text.startswith(before) and (not before or len(before.rstrip()) in ends)
        rest, removed = before + behind, removed + len(rest) - len(before + behind)
    document = rest[: rest.index("\n\nThe pages end here.")]
    # The cut may have gone through a character.
    assert text.startswith(document.rstrip("\ufffd")) and len(document) >= at


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_exact_and_needles_stand_between_sentences(
    kind, tokenizers, haystack, splitter
):
    ends = [set(iterate_sentence_ends(text, splitter)) for text in (*TEXTS, CODE.strip())]

    @settings(max_examples=25)
    @given(
        task=st.sampled_from(TASKS),
        which=st.integers(0, 3),
        depth=st.floats(0, 1),
        seed=st.integers(0, 2**40),
        needles=st.integers(2, 6),
        data=st.data(),
    )
    def check(task, which, depth, seed, needles, data):
        text = (*TEXTS, CODE)[which].strip()
        asked = data.draw(st.integers(2, needles))
        document = haystack(kind, text)
        # As many tokens as the sample's length are always enough.
        length = data.draw(st.integers(1500, min(4000, len(document.tokens))))
        chosen = {"depth": depth, "seed": seed, "num_needles": needles, "num_queries": asked}
        sample = sample_of(document, tokenizers[kind], task, length, **chosen)
        assert len(sample.keys) == (1 if task == "single" else needles)
        assert len(sample.spans) == (asked if task == "multi_query" else 1)
        is_exact(sample, tokenizers[kind], text, length, ends[which])

    check()


@settings(max_examples=60)
@given(length=st.integers(1000, 12000), depth=st.floats(0, 1), task=st.sampled_from(TASKS))
def test_the_first_needle_asked_for_stands_at_the_place_nearest_to_its_depth(
    haystack, length, depth, task
):
    document = haystack("characters", TEXTS[0])
    sample = sample_of(document, CharacterTokenizer(), task, length, depth=depth)
    needles = [needle_text(*locker) for locker in zip(sample.keys, sample.values, strict=True)]
    question = CharacterTokenizer().decode(sample.tokens[0].tolist()).index("\n\nThe pages end")
    # Every needle has one character of white space here.
    used = question - 1 - len(INSTRUCTION) - sum(map(len, needles)) - len(needles)
    usable = document.places[document.places <= used]
    best = usable[np.abs(usable - depth * used).argmin()]
    assert sample.depths[0] == best / used
    assert all(depth in usable / used for depth in sample.depths)
    assert len(set(sample.depths)) == len(sample.keys)


def test_depth_0_is_before_the_document_and_depth_1_its_last_place(tokenizers, haystack):
    document, tokenizer = haystack("gpt2", TEXTS[0]), tokenizers["gpt2"]
    first, last = (sample_of(document, tokenizer, depth=depth) for depth in (0, 1))
    assert first.depths == (0.0,) and 0.9 < last.depths[0] <= 1
    assert tokenizer.decode(first.tokens[0, 1 : first.positions[0]].tolist()) == INSTRUCTION


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXTS[0], CODE.strip()], ids=["prose", "code"])
def test_encoding_by_sentences_gives_the_tokens_of_the_whole_text(kind, text, tokenizers, haystack):
    document = haystack(kind, text)
    assert document.tokens.tolist() == encode_within(tokenizers[kind], text)
    assert tokenizers[kind].decode(document.tokens.tolist()) == text


def test_a_full_stop_that_is_merged_with_line_breaks_stays_so(tokenizers, haystack):
    # Both are met: needles behind white space here, before it there.
    assert "\n{}" in haystack("gpt2", TEXTS[0]).forms
    assert "\n{}" not in haystack("llama3", TEXTS[0]).forms
    assert haystack("llama3", TEXTS[0]).forms.count("{}\n") > 50


def test_no_space_is_added_where_a_tokenizer_begins_with_one(tokenizers):
    tokenizer = tokenizers["dummy_prefix"]
    assert tokenizer.decode([BOS, *tokenizer.encode("a b")]) == "a b"
    joined = tokenizer.encode("One.") + tokenizer.encode("\nTwo.")
    assert tokenizer.decode(joined) == "One. \nTwo."
    joined = tokenizer.encode("One.") + encode_within(tokenizer, "\nTwo.")
    assert tokenizer.decode(joined) == "One.\nTwo."


def test_only_as_many_sentences_are_encoded_as_needed(tokenizers, splitter, haystack):
    tokenizer, whole = tokenizers["gpt2"], haystack("gpt2", TEXTS[0])
    part = NeedleDocument.encode(TEXTS[0], splitter, tokenizer, 500, "")
    assert 500 <= len(part.tokens) < 600
    assert part.tokens.tolist() == whole.tokens[: len(part.tokens)].tolist()
    assert part.places.tolist() == whole.places[: len(part.places)].tolist()
    assert part.forms == whole.forms[: len(part.forms)]
    assert part.sha256(500) == whole.sha256(500) != whole.sha256(501)
    ours, theirs = (sample_of(document, tokenizer, length=500) for document in (part, whole))
    assert ours.tokens.equal(theirs.tokens)


def test_the_hash_of_a_document_knows_its_places(splitter):
    text, tokenizer = "Mr. Hill came. He went. He came back.", CharacterTokenizer()
    once, again, other = (
        NeedleDocument.encode(text, used, tokenizer, 99, "")
        for used in (splitter, splitter, train_splitter(["Mr. Hill, Mr. Bell and Mr. Ward. " * 9]))
    )
    assert once.tokens.tolist() == other.tokens.tolist() and len(once.places) > len(other.places)
    assert once.sha256(99) == again.sha256(99) != other.sha256(99)


def test_the_arguments_alone_decide_a_sample(haystack):
    document, tokenizer = haystack("characters", TEXTS[0]), CharacterTokenizer()

    def sample(**changes):
        arguments = {"task": "multi_query", "length": 3000, "depth": 0.25, **changes}
        return sample_of(document, tokenizer, **arguments)

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
def test_no_distractor_has_the_object_or_the_number_asked_for(haystack, seed, task):
    document = haystack("characters", TEXTS[0])
    sample = sample_of(document, CharacterTokenizer(), task, 4000, seed=seed, num_needles=40)
    assert len(set(sample.keys)) == len(set(sample.values)) == 40
    assert all(1_000_000 <= value <= 9_999_999 for value in sample.values)
    assert all(len(key.split()) == 2 for key in sample.keys)


def test_the_questions_read_as_intended(haystack):
    document, tokenizer = haystack("characters", TEXTS[0]), CharacterTokenizer()

    def question(task, **changes):
        sample = sample_of(document, tokenizer, task, 3000, **changes)
        text = tokenizer.decode(sample.tokens[0].tolist())
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


def test_a_separate_space_is_no_part_of_a_number_but_a_joined_one_is(haystack, splitter):
    apart = sample_of(haystack("characters", TEXTS[0]), CharacterTokenizer(), "multi_query", 3000)
    assert apart.num_answer_tokens == 17 and apart.spans == (slice(1, 8), slice(10, 17))
    document = NeedleDocument.encode(TEXTS[0], splitter, SpaceTokenizer(), 10**6, "")
    joined = sample_of(document, SpaceTokenizer(), "multi_query", 3000)
    assert joined.num_answer_tokens == 15 and joined.spans == (slice(0, 7), slice(8, 15))


@pytest.fixture(scope="module")
def asked(haystack):
    return sample_of(haystack("characters", TEXTS[0]), CharacterTokenizer(), "multi_query", 3000)


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
        ({"task": "double"}, "task is 'double'; it must be one of single, multi_key, multi_query"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"depth": math.nan}, "depth is nan"),
        ({"length": 0}, "length 0 is too short"),
        ({"length": 60}, r"length 60 is too short .* needs \d+ tokens besides .* at least \d+"),
        ({"length": 10**6}, r"document a book has \d+ tokens; .* 1000000 tokens needs 999\d+"),
        ({"task": "multi_key", "num_needles": 1}, "num_needles is 1; multi_key takes 2 to 768"),
        ({"task": "multi_query", "num_queries": 5}, r"num_queries is 5; .* num_needles \(4\)"),
        ({"task": "multi_query", "num_queries": 1}, "num_queries is 1"),
        ({"task": "multi_key", "num_needles": 80, "length": 4100}, "too few for 80 needles"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(haystack, changes, message):
    document = haystack("characters", TEXTS[0])
    with pytest.raises(ValueError, match=message):
        sample_of(document, CharacterTokenizer(), **changes)


def test_the_least_length_that_an_error_names_is_enough(haystack):
    document, tokenizer = haystack("characters", TEXTS[0]), CharacterTokenizer()
    with pytest.raises(ValueError, match="at least") as refused:
        sample_of(document, tokenizer, length=60)
    least = int(str(refused.value).split()[-1])
    assert sample_of(document, tokenizer, length=least).depths == (0.0,)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MergingTokenizer, "merges '.*' with what"),
        (ForgetfulTokenizer, "keeps digits"),
        (CommaTokenizer, "merges the end of"),
        (ShoutingTokenizer, "keeps text as it is"),
    ],
)
def test_a_tokenizer_that_cannot_hold_question_and_answer_is_refused(kind, message, splitter):
    with pytest.raises(ValueError, match=message):
        document = NeedleDocument.encode(TEXTS[0], splitter, kind(), 10**6, "")
        sample_of(document, kind(), "multi_query", 3000)


def test_an_empty_document_is_refused(splitter):
    with pytest.raises(ValueError, match=r"document d\.jsonl:3 is empty"):
        NeedleDocument.encode(" \n", splitter, CharacterTokenizer(), 10, "d.jsonl:3")


def test_a_document_without_sentences_has_its_beginning_only(splitter):
    text = "word " * 400
    document = NeedleDocument.encode(text, splitter, CharacterTokenizer(), 10**6, "d")
    assert document.places.tolist() == [0]
    assert sample_of(document, CharacterTokenizer(), depth=1.0).depths == (0.0,)
    with pytest.raises(ValueError, match="document d has 1 places between sentences"):
        sample_of(document, CharacterTokenizer(), "multi_key", 1500)


def documents(*texts):
    return [Document(f"d.jsonl:{line}", text) for line, text in enumerate(texts, 1)]


def test_a_document_without_places_for_the_needles_is_passed_over(splitter):
    given = [*documents("word " * 2000), *documents(*TEXTS)]
    (found,) = prepare_documents(given, splitter, CharacterTokenizer(), [1200], limit=1)
    assert found.name == given[1].id


def test_documents_long_enough_for_every_length_are_prepared(splitter):
    given_ones = documents("short", TEXTS[0], "Short. " * 200, TEXTS[1], TEXTS[2])
    tokenizer = CharacterTokenizer()
    found = prepare_documents(given_ones, splitter, tokenizer, [4000, 1200], limit=2)
    assert [document.name for document in found] == ["d.jsonl:2", "d.jsonl:4"]
    assert all(4000 <= len(document.tokens) < 4200 for document in found)
    for length in (1200, 4000):
        assert sample_of(found[1], tokenizer, "multi_query", length).tokens.shape == (1, length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "none of 0 documents has the 2000 tokens"),
        ({"tasks": ["double"]}, "task is 'double'"),
        ({"limit": 0}, "limit is 0"),
        ({"lengths": [2000, 50_000]}, r"none of 2 documents has the 50000 .* \(all have fewer"),
        ({"documents": documents("é" * 1500), "lengths": [2000]}, "the longest has 1500"),
        ({"lengths": [60]}, "length 60 is too short"),
        ({"num_queries": 9}, "num_queries is 9"),
        ({"documents": documents("word " * 900)}, r"d\.jsonl:1 has 1 places between sentences"),
    ],
)
def test_unfit_data_is_refused_before_a_model_is_loaded(splitter, changes, message):
    arguments = {"documents": documents(*TEXTS[:2]), "lengths": [2000], **changes}
    with pytest.raises(ValueError, match=message):
        prepare_documents(arguments.pop("documents"), splitter, CharacterTokenizer(), **arguments)


def test_a_tokenizer_without_bos_begins_with_the_instruction(splitter):
    tokenizer = CharacterTokenizer()
    tokenizer.bos_id = None
    document, *_ = prepare_documents(documents(*TEXTS), splitter, tokenizer, [2000])
    sample = sample_of(document, tokenizer, length=2000, bos_id=None)
    assert sample.tokens.shape == (1, 2000)
    assert tokenizer.decode(sample.tokens[0].tolist()).startswith(INSTRUCTION)
