import numpy as np
import pytest
import torch

from megatron_longrope.evaluation.passkey import (
    is_retrieved,
    make_trial,
    prompt,
)
from megatron_longrope.evaluation.statistics import wilson_interval


class CharacterTokenizer:
    """One token per character: stable prefixes, exact lengths."""

    bos_id = 0

    def encode(self, text):
        return [ord(character) for character in text]


class MergingTokenizer(CharacterTokenizer):
    """Merges the last two characters, so that a longer text changes earlier tokens."""

    def encode(self, text):
        return [*super().encode(text[:-2]), 1000 + ord(text[-1])]


def test_the_prompt_has_the_five_lines_of_the_papers_code():
    lines = prompt(12345, 200, 50).split("\n")
    assert lines[0].startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert len(lines[1]) == 50 and lines[1].startswith("The grass is green.")
    assert lines[2] == "The pass key is 12345. Remember it. 12345 is the pass key."
    assert len(lines[3]) == 150 and lines[3].startswith("The grass is green.")
    assert lines[4] == "What is the pass key? The pass key is"


@pytest.mark.parametrize("length", [400, 1000, 5000])
def test_a_trial_has_exactly_the_length_asked_for_when_characters_are_tokens(length):
    trial = make_trial(CharacterTokenizer(), length, np.random.default_rng(0))
    assert len(trial.tokens) == length
    text = "".join(map(chr, trial.tokens[1:]))
    assert trial.tokens[0] == 0 and text.endswith(f"The pass key is {trial.key}")
    assert text.count(str(trial.key)) == 3
    assert trial.num_answer_tokens == len(f" {trial.key}")


def test_trials_are_the_same_for_the_same_seed_and_differ_within_it():
    def keys(seed):
        rng = np.random.default_rng(seed)
        return [make_trial(CharacterTokenizer(), 600, rng).key for _ in range(5)]

    assert keys(1) == keys(1) != keys(2)
    assert len(set(keys(1))) > 1


def test_a_length_below_the_bare_prompt_is_refused():
    with pytest.raises(ValueError, match="too short for the passkey prompt"):
        make_trial(CharacterTokenizer(), 100, np.random.default_rng(0))


def test_a_tokenizer_that_merges_prompt_and_answer_is_refused():
    with pytest.raises(ValueError, match="merges the end of the prompt"):
        make_trial(MergingTokenizer(), 600, np.random.default_rng(0))


def test_retrieval_needs_every_answer_token():
    trial = make_trial(CharacterTokenizer(), 600, np.random.default_rng(0))
    answer = torch.tensor(trial.tokens[-trial.num_answer_tokens :])
    assert is_retrieved(answer, trial)
    answer[-1] += 1
    assert not is_retrieved(answer, trial)


def test_nine_of_ten_has_the_published_wilson_interval():
    low, high = wilson_interval(0.9, 10)
    assert (round(low, 2), round(high, 2)) == (0.60, 0.98)
