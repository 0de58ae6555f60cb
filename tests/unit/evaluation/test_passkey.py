import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import make_text
from toy_tokenizers import (
    BOS,
    CharacterTokenizer,
    MergingTokenizer,
    save_fast,
    train_byte_level,
)
from train_tokenizer import train_sentencepiece

from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.evaluation.passkey_prompt import (
    MAX_NEW_TOKENS,
    check_tokenizer,
    is_retrieved,
    make_trial,
    parse_answer,
    prompt,
)

TEXTS = [make_text(seed, 100) for seed in range(10)]
TEXTS += [prompt(key, 200, 100) for key in range(1, 50000, 997)]
DEPTHS = st.none() | st.floats(0, 1)


class LetterTokenizer(CharacterTokenizer):
    """Knows no digits."""

    def encode(self, text):
        return super().encode(re.sub(r"\d", "?", text))


class WordyTokenizer(CharacterTokenizer):
    """Writes every character as two tokens."""

    def encode(self, text):
        return [token for code in super().encode(text) for token in (1, code)]

    def decode(self, ids):
        return super().decode(ids[1::2])


class EvenTokenizer(CharacterTokenizer):
    """Pads what stands before the question to an even number of tokens."""

    def encode(self, text):
        return [1] * (len(text.partition("What is")[0]) % 2) + super().encode(text)


