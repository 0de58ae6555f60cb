"""`LongRopeRotaryEmbedding` against megatron-core, transformers and a formula of its own."""

import copy
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from angles import distance_on_the_circle

pytest.importorskip("megatron.core")

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_longrope import rotary as rotary_module
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.context_parallel import zigzag_positions
from megatron_longrope.rotary import LongRopeRotaryEmbedding

DIM = 16
SHORT = (1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3)
MIDDLE = (1.0, 1.3, 1.3, 1.7, 2.1, 2.3, 2.9, 3.1)
LONG = (1.0, 1.1, 1.5, 2.7, 3.3, 4.9, 6.1, 7.7)


def config_of(*sets: FactorSet, original: int = 64, dim: int = DIM, **options) -> LongRopeConfig:
    return LongRopeConfig(
        rotary_base=10000.0,
        rotary_dim=dim,
        original_max_position_embeddings=original,
        factor_sets=sets,
        **options,
    )


THREE_SETS = config_of(FactorSet(64, SHORT), FactorSet(128, MIDDLE), FactorSet(512, LONG))


class FakeGroup:
    """What the rotary module asks of a context-parallel group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def angles_in_numpy(positions, factors, num_start_tokens=0, dim=DIM, base=10000.0):
    """Equation 3 of the paper in fp64, position by position."""
    table = np.zeros((len(positions), dim // 2))
    for row, n in enumerate(positions):
        for i in range(dim // 2):
            beta = base ** (2 * i / dim)
            table[row, i] = n / beta if n < num_start_tokens else n / (factors[i] * beta)
    return table


# Against megatron-core


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_all_ones_is_megatrons_own_table_bit_for_bit(monkeypatch, percent, interleaved):
    options = {"kv_channels": 32, "rotary_percent": percent, "rotary_interleaved": interleaved}
    stock = RotaryEmbedding(**options, rotary_base=10000, use_cpu_initialization=True)
    ours = LongRopeRotaryEmbedding(identity_config(10000, int(32 * percent), 2**21), **options)
    assert torch.equal(ours.get_freqs_non_repeated(1000), stock.get_freqs_non_repeated(1000))
    # Stock forward asks CUDA for a device; answer with the CPU.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    for length, offset in ((140000, 0), (100, 2**21 - 100)):
        theirs = stock.get_emb(length, offset=offset)
        table = ours(length, offset=offset)
        assert torch.equal(table, theirs)
        assert table.shape == theirs.shape == (length, 1, 1, int(32 * percent))
        assert table.dtype == theirs.dtype == torch.float32


def test_all_ones_rotates_by_the_frequencies_that_stock_has_computed_on_its_device():
    """A GPU's pow may round one of them differently from the CPU's."""
    tables = []
    for parity in (False, True):
        ones = LongRopeRotaryEmbedding(identity_config(10000.0, 8, 4096), 8, hf_parity=parity)
        ones.inv_freq = torch.nextafter(ones.inv_freq, torch.tensor(2.0))
        tables.append(ones(4096)[:, 0, 0, :4])
    assert torch.equal(tables[0], torch.outer(torch.arange(4096.0), ones.inv_freq))
    assert not torch.equal(*tables)


def test_all_ones_with_start_tokens_is_still_megatrons_table():
    ones = config_of(FactorSet(64, (1.0,) * 8, num_start_tokens=5))
    stock = RotaryEmbedding(DIM, 1.0, use_cpu_initialization=True)
    ours = LongRopeRotaryEmbedding(ones, DIM)
    assert torch.equal(ours.get_freqs_non_repeated(64), stock.get_freqs_non_repeated(64))


# Angles


@pytest.mark.parametrize("num_start_tokens", [0, 1, 7, 200])
def test_angles_equal_the_papers_equation(num_start_tokens):
    config = config_of(FactorSet(64, SHORT), FactorSet(256, MIDDLE, num_start_tokens))
    table = LongRopeRotaryEmbedding(config, DIM)(200)
    assert table.shape == (200, 1, 1, DIM)
    expected = angles_in_numpy(range(200), MIDDLE, num_start_tokens)
    first, second = table[:, 0, 0].chunk(2, dim=-1)
    assert torch.equal(first, second)
    assert distance_on_the_circle(first, expected) < 1e-6


def test_the_table_has_exactly_the_rows_that_were_asked_for():
    # megatron-core reads a longer table of packed sequences as absolute positions.
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    rotary(128)
    for length in (128, 100, 65, 1):
        assert rotary(length).shape == (length, 1, 1, DIM)
        assert rotary(length, packed_seq=True).shape == (length, 1, 1, DIM)


def test_offset_moves_the_positions_and_counts_for_the_choice_of_the_set():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    assert torch.equal(rotary(10, offset=118), rotary(128)[118:])
    assert torch.equal(rotary(10, offset=119), rotary(129)[119:])
    assert torch.equal(rotary.get_emb(10, offset=118), rotary(128)[118:])
    cos, sin = rotary.get_cos_sin(10, offset=118)
    assert torch.equal(cos, torch.cos(rotary(128)[118:, 0, 0, : DIM // 2]))
    assert torch.equal(sin, torch.sin(rotary(128)[118:, 0, 0, : DIM // 2]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("length", "hf_parity"), [(64, False), (128, True), (500, False)])
def test_angles_once_are_those_of_the_table(length, hf_parity, interleaved):
    rotary = LongRopeRotaryEmbedding(
        THREE_SETS, DIM, rotary_interleaved=interleaved, hf_parity=hf_parity
    )
    once = rotary.get_freqs_non_repeated(length)
    assert once.shape == (length, DIM // 2)
    table = rotary(length)[:, 0, 0]
    first, second = (table[:, 0::2], table[:, 1::2]) if interleaved else table.chunk(2, dim=-1)
    assert torch.equal(once, first)
    assert torch.equal(once, second)


def test_a_partly_rotated_head_gets_angles_for_the_rotated_part_only():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, kv_channels=40, rotary_percent=0.4)
    assert rotary(100).shape == (100, 1, 1, DIM)
    assert torch.equal(rotary(100), LongRopeRotaryEmbedding(THREE_SETS, DIM)(100))


# Choice of the set


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 64), (63, 64), (64, 64), (65, 128), (128, 128), (129, 512), (512, 512)],
)
def test_auto_takes_the_smallest_set_that_covers_the_sequence(length, expected):
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    factors = {64: SHORT, 128: MIDDLE, 512: LONG}[expected]
    assert rotary.factor_set(length).max_length == expected
    ours = rotary(length)[:, 0, 0, : DIM // 2]
    assert distance_on_the_circle(ours, angles_in_numpy(range(length), factors)) < 1e-6


@pytest.mark.parametrize("length", [1, 64, 65, 512])
@pytest.mark.parametrize(("mode", "factors"), [("long", LONG), ("short", SHORT)])
def test_long_and_short_take_one_set_for_every_length(mode, factors, length):
    ours = LongRopeRotaryEmbedding(THREE_SETS, DIM, mode=mode)(length)[:, 0, 0, : DIM // 2]
    assert distance_on_the_circle(ours, angles_in_numpy(range(length), factors)) < 1e-6


@pytest.mark.parametrize("mode", ["auto", "long"])
def test_a_sequence_beyond_the_largest_set_is_refused(mode):
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, mode=mode)
    with pytest.raises(ValueError, match="sequence length 513 exceeds 512"):
        rotary(513)


def test_attention_factor_follows_the_set_in_use():
    at = [LongRopeRotaryEmbedding(THREE_SETS, DIM, mode=m) for m in ("auto", "long", "short")]
    long = (1 + np.log(512 / 64) / np.log(64)) ** 0.5
    middle = (1 + np.log(128 / 64) / np.log(64)) ** 0.5
    assert [rotary.attention_factor(100) for rotary in at] == pytest.approx([middle, long, 1.0])
    assert [rotary.attention_factor(64) for rotary in at] == pytest.approx([1.0, long, 1.0])


# Swapping factors


def test_swapping_factors_never_returns_a_stale_table():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    seen = [rotary(128)]
    rotary.get_cos_sin(128)
    for factor in (1.5, 2.5, 3.5):
        factors = (1.0, *[factor] * 7)
        rotary.set_config(THREE_SETS.with_factor_set(FactorSet(128, factors)))
        table = rotary(128)[:, 0, 0, : DIM // 2]
        assert distance_on_the_circle(table, angles_in_numpy(range(128), factors)) < 1e-6
        assert torch.equal(rotary.get_cos_sin(128)[0], torch.cos(table))
        seen.append(rotary(128))
    rotary.set_config(THREE_SETS)
    assert torch.equal(rotary(128), seen[0])
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_changing_the_mode_or_parity_never_returns_a_stale_table():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    auto = rotary(100)
    rotary.selection = replace(rotary.selection, mode="long")
    long = rotary(100)
    rotary.hf_parity = True
    parity = rotary(100)
    assert not torch.equal(auto, long)
    assert not torch.equal(long, parity)


def test_tables_that_inference_has_made_can_be_trained_with():
    """RL trains between rollouts: what attention saves for its backward must not be inference's."""
    rotary = LongRopeRotaryEmbedding(THREE_SETS, kv_channels=DIM)
    with torch.inference_mode():
        made = [rotary(64), *rotary.get_cos_sin(64)]
    assert rotary(64) is made[0] and rotary.get_cos_sin(64)[0] is made[1]
    query = torch.ones(64, 1, 1, DIM, requires_grad=True)
    (query * made[0]).sum().backward()  # saves the table
    torch.testing.assert_close(query.grad, made[0])
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in made)


