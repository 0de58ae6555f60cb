import argparse
import math
import re
from types import SimpleNamespace

import make_megatron_checkpoint as maker
import pytest
import torch
import torch.nn.functional as F

from megatron_longrope.baselines import extended_config
from megatron_longrope.checkpoint import ModelShape
from megatron_longrope.config import identity_config
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import load_engine
from megatron_longrope.engine import loss as loss_module
from megatron_longrope.engine.model import build_model
from megatron_longrope.integration import compat

PLAIN = identity_config(maker.BASE, maker.HEAD_DIM, maker.ORIGINAL)


@pytest.fixture(scope="module")
def engines(megatron_runs):
    config = maker.longrope_config()
    return {
        name: load_engine(run.path, longrope_config=config, hf_parity=True, device="cpu")
        for name, run in megatron_runs.items()
    }


@pytest.mark.parametrize("name", list(maker.VARIANTS))
@pytest.mark.parametrize(
    "window, length", [("short", maker.SHORT_TOKENS), ("long", maker.LONG_TOKENS)]
)
def test_logits_equal_megatrons_own_model_in_both_windows(
    engines, megatron_runs, name, window, length
):
    ours = engines[name].logits(random_tokens(maker.VOCAB, length, 0))
    theirs = megatron_runs[name].logits[window][..., : maker.VOCAB]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(maker.VARIANTS))
def test_token_losses_equal_cross_entropy_of_the_logits(engines, name):
    tokens = torch.cat([random_tokens(maker.VOCAB, 100, seed) for seed in (1, 2)])
    engine = engines[name]
    logits = engine.logits(tokens)[:, :-1]
    assert logits.shape[-1] == maker.VOCAB  # rows that pad the vocabulary get no probability
    theirs = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    ours = engine.nll(tokens)
    assert ours.shape == (2, 99)
    torch.testing.assert_close(ours.flatten(), theirs, atol=1e-6, rtol=1e-6)


def test_losses_of_bf16_states_are_computed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (20, 500))
    model = SimpleNamespace(
        share_embeddings_and_output_weights=False, output_layer=SimpleNamespace(weight=weight),
        pg_collection=SimpleNamespace(tp=SimpleNamespace(size=lambda: 1)),
    )  # fmt: skip
    labels = torch.arange(20)
    exact = F.cross_entropy(F.linear(hidden, weight).double(), labels, reduction="none")
    ours = loss_module.token_nll(model, hidden, labels, 500)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-6)


def test_losses_do_not_depend_on_the_chunk_size(engines, monkeypatch):
    tokens = random_tokens(maker.VOCAB, 100, 3)
    engine = engines["untied_gqa"]
    whole = engine.nll(tokens)
    monkeypatch.setattr(loss_module, "_LOGITS_PER_CHUNK", 7 * maker.PADDED)
    torch.testing.assert_close(engine.nll(tokens), whole, atol=1e-6, rtol=0)


def test_no_chunk_of_logits_is_larger_than_its_budget(engines, monkeypatch):
    monkeypatch.setattr(loss_module, "_LOGITS_PER_CHUNK", 16 * maker.PADDED)
    sizes = []
    linear = F.linear
    monkeypatch.setattr(loss_module.F, "linear", lambda x, w: sizes.append(len(x)) or linear(x, w))
    engines["untied_gqa"].nll(random_tokens(maker.VOCAB, 100, 3))
    # The model's own projections pass through the same function; only the head has 99 rows to cut.
    assert max(sizes) == 16 and sum(sizes) == 99


@pytest.mark.parametrize("start", [0, 1, 57, 98])
def test_losses_from_a_start_are_the_last_of_all_losses(engines, start):
    tokens = torch.cat([random_tokens(maker.VOCAB, 100, seed) for seed in (1, 2)])
    engine = engines["untied_gqa"]
    ours = engine.nll(tokens, start)
    assert ours.shape == (2, 99 - start)
    torch.testing.assert_close(ours, engine.nll(tokens)[:, start:], atol=1e-6, rtol=0)


