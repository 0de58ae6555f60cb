"""Generations on different windows: scores compare, and unseen windows decide at the end."""

import math
from dataclasses import replace

import pytest
from synthetic_search import Synthetic, drop_seconds, small_problem

from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation, best_scores
from megatron_longrope.factor_search.known_scores import KnownScores
from megatron_longrope.factor_search.racing import Race
from megatron_longrope.factor_search.rotation import Anchor, split_pool, validate
from megatron_longrope.factor_search.runner import (
    SearchRun,
    run_search,
    score_anchor,
    score_references,
)
from megatron_longrope.factor_search.scoring import score_trial

SMALL = EvolutionParameters(
    population_size=8, num_mutations=4, num_crossovers=4, max_iterations=3, num_parents=4
)
OFFSETS = (0.0, 0.9, -0.4)
PROBLEM = small_problem((0,))


class Block(Synthetic):
    """Windows that are all harder or easier than those of another block."""

    def __init__(self, offset, **options):
        super().__init__(noise=0.0, **options)
        self._harder = offset

    def _loss(self, config, index):
        return super()._loss(config, index) + self._harder


def evolution(blocks):
    seeds = list(PROBLEM.seeds.values())
    return EvolutionSearch(PROBLEM.space, SMALL, seeds, 1, blocks=blocks)


def covariance(blocks):
    parameters = CmaParameters(max_evaluations=40, num_samples=Synthetic.num_samples)
    seeds = list(PROBLEM.seeds.values())
    return CmaSearch(PROBLEM.space, parameters, seeds, 1, blocks=blocks)


def rotate(search, run, fail_after=None):
    blocks = [Block(offset) for offset in OFFSETS]
    references = score_references(PROBLEM, blocks[0], run)
    anchor = score_anchor(references.candidate, PROBLEM, blocks, run, references.records)
    blocks[1] = Block(OFFSETS[1], fail_after=fail_after)
    known = anchor.adjusted(references.records)
    found = run_search(search, PROBLEM, blocks, run, known=known, anchor=anchor)
    return found, anchor


def test_every_anchor_has_a_journal_of_its_own(tmp_path):
    run = SearchRun(tmp_path / "j.jsonl", resume=True)
    for name in ("pi", "ntk", "pi"):
        given = PROBLEM.references[name]
        anchor = score_anchor(given, PROBLEM, [Block(offset) for offset in OFFSETS], run, ())
        assert anchor.given == given


@pytest.mark.parametrize("rule", ["exact", "paired"])
@pytest.mark.parametrize("new", [evolution, covariance])
def test_blocks_of_other_difficulty_change_nothing(new, rule, tmp_path):
    found, anchor = rotate(new(3), SearchRun(tmp_path / "rotating.jsonl", race=Race(rule)))
    run = SearchRun(tmp_path / "fixed.jsonl", race=Race(rule))
    fixed = run_search(new(1), PROBLEM, [Block(0.0)], run)
    assert {record.block for record in found.records} == {0, 1, 2}
    assert PROBLEM.factor_set(found.candidate) == PROBLEM.factor_set(fixed.candidate)
    # Scores are perplexities at the anchor's mean level over the whole pool.
    shift = anchor.level - math.log(fixed.seed_scores["ntk"])
    assert anchor.given == PROBLEM.references["ntk"]  # the best of them
    assert found.score == pytest.approx(fixed.score * math.exp(shift), rel=1e-9)
    assert found.seed_scores["pi"] == pytest.approx(fixed.seed_scores["pi"] * math.exp(shift))


@pytest.mark.parametrize("new", [evolution, covariance])
def test_a_rotating_search_resumes_exactly(new, tmp_path):
    run = SearchRun(tmp_path / "whole.jsonl", resume=True)
    whole, _ = rotate(new(3), run)
    cut = SearchRun(tmp_path / "cut.jsonl", resume=True)
    with pytest.raises(KeyboardInterrupt):
        rotate(new(3), cut, fail_after=7)
    assert rotate(new(3), cut)[0] == whole
    assert drop_seconds(cut.journal) == drop_seconds(run.journal)


def test_windows_that_no_generation_saw_decide_among_the_best(tmp_path):
    found, anchor = rotate(evolution(3), SearchRun(tmp_path / "j.jsonl"))
    ranked = sorted((item for item in found.records if not item.stopped), key=lambda r: r.score)
    third = ranked[2]

    class Unseen(Synthetic):
        """Only one of the best holds on these windows, and the others fail there."""

        last = 2.0  # the anchor's on the last of them

        def _loss(self, config, index):
            self.calls += 1
            factors = config.factor_set_for(2048).rescale_factors
            if factors == anchor.given.rescale_factors:
                return self.last if index == 4 else 2.0
            return 1.0 if factors == third.rescale_factors else 3.0

    unseen = Unseen()
    winner, score, on_unseen = validate(PROBLEM, found.records, anchor, unseen)
    assert winner.rescale_factors == third.rescale_factors and score == third.score
    assert on_unseen == {"longrope": math.exp(1.0), "anchor": math.exp(2.0)}
    assert unseen.calls == 5 + 2 + 2 + 5 + 2  # the worse ones are given up by a paired test
    # Where none of them holds, the anchor is the result, unless it fails itself.
    records = [replace(item, rescale_factors=(1.5,) * 16) for item in ranked]
    assert validate(PROBLEM, records, anchor, unseen)[0] == anchor.given
    unseen.last = math.nan
    winner, _, on_unseen = validate(PROBLEM, records, anchor, unseen)
    assert winner.rescale_factors == (1.5,) * 16
    assert on_unseen == {"longrope": math.exp(3.0), "anchor": math.inf}


def test_what_was_not_scored_to_its_end_counts_as_no_score():
    given = PROBLEM.references["pi"]
    whole = Evaluation(given.rescale_factors, 0, 9.0, (2.0,) * 5)
    halved = replace(whole, score=2.0, stopped="budget")
    records = [whole, halved, replace(whole, score=math.inf, error="out of memory")]
    assert best_scores(records) == {given: 9.0}
    assert KnownScores(PROBLEM, records).score(given) == 9.0
    assert Anchor(given, ((2.0,) * 5,)).adjusted(records) == [whole]


def test_a_part_of_a_block_is_scored_by_itself_and_against_that_part_of_the_anchors_losses():
    anchor = Anchor(PROBLEM.references["pi"], ((1.0, 3.0, 3.0, 3.0, 3.0),))
    trial, pairs = Trial(0, PROBLEM.references["ntk"], samples=1), Synthetic(samples_per_forward=2)
    found = score_trial(trial, PROBLEM, pairs, Race("off"), anchor=anchor)
    assert len(found.sample_nlls) == 2
    assert found.score == pytest.approx(math.exp(found.sample_nlls[0] + anchor.level - 1.0))


def test_a_rival_of_a_race_is_moved_to_the_windows_of_the_runner():
    anchor = Anchor(PROBLEM.references["pi"], ((1.0, 3.0), (2.0, 6.0)))
    assert anchor.level == 3.0 and anchor.offset(1, 1) == 1.0
    # 0.5 nats better than the anchor, on each window.
    assert anchor.losses_of(math.exp(2.5), 1) == pytest.approx([1.5, 5.5])


def test_a_quarter_of_the_pool_is_kept_for_the_end():
    assert split_pool(40, 5) == (6, 2) and split_pool(10, 5) == (1, 1)
    with pytest.raises(ValueError, match="a pool of 9 documents is less than two generations' 5"):
        split_pool(9, 5)
    with pytest.raises(ValueError, match="2 of them would not be read; give 40 or 45"):
        split_pool(42, 5)
