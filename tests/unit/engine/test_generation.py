"""Cached generation under pinned factors, against forward passes without a cache."""

import sys
from collections import Counter
from dataclasses import replace

import fake_flash_attn
import make_megatron_checkpoint as maker
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import spawn
from transformers import AutoModelForCausalLM

from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention
from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import Engine, load_engine, process_groups
from megatron_longrope.engine import loss as loss_module
from megatron_longrope.engine.generation import generate
from megatron_longrope.engine.kv_cache import PinnedSequence
from megatron_longrope.engine.model import build_model

ORIGINAL = maker.ORIGINAL
CROSSING = (56, 24)  # prompt and new tokens; the original window ends between them
INSIDE = (24, 24)


def policy_config():
    """Factor sets whose attention factors differ, so that a wrong one shows."""
    return replace(maker.longrope_config(), attention_factor=None, attention_factor_policy="su")


def prompt(length, *seeds):
    return torch.cat([random_tokens(maker.VOCAB, length, seed) for seed in seeds or (0,)])


def uncached(engine, tokens, max_new_tokens, factor_length=None):
    """Greedy tokens, each by a whole forward pass, under the one set of the pinned length."""
    own = engine.config
    chosen = own.factor_set_for(factor_length or tokens.shape[1] + max_new_tokens)
    engine.set_config(
        replace(
            own,
            factor_sets=(chosen,),
            attention_factor=own.attention_factor_for(chosen.max_length),
        )
    )
    length = tokens.shape[1]
    for _ in range(max_new_tokens):
        best = engine.logits(tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best.cpu()], dim=1)
    engine.set_config(own)
    return tokens[:, length:].tolist()


@pytest.fixture(scope="module")
def engines(megatron_runs):
    return {
        name: load_engine(run.path, longrope_config=policy_config(), device="cpu")
        for name, run in megatron_runs.items()
    }


@pytest.fixture
def engine(engines):
    return engines["untied_gqa"]


# Greedy decoding is what forward passes without a cache choose


@pytest.mark.parametrize("name", list(maker.VARIANTS))
@pytest.mark.parametrize(
    ("length", "new"), [CROSSING, INSIDE, (100, 12)], ids=["crossing", "inside", "beyond"]
)
def test_greedy_tokens_are_those_of_whole_forward_passes(engines, name, length, new):
    ours = generate(engines[name], prompt(length), new)
    assert len(ours[0]) == new
    assert ours == uncached(engines[name], prompt(length), new)


@pytest.mark.parametrize("name", list(maker.VARIANTS))
def test_transformers_arithmetic_generates_the_same_way(megatron_runs, name):
    engine = load_engine(
        megatron_runs[name].path, longrope_config=policy_config(), hf_parity=True, device="cpu"
    )
    assert generate(engine, prompt(56), 24) == uncached(engine, prompt(56), 24)


@pytest.mark.parametrize("name", ["same", "other"])
def test_a_hybrid_model_generates_too(hybrid_runs, name):
    engine = load_engine(hybrid_runs[name][0], longrope_config=policy_config(), device="cpu")
    assert generate(engine, prompt(56), 12) == uncached(engine, prompt(56), 12)


def made_of(shape, config, **options):
    """An engine with random weights."""
    process_groups.initialize()
    model = build_model(shape, config, **options)
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Engine(model, shape)


def test_a_partly_rotated_head_carries_the_attention_factor_with_its_angles(engine):
    factors = (1.0, 1.5, 2.5, 4.0)
    config = replace(
        policy_config(),
        rotary_dim=8,
        factor_sets=(FactorSet(ORIGINAL, (1.0,) * 4), FactorSet(maker.TARGET, factors)),
    )
    partly = made_of(replace(engine.shape, rotary_percent=0.5), config)
    assert generate(partly, prompt(56), 12) == uncached(partly, prompt(56), 12)


def test_interleaved_pairs_generate_too(engine):
    interleaved = made_of(replace(engine.shape, rotary_interleaved=True), policy_config())
    assert generate(interleaved, prompt(56), 12) == uncached(interleaved, prompt(56), 12)