def test_the_output_layer_sees_only_what_is_scored(engines, monkeypatch):
    rows = []
    token_nll = loss_module.token_nll
    monkeypatch.setattr(
        loss_module, "token_nll", lambda m, h, *rest: rows.append(len(h)) or token_nll(m, h, *rest)
    )
    engines["untied_gqa"].nll(random_tokens(maker.VOCAB, 100, 3), start=90)
    assert rows == [9]


def test_a_candidate_builds_one_rotary_table_for_all_layers_and_samples(engines, monkeypatch):
    engine = engines["untied_gqa"]
    built = []
    rotary = engine.model.rotary_pos_emb
    table = rotary._table
    monkeypatch.setattr(rotary, "_table", lambda *args: built.append(args) or table(*args))
    for _ in range(3):
        engine.set_config(engine.config)
        for seed in range(4):
            engine.nll(random_tokens(maker.VOCAB, 100, seed))
    assert len(built) == 3


def test_swapping_factors_changes_the_losses_and_swapping_back_restores_them(engines):
    engine = engines["untied_gqa"]
    tokens = random_tokens(maker.VOCAB, 160, 6)
    own = engine.config
    before = engine.nll(tokens)
    engine.set_config(extended_config("pi", PLAIN, maker.TARGET, "su"))
    other = engine.nll(tokens)
    engine.set_config(own)
    assert (before - other).abs().max() > 1e-3
    assert torch.equal(engine.nll(tokens), before)


@pytest.mark.parametrize("hf_parity", [False, True])
def test_the_attention_factor_follows_the_length_by_exactly_one_carrier(megatron_runs, hf_parity):
    config = extended_config("ntk", PLAIN, maker.TARGET, "su")
    engine = load_engine(
        megatron_runs["tied_mha"].path, longrope_config=config, hf_parity=hf_parity, device="cpu"
    )
    attention = engine.model.decoder.layers[0].self_attention

    def factor_at(length):
        engine.nll(random_tokens(maker.VOCAB, length, 7))
        by_softmax = math.sqrt(attention.core_attention.softmax_scale * math.sqrt(maker.HEAD_DIM))
        by_rope = compat.cos_sin_factor(attention)
        assert (by_rope if not hf_parity else by_softmax) == pytest.approx(1.0)
        return by_softmax * by_rope

    assert factor_at(maker.ORIGINAL) == pytest.approx(1.0)
    squared = 1 + math.log(maker.TARGET / maker.ORIGINAL) / math.log(maker.ORIGINAL)
    assert factor_at(maker.ORIGINAL + 1) == pytest.approx(math.sqrt(squared))


def test_both_carriers_of_the_attention_factor_give_the_same_logits(megatron_runs):
    run = megatron_runs["untied_gqa"]
    tokens = random_tokens(maker.VOCAB, maker.LONG_TOKENS, 0)
    config = maker.longrope_config()
    by_softmax, by_rope = (
        load_engine(run.path, longrope_config=config, hf_parity=parity, device="cpu").logits(tokens)
        for parity in (False, True)
    )
    torch.testing.assert_close(by_softmax, by_rope, atol=2e-5, rtol=0)


def test_the_checkpoints_own_factors_are_the_default(megatron_runs):
    engine = load_engine(megatron_runs["tied_mha"].path, device="cpu")
    assert engine.config == maker.longrope_config()