def test_at_most_two_tables_are_cached_and_the_same_object_is_returned():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    first = rotary(100)
    assert rotary(100) is first
    for length in range(1, 60):
        rotary(length)
        assert len(rotary._tables) <= 2
    assert rotary(100) is not first


# Against transformers


@pytest.mark.parametrize("length", [64, 65, 512])
def test_hf_parity_equals_transformers_cos_and_sin_bit_for_bit(length):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=DIM,
            num_attention_heads=1,
            head_dim=DIM,
            max_position_embeddings=512,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "longrope",
                "short_factor": list(SHORT),
                "long_factor": list(LONG),
                "original_max_position_embeddings": 64,
                "factor": 8.0,
                "attention_factor": 1.0,
            },
        )
    )
    config = config_of(FactorSet(64, SHORT), FactorSet(512, LONG))
    rotary = LongRopeRotaryEmbedding(config, DIM, hf_parity=True)
    cos, sin = theirs(torch.zeros(1, length, DIM), torch.arange(length)[None])
    assert torch.equal(rotary(length)[:, 0, 0].cos(), cos[0])
    assert torch.equal(rotary(length)[:, 0, 0].sin(), sin[0])
    expected = torch.arange(length).float()[:, None] * theirs.inv_freq
    assert torch.equal(rotary.get_freqs_non_repeated(length), expected)