def test_flash_attention_generates_what_sdpa_does(megatron_runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    process_groups.initialize()
    checkpoint = MegatronCheckpoint.open(megatron_runs["untied_gqa"].path)
    fake_flash_attn.calls.clear()
    results = []
    for kernel in (SdpaCoreAttention, FlashCoreAttention):
        model = build_model(checkpoint.shape, policy_config(), core_attention=kernel)
        load_into(model, checkpoint)
        engine = Engine(model.to(torch.bfloat16), checkpoint.shape)
        results.append(generate(engine, prompt(56), 6, prefill_chunk=40))
    assert fake_flash_attn.calls == Counter(flash_attn_func=maker.LAYERS * (2 + 5))
    assert results[0] == results[1]


@pytest.mark.one_release
@settings(max_examples=20)
@given(
    length=st.integers(2, 70),
    new=st.integers(1, 8),
    chunk=st.integers(1, 80),
    num_start_tokens=st.sampled_from([0, 5]),
)
def test_any_prompt_in_any_chunks_gives_the_tokens_of_whole_forward_passes(
    engines, length, new, chunk, num_start_tokens
):
    engine, own = engines["tied_mha"], policy_config()
    sets = [replace(item, num_start_tokens=num_start_tokens) for item in own.factor_sets]
    engine.set_config(replace(own, factor_sets=tuple(sets)))
    ours = generate(engine, prompt(length, 7), new, prefill_chunk=chunk)
    assert ours == uncached(engine, prompt(length, 7), new)
    engine.set_config(own)


def test_rows_of_a_batch_are_independent(engine):
    ours = generate(engine, prompt(60, 1, 2, 3), 10, prefill_chunk=25)
    assert ours == [generate(engine, prompt(60, seed), 10)[0] for seed in (1, 2, 3)]
    assert len({tuple(row) for row in ours}) == 3


# One set from the first token to the last


def test_the_factors_are_those_of_the_length_that_the_sequence_may_grow_to(engine):
    tokens = prompt(30)
    short, long = (generate(engine, tokens, new)[0] for new in (34, 35))  # up to 64 and 65 tokens
    assert short != long[:34]
    assert short == uncached(engine, tokens, 34)[0]
    assert long == uncached(engine, tokens, 35)[0]


def test_a_longer_factor_length_pins_the_set_of_that_length(engine):
    tokens = prompt(30)
    ours = generate(engine, tokens, 20, factor_length=maker.TARGET)
    assert ours == uncached(engine, tokens, 20, factor_length=maker.TARGET)
    assert ours != generate(engine, tokens, 20)


def test_one_rotary_table_serves_every_token(engine, monkeypatch):
    rotary = engine.model.rotary_pos_emb
    engine.set_config(engine.config)  # drops the tables of other tests
    built = []
    table = rotary._table
    monkeypatch.setattr(rotary, "_table", lambda *args: built.append(args) or table(*args))
    generate(engine, prompt(56), 24)
    assert len(built) == 1


# transformers


@pytest.fixture(scope="module")
def exported(megatron_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hf_folder(
        megatron_runs["untied_gqa"].path, folder, longrope_config=maker.longrope_config()
    )
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def parity(megatron_runs):
    """The engine with the arithmetic and the single attention factor of the exported model."""
    return load_engine(
        megatron_runs["untied_gqa"].path,
        longrope_config=maker.longrope_config(),
        hf_parity=True,
        device="cpu",
    )


@pytest.mark.one_release
@pytest.mark.parametrize(("length", "new"), [INSIDE, (80, 12)], ids=["short set", "long set"])
def test_inside_one_set_transformers_generates_the_same(exported, parity, length, new):
    theirs = exported.generate(
        prompt(length),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(parity, prompt(length), new) == theirs[:, length:].tolist()


@pytest.mark.one_release
@torch.no_grad()
def test_across_the_original_window_we_agree_with_transformers_without_its_cache(exported, parity):
    length, new = CROSSING
    ours = generate(parity, prompt(length), new)
    whole = torch.cat([prompt(length), torch.tensor(ours)], dim=1)
    theirs = exported(whole, use_cache=False).logits[0]
    assert ours[0] == theirs[length - 1 : -1].argmax(-1).tolist()
    # transformers' own cache keeps keys of the short factors for queries of the long ones.
    cached, past = None, None
    for part in (whole[:, :length], *whole[:, length:].split(1, dim=1)):
        step = exported(part, past_key_values=past, use_cache=True)
        cached, past = step.logits[0, -1], step.past_key_values
    assert (cached - theirs[-1]).abs().max() > 1e-2


# Prefill and memory


@pytest.fixture
def lengths(engine):
    """Tokens of each forward pass."""
    seen = []
    hook = engine.model.embedding.register_forward_hook(
        lambda module, arguments, output: seen.append(len(output))
    )
    yield seen
    hook.remove()


@pytest.mark.one_release
def test_no_more_tokens_than_the_chunk_are_in_flight(engine, lengths):
    generate(engine, prompt(56), 4, prefill_chunk=20)
    assert lengths == [20, 20, 16, 1, 1, 1]  # nothing follows the last new token


@pytest.mark.one_release
def test_logits_exist_for_the_last_position_alone(engine, monkeypatch):
    rows = []
    original = loss_module.logits_by_chunk
    monkeypatch.setattr(
        loss_module,
        "logits_by_chunk",
        lambda model, hidden, *rest: rows.append(len(hidden)) or original(model, hidden, *rest),
    )
    generate(engine, prompt(56, 1, 2), 4)
    assert rows == [2] * 4


@pytest.mark.one_release
def test_the_cache_has_the_models_dtype_and_its_key_value_heads(megatron_runs):
    engine = load_engine(
        megatron_runs["untied_gqa"].path,
        longrope_config=policy_config(),
        device="cpu",
        dtype=torch.bfloat16,
    )
    sequence = PinnedSequence(engine.model, 50, 50)
    with torch.no_grad():
        assert sequence.advance(prompt(40, 1, 2)).shape == (2, maker.HIDDEN)
    caches = [tensor for cache in sequence._caches.values() for tensor in cache._tensors]
    assert len(caches) == 2 * maker.LAYERS
    assert {tuple(cache.shape) for cache in caches} == {(50, 2, 2, maker.HEAD_DIM)}
    assert {cache.dtype for cache in caches} == {torch.bfloat16}


# Ends


@pytest.mark.one_release
def test_a_row_ends_with_its_first_end_of_text(engine):
    free = generate(engine, prompt(60, 1, 2), 12)
    eos = free[0][4]
    ended = generate(engine, prompt(60, 1, 2), 12, eos_ids=(eos, maker.VOCAB - 1))
    for row, whole in zip(ended, free, strict=True):
        cuts = [i for i, token in enumerate(whole) if token in (eos, maker.VOCAB - 1)]
        assert row == (whole[: cuts[0] + 1] if cuts else whole)
    assert len(ended[0]) <= 5


@pytest.mark.one_release
def test_a_callback_ends_a_row_and_sees_each_of_its_tokens_once(engine):
    free = generate(engine, prompt(60, 1, 2), 12)
    seen = []

    def stop(new):
        seen.append(list(new))
        return len(new) == (3 if new[0] == free[0][0] else 6)

    assert generate(engine, prompt(60, 1, 2), 12, stop=stop) == [free[0][:3], free[1][:6]]
    assert Counter(len(new) for new in seen) == {1: 2, 2: 2, 3: 2, 4: 1, 5: 1, 6: 1}


@pytest.mark.one_release
def test_nothing_is_computed_once_all_rows_have_ended(engine, lengths):
    generate(engine, prompt(60, 1, 2), 12, stop=lambda new: len(new) == 2)
    assert lengths == [60, 1]


# The engine afterwards


@pytest.mark.one_release
def test_the_engine_scores_as_before_and_keeps_no_cache(engine):
    before = engine.nll(prompt(100))
    generate(engine, prompt(56), 24)
    assert torch.equal(engine.nll(prompt(100)), before)
    for layer in engine.model.decoder.layers:
        assert "forward" not in vars(layer.self_attention.core_attention)


@pytest.mark.one_release
def test_an_exception_in_a_layer_leaves_the_engine_as_it_was(engine, monkeypatch):
    before = engine.nll(prompt(100))
    last = engine.model.decoder.layers[-1].self_attention.core_attention
    monkeypatch.setattr(last, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(engine, prompt(56), 24)
    monkeypatch.undo()
    assert torch.equal(engine.nll(prompt(100)), before)


@pytest.mark.one_release
def test_a_callback_may_use_the_engine(engine):
    expected = generate(engine, prompt(56), 12)
    losses = []

    def stop(new):
        losses.append(engine.nll(prompt(20)))  # another set, another attention factor
        return False

    assert generate(engine, prompt(56), 12, stop=stop) == expected
    assert torch.equal(losses[0], engine.nll(prompt(20)))


# What is refused


@pytest.mark.one_release
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; it must be an integer of at least 1"),
        ({"factor_length": 43}, "factor_length 43 is below the 44 tokens .* lower max_new_tokens"),
        ({"factor_length": 257}, "sequence length 257 exceeds 256"),
        ({"max_new_tokens": 217}, "sequence length 257 exceeds 256"),
    ],
)
def test_arguments_out_of_range_are_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        generate(engine, prompt(40), **{"max_new_tokens": 4, **options})


@pytest.mark.one_release
def test_a_token_outside_the_vocabulary_is_refused(engine):
    with pytest.raises(ValueError, match="token id 250 is outside the vocabulary of 250"):
        generate(engine, torch.tensor([[1, maker.VOCAB]]), 4)


# Several processes

LAYOUTS = [(2, 1), (1, 4), (2, 2)]  # tensor x context parallel
WORLD = 4
PROMPTS = [(56, 10), (3, 3), (101, 3)]  # across the original window; less than a token a chunk


def results_of(engine):
    """Tokens, and the hidden state that the first new one was chosen by."""
    results = {}
    for length, new in PROMPTS:
        tokens = prompt(length, 1, 2)
        for chunk in (None, 25) if length == 101 else (None,):
            results[length, chunk] = generate(engine, tokens, new, prefill_chunk=chunk)
    sequence = PinnedSequence(engine.model, 101, 101)
    with torch.no_grad():
        for part in prompt(101, 1).split(33, dim=1):
            results["hidden"] = sequence.advance(part)
    caches = [tensor for cache in sequence._caches.values() for tensor in cache._tensors]
    results["room"] = max(len(tensor) for tensor in caches)
    return results


def run_rank(rank, directory, checkpoint):
    """One of four processes: all layouts, one after another, with copies where they are smaller."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    results = {}
    for tensor, context in LAYOUTS:
        engine = load_engine(
            checkpoint, tensor_parallel=tensor, context_parallel=context, replicas=True,
            longrope_config=policy_config(), device="cpu",
        )  # fmt: skip
        before = engine.nll(prompt(96))
        results[tensor, context] = results_of(engine)
        assert torch.equal(engine.nll(prompt(96)), before)
        parallel_state.destroy_model_parallel()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.one_release
@pytest.mark.slow
def test_ranks_that_share_layers_or_sequences_generate_what_whole_forward_passes_choose(
    engine, megatron_runs, tmp_path
):
    """Processes of their own, because gloo's collectives are what is tested."""
    spawn(run_rank, (str(tmp_path), str(megatron_runs["untied_gqa"].path)), WORLD)
    alone = results_of(engine)
    expected = {length: uncached(engine, prompt(length, 1, 2), new) for length, new in PROMPTS}
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for (_, context), results in found.items():
            for length, tokens in expected.items():
                assert results[length, None] == results.get((length, 25), tokens) == tokens
            torch.testing.assert_close(results["hidden"], alone["hidden"], atol=2e-6, rtol=2e-5)
            assert results["room"] <= (101 if context == 1 else 101 // context + 2 * context)
