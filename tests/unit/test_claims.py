"""examples/claims: text that never says what the tests ask, a page that says what records hold."""

import random
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_longrope.evaluation import needle_text, passkey_prompt
from megatron_longrope.factor_search import needle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/claims"))
import claims  # noqa: E402
import initial_model  # noqa: E402
import measured  # noqa: E402
import retrieval_text  # noqa: E402


def word_triples(text):
    """Three words in a row of one sentence; numbers and other signs aside."""
    found = set()
    for sentence in re.split(r"[.?!\n]", text.lower()):
        words = re.findall(r"[a-z]+", sentence)
        found |= set(zip(words, words[1:], words[2:], strict=False))
    return found


def test_no_three_words_of_a_question_or_needle_of_the_tests_are_in_the_training_text():
    chance = random.Random(0)
    taught = set().union(*(word_triples(retrieval_text.document(chance)) for _ in range(3000)))
    asked = [passkey_prompt.prompt(12345, 400, 200)]
    asked += [needle._INSTRUCTION, needle._NEEDLE, needle._QUESTION]
    asked += [needle_text.INSTRUCTION, needle_text._NEEDLE, needle_text._QUESTION]
    for text in asked:
        assert taught & word_triples(text) == set()


def test_each_document_repeats_what_it_stated():
    chance = random.Random(1)
    for _ in range(200):
        for document in (retrieval_text.story(chance, 8), retrieval_text.table(chance)):
            numbers = re.findall(r"\d+", document)
            assert len(numbers) > len(set(numbers))
        words = retrieval_text.copy(chance).replace(" | ", " ").split()
        assert any(words == words[: len(words) // times] * times for times in (2, 3))


def records(gain):
    """Two times the window: searched factors of three seeds, better by `gain` nats or passkeys."""
    results = measured.Results()
    place = ("untuned", "base")
    for method in claims.RIVALS:
        results.losses[*place, f"{method}_2x", 512] = [3.0, 3.4, 3.2]
        results.found[*place, f"{method}_2x", 512] = [0.5, 0.5, 0.5]
    for seed in range(3):
        name = f"ppl_2x_{seed}"
        results.searches[name] = {}
        losses = [3.0 - gain + seed * 1e-3, 3.4 - gain, 3.2 - gain]
        results.losses[*place, name, 512] = losses
        results.found[*place, name, 512] = [0.5 + gain] * 3
    return results


@pytest.mark.parametrize(
    "gain, verdict", [(0.1, "Shown"), (0.0, "Not shown at this size"), (-0.1, "The reverse")]
)
def test_a_claim_is_what_its_comparisons_say(gain, verdict):
    parts = [lambda results: claims.against_methods(results, 2)]
    found, comparisons, missing = claims.judge(records(gain), parts)
    assert found == verdict and len(comparisons) == 6 and not missing
    assert claims.sentence(records(gain), parts).startswith(f"**{verdict}**: of 6 comparisons")
    assert [item.gain for item in comparisons] == pytest.approx([gain] * 6, abs=1e-3)


def test_passkeys_decide_nothing_where_the_base_model_finds_none():
    results = records(0.1)
    results.found[*claims.BASE, claims.WINDOW] = [0.0] * 3
    names = [item.name for item in claims.against_methods(results, 2)]
    assert names == [f"2x, {label}, perplexity" for label in claims.RIVALS.values()]


def test_passkeys_that_neither_side_finds_count_for_nothing():
    results = records(0.1)
    for key in list(results.found):
        if key[:3] != claims.BASE:
            results.found[key] = [0.0] * 3
    parts = [lambda results: claims.against_methods(results, 2)]
    assert claims.judge(results, parts)[0] == "Shown"
    words = claims.sentence(results, parts)
    assert "of 3 comparisons 3 are for it" in words and "In 3 more neither side finds" in words
    assert "| none found |" in claims.rows(claims.judge(results, parts)[1])[-1]


def test_what_was_not_run_is_said_and_a_part_of_a_claim_is_not_the_claim():
    parts = [
        lambda results, scale=scale: claims.against_methods(results, scale) for scale in (2, 4)
    ]
    assert claims.judge(measured.Results(), parts)[0] == "Not run yet"
    assert claims.judge(records(0.1), parts)[0] == "Partly run"
    assert claims.sentence(records(0.1), parts).startswith("**Partly run**: of 6")
    assert claims.page(measured.Results()).count("**Not run yet.**") == len(claims.CLAIMS)


def test_seeds_that_disagree_open_a_claim_that_documents_alone_would_close():
    ours = [[3.0, 3.1], [2.6, 2.7]]  # 0.1 worse and 0.3 better, alike on both documents
    assert claims.compare("", ours[:1], [[2.9, 3.0]]).verdict == -1
    assert claims.compare("", ours, [[2.9, 3.0]]).verdict == 0


def test_one_figure_decides_nothing():
    assert claims.compare("", [[3.0]], [[4.0]]).verdict == 0


def test_the_page_is_what_the_script_makes_of_the_committed_records():
    results = measured.read_results(ROOT / "docs/results/claims")
    assert (ROOT / "docs/claims.md").read_text() == claims.page(results)


def test_the_initial_model_looks_up_what_followed_equal_tokens():
    model = initial_model.initial_model(
        vocabulary=1024, layers=2, hidden=128, ffn=256, heads=4, window=256, seed=1
    ).eval()
    model.set_attn_implementation("eager")
    tokens = torch.randperm(1024, generator=torch.Generator().manual_seed(2))[:40].repeat(2)
    with torch.no_grad():
        output = model(tokens[None], output_attentions=True)
    for head in range(2):
        assert output.attentions[0][0, head].diagonal(-head - 1).mean() > 0.7
    # What followed the token 40 positions before, looked up by the second layer.
    followed = output.attentions[1][0].diagonal(-39, dim1=-2, dim2=-1)[:, 2:].mean(1)
    assert followed.min() > 0.5
    target = tokens[42:]
    logits = output.logits[0, 41:-1]
    ranks = (logits > logits.gather(1, target[:, None])).sum(1)
    assert ranks.float().median() < 5  # of 1024