# Context parallelism


@pytest.mark.parametrize("cp_size", [2, 4])
def test_a_context_parallel_rank_builds_its_own_rows_and_never_the_whole_table(
    monkeypatch, cp_size
):
    whole = LongRopeRotaryEmbedding(THREE_SETS, DIM)(128, offset=8)
    built = []
    build = rotary_module.build_table

    def recorded(chunks, **options):
        built.append(sum(map(len, chunks)))
        return build(chunks, **options)

    monkeypatch.setattr(rotary_module, "build_table", recorded)
    for rank in range(cp_size):
        group = FakeGroup(rank, cp_size)
        rows = zigzag_positions(128, rank, cp_size)
        own = LongRopeRotaryEmbedding(THREE_SETS, DIM, cp_group=group)(128, offset=8)
        passed = LongRopeRotaryEmbedding(THREE_SETS, DIM)(128, offset=8, cp_group=group)
        assert torch.equal(own, whole[rows]) and torch.equal(passed, whole[rows])
    assert set(built) == {128 // cp_size}


def test_the_set_follows_the_global_length_under_context_parallelism():
    # 128 tokens on 4 ranks: 32 local rows, but the factors of the 128 set.
    table = LongRopeRotaryEmbedding(THREE_SETS, DIM, cp_group=FakeGroup(0, 4))(128)
    expected = angles_in_numpy(zigzag_positions(128, 0, 4).tolist(), MIDDLE)
    assert distance_on_the_circle(table[:, 0, 0, : DIM // 2], expected) < 1e-6


def test_packed_sequences_take_the_whole_table_under_context_parallelism():
    group = FakeGroup(1, 4)
    packed = LongRopeRotaryEmbedding(THREE_SETS, DIM, cp_group=group)(128, packed_seq=True)
    assert torch.equal(packed, LongRopeRotaryEmbedding(THREE_SETS, DIM)(128))


def test_packed_and_sharded_tables_do_not_share_a_cache_entry():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, cp_group=FakeGroup(1, 4))
    assert rotary(128).shape[0] == 32
    assert rotary(128, packed_seq=True).shape[0] == 128
    assert rotary(128).shape[0] == 32


def test_an_indivisible_length_is_refused_under_context_parallelism():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, cp_group=FakeGroup(0, 4))
    with pytest.raises(ValueError, match="not divisible by 2 x context parallel size 4"):
        rotary(100)


# A guest in a model


def test_nothing_is_a_parameter_a_buffer_or_in_the_state():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    rotary(128)
    assert not list(rotary.parameters())
    assert not list(rotary.buffers())
    assert not rotary.state_dict()


def test_casting_the_model_to_bf16_leaves_frequencies_and_tables_fp32():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), LongRopeRotaryEmbedding(THREE_SETS, DIM))
    before = model[1](128)
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].inv_freq.dtype == torch.float32
    model[1].set_config(THREE_SETS)
    assert model[1](128).dtype == torch.float32
    assert torch.equal(model[1](128), before)