class DriftingTokenizer(CharacterTokenizer):
    """Adds tokens to long texts which short ones do not foretell."""

    def encode(self, text):
        return [1] * (max(len(text) - 1500, 0) // 700) + super().encode(text)


class FarSightedTokenizer(CharacterTokenizer):
    """Reads the digits at the end of a long text differently."""

    def encode(self, text):
        ids = super().encode(text)
        return ids if len(text) < 2000 else [*ids[:-2], 120, 121]


class MuteTokenizer(CharacterTokenizer):
    """Takes a whole text for one unknown token, except for a number at its end."""

    def encode(self, text):
        number = re.search(r" \d+$", text)
        return [1] + (super().encode(number.group()) if number else [])


class CountingTokenizer:
    """Counts what it passes on."""

    def __init__(self, inner):
        self.inner, self.characters = inner, []
        self.bos_id, self.vocab_size = inner.bos_id, inner.vocab_size

    def encode(self, text):
        self.characters.append(len(text))
        return self.inner.encode(text)

    def decode(self, ids):
        return self.inner.decode(ids)


def hugging_face(folder, add_prefix_space=False, groups_of_digits=False):
    """A byte-level BPE trained here: GPT-2's, or Llama 3's with up to three digits a token."""
    words = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+" if groups_of_digits else None
    save_fast(train_byte_level(TEXTS, 600, words=words, add_prefix_space=add_prefix_space), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(TEXTS, folder / "tiny.model", 420)
    return {
        "characters": CharacterTokenizer(),
        "sentencepiece": load_tokenizer(folder / "tiny.model"),
        "byte-level": hugging_face(folder / "plain"),
        "prefix space": hugging_face(folder / "prefix", add_prefix_space=True),
        "digit groups": hugging_face(folder / "groups", groups_of_digits=True),
    }


KINDS = pytest.mark.parametrize(
    "kind", ["characters", "sentencepiece", "byte-level", "prefix space", "digit groups"]
)


def trial_of(tokenizer, length=600, depth=None, seed=0, trial=0):
    return make_trial(tokenizer, length, depth=depth, seed=seed, trial=trial)


def test_the_prompt_has_the_five_lines_of_the_papers_code():
    lines = prompt(12345, 200, 50).split("\n")
    assert lines[0] == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there."
    )
    sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    repeated = " ".join([sentences + "There and back again."] * 3)
    assert lines[1] == repeated[:50]
    assert lines[2] == "The pass key is 12345. Remember it. 12345 is the pass key."
    assert lines[3] == repeated[:150]
    assert lines[4] == "What is the pass key? The pass key is"
    assert len(lines) == 5


@KINDS
def test_a_trial_has_exactly_the_length_asked_for_at_the_depth_asked_for(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @settings(max_examples=30)
    @given(length=st.integers(500, 3000), depth=DEPTHS, seed=st.integers(0, 9))
    def check(length, depth, seed):
        trial = trial_of(tokenizer, length, depth, seed)
        assert len(trial.tokens) == length
        whole = tokenizer.decode(trial.tokens[1:])
        assert trial.tokens == [tokenizer.bos_id, *tokenizer.encode(whole)]
        assert trial.prompt_tokens + trial.answer == trial.tokens
        text = whole.removesuffix(f" {trial.key}")
        assert trial.prompt_tokens[1:] == tokenizer.encode(text)
        assert tokenizer.decode(trial.tokens[-trial.num_answer_tokens :]).strip() == str(trial.key)
        before, information, after, question = whole.split("\n")[1:]
        assert (
            information == f"The pass key is {trial.key}. Remember it. {trial.key} is the pass key."
        )
        assert question == f"What is the pass key? The pass key is {trial.key}"
        assert not re.search(r"\d", before + after)
        assert trial.depth == len(before) / len(before + after)
        # An exact count may move the key by characters, never by words.
        assert depth is None or abs(trial.depth - depth) * len(before + after) < 4

    check()


@pytest.mark.parametrize("length", [2**14, 2**18 - 1, 2**21])
@pytest.mark.parametrize("depth", [None, 0.0, 0.37, 1.0])
def test_one_whole_prompt_is_encoded_however_long_it_is(length, depth):
    tokenizer = CountingTokenizer(CharacterTokenizer())
    trial = trial_of(tokenizer, length, depth)
    assert len(trial.tokens) == length
    longest = max(tokenizer.characters)
    assert tokenizer.characters.count(longest) == 1
    assert sum(tokenizer.characters) - longest < 12_000


@KINDS
def test_few_encodings_find_the_exact_count(tokenizers, kind):
    counts = []
    for length in range(4000, 4030):
        tokenizer = CountingTokenizer(tokenizers[kind])
        trial_of(tokenizer, length, 0.5)
        counts.append(len(tokenizer.characters))
    assert sorted(counts)[len(counts) // 2] <= 12
    assert max(counts) <= 80  # short ones, for counts that few prompts have


def test_a_count_that_short_prompts_do_not_foretell_is_found_all_the_same():
    tokenizer = CountingTokenizer(DriftingTokenizer())
    trial = trial_of(tokenizer, 20_000)
    text = "".join(map(chr, trial.tokens)).lstrip(chr(BOS))
    assert trial.tokens == [BOS, *DriftingTokenizer().encode(text)]
    assert len(trial.tokens) == 20_000
    assert sum(count > 15_000 for count in tokenizer.characters) <= 4


def test_a_trial_is_the_same_wherever_it_is_made_and_differs_within_a_run():
    tokenizer = CharacterTokenizer()
    assert trial_of(tokenizer) == trial_of(tokenizer)
    cells = [(length, depth) for length in (600, 800) for depth in (None, 0.0, 0.5, 1.0)]
    keys = [
        trial_of(tokenizer, length, depth, seed, trial).key
        for length, depth in cells
        for seed in (0, 1)
        for trial in range(5)
    ]
    assert len(set(keys)) == len(keys)


@KINDS
def test_spare_tokens_shorten_the_filler_and_change_nothing_else(tokenizers, kind):
    for number in range(5):
        whole = trial_of(tokenizers[kind], 2000, trial=number)
        shorter = make_trial(
            tokenizers[kind], 2000, depth=None, seed=0, trial=number, spare=MAX_NEW_TOKENS - 1
        )
        assert len(shorter.tokens) == 2000 - (MAX_NEW_TOKENS - 1)
        assert len(shorter.prompt_tokens) + MAX_NEW_TOKENS <= 2000
        assert (shorter.key, shorter.answer) == (whole.key, whole.answer)
        assert shorter.depth == pytest.approx(whole.depth, abs=2e-3)


def test_keys_and_random_depths_are_spread_as_in_the_papers_code():
    trials = [trial_of(CharacterTokenizer(), trial=number) for number in range(400)]
    keys, depths = sorted(t.key for t in trials), sorted(t.depth for t in trials)
    assert 1 <= keys[0] < 1000 and 49_000 < keys[-1] <= 50_000
    assert abs(keys[200] - 25_000) < 4000
    assert 0 <= depths[0] < 0.02 and 0.98 < depths[-1] <= 1
    assert abs(depths[200] - 0.5) < 0.08


def test_without_a_begin_token_prompt_and_answer_fill_the_length():
    tokenizer = CharacterTokenizer()
    tokenizer.bos_id = None
    trial = trial_of(tokenizer, 600)
    assert tokenizer.decode(trial.tokens).startswith("There is an important info")
    assert len(trial.tokens) == 600


@KINDS
def test_a_length_below_the_bare_prompt_is_refused_with_the_minimum(tokenizers, kind):
    with pytest.raises(ValueError, match=r"too short .* at least (\d+) tokens") as caught:
        trial_of(tokenizers[kind], 20)
    minimum = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    # Another length draws another key, whose digits count too.
    shortest = None
    for length in range(minimum - 6, minimum + 6):
        try:
            shortest = shortest or trial_of(tokenizers[kind], length)
        except ValueError as error:
            assert re.search("too short|found no passkey prompt of exactly", str(error))
    filler = tokenizers[kind].decode(shortest.tokens[1:]).split("\n")[1:4:2]
    assert len("".join(filler)) < 20


def test_a_count_that_the_tokenizer_never_gives_is_refused():
    refused = 0
    for length in range(600, 610):
        try:
            assert len(trial_of(EvenTokenizer(), length).tokens) == length
        except ValueError as error:
            assert f"exactly {length - 1} tokens besides BOS" in str(error)
            assert "take another length or depth" in str(error)
            refused += 1
    assert 0 < refused < 10  # the digits of the key decide


def test_a_tokenizer_whose_answer_depends_on_the_distant_beginning_is_refused():
    assert trial_of(FarSightedTokenizer(), 1500).num_answer_tokens > 1
    with pytest.raises(ValueError, match="reads the end of a prompt of 5000 tokens otherwise"):
        trial_of(FarSightedTokenizer(), 5000)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (MergingTokenizer(), "merges the end of the prompt with the answer"),
        (LetterTokenizer(), r"reads ' \?' where the answer 1 was written"),
        (WordyTokenizer(), "writes the answer 1000 in 10 tokens"),
        (MuteTokenizer(), "reads English of any length as"),
    ],
)
def test_tokenizers_under_which_scores_would_mean_nothing_are_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tokenizer)
    with pytest.raises(ValueError):
        for number in range(10):
            trial_of(tokenizer, trial=number)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        # sentencepiece with single digits: Llama 2's way of writing numbers.
        ("sentencepiece", "answers of 2 to 6 tokens, the space before the number always a token"),
        ("digit groups", r"answers of 2 to [3-5] tokens, the space before the number always"),
        ("byte-level", r"answers of 1 to [2-5] tokens, the space before the number never a token"),
    ],
)
def test_the_check_says_how_answers_are_written(tokenizers, kind, words):
    said = check_tokenizer(tokenizers[kind])
    assert re.match(words, said) and "\n" not in said
    text = prompt(1, 20_000, 20_000)
    expected = len(text) / len(tokenizers[kind].encode(text))
    found = float(re.search(r"([\d.]+) characters of filler a token", said)[1])
    assert found == pytest.approx(expected, rel=0.1)


