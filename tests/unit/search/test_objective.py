"""The objective is the mean loss of what counts, whatever shares a forward pass."""

import math
from types import SimpleNamespace

import make_megatron_checkpoint as maker
import numpy as np
import pytest
import torch

from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.data.documents import read_documents
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.engine import load_engine
from megatron_longrope.factor_search.needle import needle_samples
from megatron_longrope.factor_search.objective import PerplexityObjective, mean_over, window_samples
from megatron_longrope.factor_search.samples import read_samples


@pytest.fixture(scope="module")
def engine(megatron_runs):
    path = megatron_runs["untied_gqa"].path
    return load_engine(path, longrope_config=maker.longrope_config(), device="cpu")


@pytest.fixture
def samples():
    return torch.cat([random_tokens(maker.VOCAB, 96, seed) for seed in range(5)])


def all_losses(objective, config):
    losses = []
    while len(losses) < objective.num_samples:
        losses += objective.losses(config, len(losses))
    return losses


def test_a_samples_loss_is_the_mean_over_its_targets(engine, config, samples):
    objective = PerplexityObjective(engine, samples, tokens_per_forward=1)
    engine.set_config(config)
    theirs = [engine.nll(row[None]).double().mean().item() for row in samples]
    assert all_losses(objective, config) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("shared", [1, 2, 3, 5, 100])
def test_losses_do_not_depend_on_what_shares_a_forward_pass(engine, config, samples, shared):
    objective = PerplexityObjective(engine, samples, tokens_per_forward=96 * shared)
    assert objective.samples_per_forward == shared
    alone = PerplexityObjective(engine, samples, tokens_per_forward=96)
    ours, theirs = (all_losses(item, config) for item in (objective, alone))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_only_marked_targets_count(engine, config, samples):
    scored = torch.zeros(5, 95, dtype=torch.bool)
    for row in range(5):
        scored[row, 90 - row : 94] = True
    objective = PerplexityObjective(engine, samples, weights=mean_over(scored))
    engine.set_config(config)
    losses = engine.nll(samples).double()
    theirs = [losses[row][scored[row]].mean().item() for row in range(5)]
    assert all_losses(objective, config) == pytest.approx(theirs, abs=1e-6)


def test_the_factors_are_swapped_once_per_candidate(config, samples):
    class Model:
        swaps = 0

        def set_config(self, config):
            self.swaps += 1

        def nll(self, tokens, start=0):
            return torch.full((len(tokens), tokens.shape[1] - 1 - start), math.log(2.0))

    model = Model()
    objective = PerplexityObjective(model, samples, tokens_per_forward=96)
    other = maker.longrope_config()
    assert all_losses(objective, config) == pytest.approx([math.log(2.0)] * 5)
    assert model.swaps == 1
    all_losses(objective, other)
    assert model.swaps == 2


def test_rounding_below_zero_is_zero_and_nan_stays(config, samples):
    class Model:
        def set_config(self, config):
            pass

        def nll(self, tokens, start=0):
            values = torch.full((len(tokens), tokens.shape[1] - 1), -1e-9)
            values[1:2] = math.nan
            return values

    losses = PerplexityObjective(Model(), samples).losses(config, 0)
    assert losses[0] == 0.0 and math.isnan(losses[1])


def test_windows_follow_one_another_with_bos_before_each():
    documents = [np.arange(10, 40), np.arange(50, 80)]
    windows = window_samples(documents, 1, 8, windows_per_document=2)
    assert windows.tolist() == [
        [1, *range(10, 17)],
        [1, *range(17, 24)],
        [1, *range(50, 57)],
        [1, *range(57, 64)],
    ]


def test_without_bos_windows_are_the_text_alone():
    windows = window_samples([np.arange(10, 40)], None, 8, windows_per_document=2)
    assert windows.tolist() == [[*range(10, 18)], [*range(18, 26)]]


def test_a_needles_answer_alone_decides_its_score(engine, config, data):
    tokenizer = load_tokenizer(data["tokenizer"])
    documents = read_documents(data["search"], limit=3)
    length = 640
    needles = needle_samples(documents, tokenizer, length, bos_id=1, depths=(0, 0.5, 1))
    wide = config.with_factor_set(
        type(config.factor_sets[-1])(length, config.factor_sets[-1].rescale_factors)
    )
    objective = PerplexityObjective(engine, needles.tokens, weights=mean_over(needles.scored))
    losses = all_losses(objective, wide)
    engine.set_config(wide)
    for row, number in enumerate(needles.numbers):
        answer = engine.nll(needles.tokens[row : row + 1])[0, -7:]
        assert tokenizer.decode(needles.tokens[row, -7:].tolist()) == str(number)
        assert losses[row] == pytest.approx(answer.double().mean().item(), abs=1e-5)


def test_the_joint_objective_takes_both_losses_from_one_pass(engine, config, data):
    args = SimpleNamespace(
        windows_per_document=1, target_length=640, num_samples=3, tokenizer=data["tokenizer"],
        needle_depths="0,0.5,1", needle_weight=0.25, seed=3, bos=None,
    )  # fmt: skip
    samples = read_samples(args, data["search"], "joint")
    wide = config.with_factor_set(FactorSet(640, config.factor_sets[-1].rescale_factors))
    objective = PerplexityObjective(engine, samples.tokens, weights=samples.weights)
    losses = all_losses(objective, wide)
    documents = read_documents(data["search"], limit=3)
    needles = needle_samples(
        documents, load_tokenizer(data["tokenizer"]), 640, bos_id=1, depths=(0, 0.5, 1), seed=3
    )
    for row, nll in enumerate(engine.nll(needles.tokens).double()):
        text, answer = nll[needles.text[row]].mean(), nll[-7:].mean()
        assert losses[row] == pytest.approx(float(text + 0.25 * answer), abs=1e-5)


def test_nothing_to_score_is_refused(engine, samples):
    with pytest.raises(ValueError, match="no sample to score"):
        PerplexityObjective(engine, samples[:0])
    with pytest.raises(ValueError, match="no token that counts"):
        PerplexityObjective(engine, samples, weights=torch.zeros(5, 95))