def test_a_copy_of_a_module_swaps_factors_on_its_own():
    first = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    before = first(128).clone()
    second = copy.deepcopy(first)
    second.set_config(THREE_SETS.with_factor_set(FactorSet(128, LONG)))
    assert torch.equal(first(128), before)
    assert not torch.equal(second(128), before)


def test_printing_a_model_shows_the_factor_sets():
    text = repr(LongRopeRotaryEmbedding(THREE_SETS, DIM, mode="long"))
    assert "rotary_dim=16, factor sets up to [64, 128, 512], mode=long" in text


# Refusals


def test_factors_of_another_head_dimension_are_refused():
    with pytest.raises(ValueError) as error:
        LongRopeRotaryEmbedding(THREE_SETS, kv_channels=32)
    assert str(error.value) == (
        "rotary_dim 16 of the LongRoPE config differs from the model's 32 (head dimension x rotary "
        "percent); use factors of this model"
    )


def test_factors_of_another_rotary_base_are_refused():
    with pytest.raises(ValueError) as error:
        LongRopeRotaryEmbedding(THREE_SETS, DIM, rotary_base=500000)
    assert str(error.value) == (
        "rotary_base 10000.0 of the LongRoPE config differs from the model's 500000; use factors "
        "that were searched for this base"
    )


def test_a_refused_swap_keeps_the_old_factors():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    before = rotary(128)
    with pytest.raises(ValueError, match="rotary_dim 8"):
        rotary.set_config(identity_config(10000, 8, 64))
    assert rotary.config is THREE_SETS
    assert torch.equal(rotary(128), before)


@pytest.mark.parametrize("option", [{"seq_len_interpolation_factor": 2}, {"rope_scaling": True}])
def test_a_second_scaling_of_the_positions_is_refused(option):
    with pytest.raises(ValueError, match="would scale positions twice; remove that flag"):
        LongRopeRotaryEmbedding(THREE_SETS, DIM, **option)