OUTSIDE = torch.tensor([[1, maker.VOCAB]])
FORTY = random_tokens(maker.VOCAB, 40, 0)
NO_PROMPT = "with at least one token before the answer"


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("nll", (OUTSIDE,), "token id 250 is outside the vocabulary of 250"),
        ("choices", (FORTY, torch.tensor([1]), OUTSIDE[:, 1:]), "id 250 is outside the vocabulary"),
        ("choices", (FORTY, torch.tensor([40]), FORTY[:, :2]), "position 40 is outside .* of 40"),
        ("choices", (FORTY, torch.tensor([-1]), FORTY[:, :2]), "position -1 is outside"),
        ("nll", (random_tokens(maker.VOCAB, 257, 0),), "exceeds 256"),
        ("nll", (FORTY, -1), "start -1 leaves .* 40 tokens .* from 0 to 38"),
        ("nll", (FORTY, 39), "start 39 leaves"),
        ("answer", (torch.cat([FORTY, FORTY]), 3), NO_PROMPT),
        ("answer", (FORTY, 0), NO_PROMPT),
        ("answer", (FORTY, 40), NO_PROMPT),
    ],
)
def test_what_cannot_be_scored_is_refused(engines, call, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(engines["untied_gqa"], call)(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "yarn"},
        {"position_embedding_type": "mrope"},
        {"position_embedding_type": "none"},
        {"rotary_seq_len_interpolation_factor": 4},
        {"no_rope_freq": [0, 1, 0]},
        {"apply_layernorm_1p": True},
        {"softmax_type": "off-by-one"},
        {"qk_l2_norm": True},
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"apply_residual_connection_post_layernorm": True},
        {"use_mup": True},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_what_no_tensor_shows_of_another_architecture_is_refused_by_its_argument(change):
    (name, value), *_ = change.items()
    args = argparse.Namespace(**{**vars(maker.arguments(groups=2, untied=True)), **change})
    with pytest.raises(ValueError, match=re.escape(f"has {name} = {value!r} (")):
        build_model(ModelShape.from_args(args), maker.longrope_config())


def test_arguments_of_the_usual_architecture_are_not_refused():
    usual = {
        "rotary_seq_len_interpolation_factor": None,
        "no_rope_freq": None,
        "softmax_type": "vanilla",
        "qk_l2_norm": False,
        "glu_linear_offset": 0.0,
        "mtp_num_layers": None,
    }
    args = argparse.Namespace(**{**vars(maker.arguments(groups=2, untied=True)), **usual})
    assert ModelShape.from_args(args).other_architecture is None


def test_scores_are_the_losses_with_the_greedy_choices_at_the_same_places(engines):
    engine = engines["untied_gqa"]
    tokens = torch.cat([random_tokens(maker.VOCAB, 60, seed) for seed in (1, 2)])
    nll, greedy = engine.score(tokens, 20)
    torch.testing.assert_close(nll, engine.nll(tokens)[:, 20:], atol=1e-6, rtol=0)
    assert torch.equal(greedy, engine.logits(tokens)[:, 20:-1].argmax(-1))


def test_an_answer_has_a_choice_for_each_token_and_one_behind_the_last(engines):
    engine = engines["untied_gqa"]
    tokens = random_tokens(maker.VOCAB, 60, 1)
    answer = engine.answer(tokens, 4)
    assert answer.predicted == engine.logits(tokens)[0, -5:].argmax(-1).tolist()
    assert answer.nll == pytest.approx(engine.nll(tokens)[0, -4:].tolist(), abs=1e-6)


def test_choices_are_the_losses_of_each_candidate_behind_its_own_position(engines):
    engine = engines["untied_gqa"]
    tokens = torch.cat([random_tokens(maker.VOCAB, 40, seed) for seed in (1, 2)])
    positions, candidates = torch.tensor([39, 17]), torch.tensor([[3, 5, 7], [11, 5, 200]])
    nll, greedy = engine.choices(tokens, positions, candidates)
    for row in range(2):
        logits = engine.logits(tokens)[row, positions[row]]
        expected = -logits.log_softmax(-1)[candidates[row]]
        torch.testing.assert_close(nll[row], expected, atol=1e-5, rtol=0)
        assert greedy[row] == logits.argmax()