def test_retrieval_needs_every_answer_token_and_no_further_digit():
    tokenizer = CharacterTokenizer()
    trial = trial_of(tokenizer)
    assert trial.answer == [ord(character) for character in f" {trial.key}"]
    for following, expected in ((".", True), ("\n", True), (" ", True), ("7", False), ("0", False)):
        assert is_retrieved([*trial.answer, ord(following)], trial, tokenizer) is expected
    for place in range(trial.num_answer_tokens):
        predicted = [*trial.answer, ord(".")]
        predicted[place] += 1
        assert not is_retrieved(predicted, trial, tokenizer)


def test_a_token_of_a_padded_vocabulary_ends_the_number():
    trial = trial_of(CharacterTokenizer())
    assert is_retrieved([*trial.answer, 128], trial, CharacterTokenizer())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 12345", 12345),
        (" 12345. Remember it. 6", 12345),
        ("the number 7, not 8", 7),
        (" 00042", 42),
        (" 123456", 123456),
        (" the grass is green", None),
        ("", None),
    ],
)
def test_the_first_number_in_the_generated_text_is_the_answer(text, number):
    assert parse_answer(text) == number


def scripted_model(trial, tokenizer, luck, seed):
    """A model: from what stands behind the prompt to the next token.

    It continues the answer with probability `luck`, and else says anything that may matter.
    """
    others = sorted({t for text in (" 7", "0", ".", " The", "\n") for t in tokenizer.encode(text)})

    def successor(written):
        rng = random.Random(f"{seed} {written}")
        answer = trial.answer
        if written == answer[: len(written)] and len(written) < len(answer) and rng.random() < luck:
            return answer[len(written)]
        return rng.choice([*others, tokenizer.vocab_size - 1])

    return successor


@KINDS
def test_teacher_forcing_agrees_with_generation(tokenizers, kind):
    tokenizer = tokenizers[kind]
    trials = [trial_of(tokenizer, trial=number) for number in range(20)]
    seen = set()

    @settings(max_examples=100)
    @given(
        trial=st.sampled_from(trials),
        luck=st.sampled_from((0.5, 0.9, 1.0)),
        seed=st.integers(0, 10**6),
    )
    def check(trial, luck, seed):
        successor = scripted_model(trial, tokenizer, luck, seed)
        count = trial.num_answer_tokens
        predicted = [successor(trial.answer[:place]) for place in range(count + 1)]
        generated = []
        for _ in range(MAX_NEW_TOKENS):
            generated.append(successor(generated))

        retrieved = is_retrieved(predicted, trial, tokenizer)
        parsed = parse_answer(tokenizer.decode(generated))
        # Exactly when decoding writes the answer's tokens and the number ends there.
        start = tokenizer.decode(generated[: count + 1])
        assert retrieved == (generated[:count] == trial.answer and parse_answer(start) == trial.key)
        if retrieved:
            assert parsed == trial.key
        seen.add((retrieved, parsed == trial.key))

    check()
    assert {(True, True), (False, False)} <= seen


def test_generation_accepts_other_words_and_spellings_that_teacher_forcing_does_not():
    tokenizer = CharacterTokenizer()
    trial = trial_of(tokenizer)
    for text in (f" {'0' * (9 - len(str(trial.key)))}{trial.key}", f" the {trial.key}"):
        generated = tokenizer.encode(text)[:MAX_NEW_TOKENS]
        assert parse_answer(tokenizer.decode(generated)) == trial.key
        predicted = [*generated, ord(".")][: trial.num_answer_tokens + 1]
        assert not is_retrieved(predicted, trial, tokenizer)