# A training run


def test_documents_of_a_run_keep_the_runs_set():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, run_length=512)
    whole = rotary(512, packed_seq=True)
    assert torch.equal(rotary(40, packed_seq=True), whole[:40])


def test_a_sequence_that_needs_another_attention_factor_than_the_run_carries_is_refused():
    carried = THREE_SETS.attention_factor_for(128)
    rotary = LongRopeRotaryEmbedding(
        THREE_SETS, DIM, run_length=128, carried_attention_factor=carried
    )
    rotary(64)
    for ask in (rotary, rotary.get_emb):
        with pytest.raises(ValueError) as error:
            ask(10, offset=119)
        assert str(error.value) == (
            "a sequence of 129 tokens needs attention factor 1.22474, but this run carries 1.08012,"
            " that of 128 tokens; set --seq-length to the longest sequence of the run"
        )


@pytest.mark.parametrize("in_cos_sin", [False, True])
def test_flash_decoding_gets_the_factor_with_cos_and_sin_where_nothing_else_carries_it(in_cos_sin):
    scale = SimpleNamespace(capacity=64)  # of a static batch that was served without them
    rotary = LongRopeRotaryEmbedding(
        THREE_SETS, DIM, factor_in_cos_sin=in_cos_sin, document_scale=scale
    )
    factor = THREE_SETS.attention_factor_for(128) if in_cos_sin else 1.0
    expected = angles_in_numpy(range(40, 100), MIDDLE)
    for ours, function in zip(rotary.get_cos_sin(60, offset=40), (np.cos, np.sin), strict=True):
        assert np.abs(ours.numpy() - factor * function(expected)).max() < 1e-6
    assert scale.capacity is None


def test_cosines_and_sines_follow_the_length_that_the_factors_are_pinned_to():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM)
    for length, factors in ((0, SHORT), (512, LONG)):
        rotary.selection = replace(rotary.selection, pinned_length=length)
        expected = np.cos(angles_in_numpy(range(60), factors))
        assert np.abs(rotary.get_cos_sin(60)[0].numpy() - expected).max() < 1e-6


# Mixed windows


def pack(*lengths: int, padded: bool = False) -> SimpleNamespace:
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return SimpleNamespace(
        cu_seqlens_q=offsets // 2 if padded else offsets,  # with padding the tokens alone
        cu_seqlens_q_padded=offsets if padded else None,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_a_mixed_pack_has_a_row_per_token_with_each_documents_own_factors(padded):
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, mode="mixed", run_length=128)
    lengths = (10, 100, 64, 65, 10)
    for _ in range(2):  # the second pack reads cached tables
        longest = rotary.get_rotary_seq_len(None, None, None, None, pack(*lengths, padded=padded))
        table = rotary(longest, packed_seq=True)
        assert table.shape == (sum(lengths), 1, 1, DIM)
        expected = np.concatenate(
            [angles_in_numpy(range(n), SHORT if n <= 64 else MIDDLE) for n in lengths]
        )
        assert distance_on_the_circle(table[:, 0, 0, : DIM // 2], expected) < 1e-6
        # As long as the set and the run allow: no later pack makes them again.
        assert sorted(map(len, rotary._tables.values())) == [64, 128]


def test_changing_the_parity_never_returns_a_stale_table_of_a_document():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, mode="mixed", run_length=128)
    rows = rotary.get_rotary_seq_len(None, None, None, None, pack(100, 10))
    exact = rotary(rows, packed_seq=True)
    rotary.hf_parity = True
    assert not torch.equal(rotary(rows, packed_seq=True), exact)


def test_a_mixed_run_refuses_a_batch_that_is_not_packed():
    rotary = LongRopeRotaryEmbedding(THREE_SETS, DIM, mode="mixed", run_length=128)
    with pytest.raises(ValueError, match="--longrope-mode mixed got a batch that is not packed"):
        rotary.get_rotary_seq_len(None, None, torch.zeros(128, 1, 4), SimpleNamespace())
