"""The cost of a search: operations, memory, hours."""

from types import SimpleNamespace

import pytest

from megatron_longrope.plan import search_cost
from megatron_longrope.plan.hardware import GPUS, parse_gpu
from megatron_longrope.plan.model import MODELS, Model
from megatron_longrope.plan.search_cost import SearchCost
from megatron_longrope.progress import format_duration


def shape(model, **changes):
    """What a checkpoint's shape has besides."""
    more = {"padded_vocab_size": model.vocab_size, "rotary_dim": model.rotary_dim}
    return SimpleNamespace(**{**vars(model), **more, "hybrid_layer_pattern": None, **changes})


LLAMA_2_7B, LLAMA_3_8B = (shape(MODELS[name]) for name in ("llama2-7b", "llama3-8b"))
PAPER = dict(samples=5, evaluations=1344, gpu=GPUS["h100"])


def seven_b(length=262144, **changes):
    return SearchCost(LLAMA_2_7B, target_length=length, **{**PAPER, **changes})


# Operations


@pytest.mark.parametrize(
    ("length", "flops", "attention"),
    [
        (4096, 5.9e13, 0.08),
        (131072, 6.2e15, 0.72),
        (262144, 2.2e16, 0.84),
        (1048576, 3.0e17, 0.95),
        (2097152, 1.2e18, 0.98),
    ],
)
def test_a_llama_2_7b_forward_costs_what_the_published_table_says(length, flops, attention):
    result = seven_b(length)
    # The table has two digits and rounds up once (2.15e16).
    assert result.sample_flops == pytest.approx(flops, rel=0.025)
    assert round(result.attention_share, 2) == pytest.approx(attention, abs=0.006)


def test_operations_are_counted_matrix_by_matrix():
    n, h, f, d = 100, 4096, 14336, 128
    q, k = 32 * d, 8 * d
    matrices = (h * q, h * k, h * k, q * h, h * f, h * f, f * h)
    pairs = n * n / 2  # of a query and a key that it sees
    theirs = 2 * n * h * 128256 + 32 * (sum(2 * n * m for m in matrices) + 2 * 2 * pairs * q)
    ours = SearchCost(LLAMA_3_8B, target_length=n, **PAPER)
    assert ours.sample_flops == theirs


def test_grouped_queries_save_projections_and_no_attention():
    grouped, whole = (
        SearchCost(model, target_length=4096, **PAPER)
        for model in (LLAMA_3_8B, shape(MODELS["llama3-8b"], num_query_groups=32))
    )
    saved = 32 * 2 * 4096 * (2 * 4096 * (4096 - 1024))
    assert whole.sample_flops - grouped.sample_flops == saved


def test_a_hybrid_model_of_the_same_layers_costs_the_same():
    hybrid = shape(MODELS["llama2-7b"], hybrid_layer_pattern="*-" * 32)
    theirs, ours = SearchCost(hybrid, target_length=4096, **PAPER), seven_b(4096)
    assert (theirs.sample_flops, theirs.memory) == (ours.sample_flops, ours.memory)


def test_the_papers_search_at_256k():
    result = seven_b()
    assert result.evaluation_flops == 5 * result.sample_flops
    assert f"{result.search_flops:.1e}" == "1.4e+20"
    # "11 days on an A100 at 150 TFLOP/s"
    a100 = seven_b(gpu=GPUS["a100-80"], mfu=150 / 312)
    assert a100.hours / 24 == pytest.approx(11, abs=0.5)


# Hours


def test_replicas_share_evaluations_and_parallel_ranks_share_one():
    one = seven_b()
    assert seven_b(mfu=0.4).hours == pytest.approx(one.search_flops / (989e12 * 0.4) / 3600)
    assert seven_b(replicas=8).hours == pytest.approx(one.hours / 8)
    assert seven_b(context_parallel=8).hours == pytest.approx(one.hours / 8)
    both = seven_b(tensor_parallel=2, context_parallel=2, replicas=2)
    assert both.num_gpus == 8
    assert both.gpu_hours == pytest.approx(one.gpu_hours)


def test_an_evaluation_left_over_takes_a_round_of_its_own():
    assert seven_b(evaluations=9, replicas=8).hours == pytest.approx(
        2 * seven_b().evaluation_seconds / 3600
    )


def test_a_given_utilisation_is_that_of_all_operations():
    assert seven_b(mfu=0.2).hours == pytest.approx(2 * seven_b(mfu=0.4).hours)
    assert seven_b(mfu=0.2, tensor_parallel=4).utilisation == pytest.approx(0.2)
    assert 0.27 < seven_b().utilisation < seven_b(4096).utilisation < 0.45


# Memory


def test_weights_are_two_bytes_each_in_half_precision():
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert seven_b().memory["weights"] == 2 * weights
    assert seven_b(dtype="float32").memory["weights"] == 4 * weights
    assert seven_b(tensor_parallel=4).memory["weights"] == pytest.approx(weights / 2)


def test_memory_is_linear_in_the_length_where_attention_has_the_peak():
    peaks = [seven_b(length).peak_bytes for length in (2**17, 2**18, 2**19)]
    assert peaks[2] - peaks[1] == 2 * (peaks[1] - peaks[0])


@pytest.mark.parametrize(
    ("groups", "tokens", "mebibytes"),
    [(8, 12288, 248.9), (8, 16384, 332.0), (8, 20480, 414.2), (2, 12288, 222.5), (2, 16384, 283.7)],
)
def test_the_memory_formula_meets_what_a_cpu_process_was_measured_to_need(
    groups, tokens, mebibytes
):
    measured = shape(Model(2, 512, 1376, 8, groups, 8192, 64))
    result = SearchCost(measured, target_length=tokens, dtype="float32", **PAPER)
    grown = result.peak_bytes - result.memory["weights"]
    assert grown / 2**20 == pytest.approx(mebibytes, rel=0.02)


def test_mlp_slice_and_logits_chunk_do_not_grow_with_the_length():
    short, long = (seven_b(length).memory for length in (8192, 2097152))
    for part in ("MLP: slice", "logits: chunk", "weights"):
        assert short[part] == long[part]


def test_context_parallelism_divides_what_grows_and_adds_the_ring():
    one, eight = seven_b().memory, seven_b(context_parallel=8).memory
    assert one["attention: key-value ring"] == 0
    assert 8 * eight["hidden states"] == one["hidden states"]
    tokens, width = 262144 // 8, 4096
    blocks = 3 * 2 * width * 2 * tokens
    assert eight["attention: key-value ring"] == blocks + tokens * width * (3 * 4 + 2)


def test_a_batch_needs_the_memory_of_a_longer_sample():
    batch, longer = (
        seven_b(length, batch=batch).memory for length, batch in ((4096, 2), (8192, 1))
    )
    assert batch == longer


def test_a_7b_model_fits_256k_in_80_gib_and_not_2048k():
    assert seven_b(262144).fits
    assert not seven_b(2097152).fits
    assert "does NOT fit in 72 GiB" in "\n".join(seven_b(2097152).lines())


@pytest.mark.parametrize("name", ["TOKENS_PER_MLP_SLICE", "LOGITS_PER_CHUNK"])
def test_the_engines_sizes_are_the_ones_assumed(name):
    pytest.importorskip("megatron.core")
    from megatron_longrope.engine import loss, mlp

    theirs = {
        "TOKENS_PER_MLP_SLICE": mlp._TOKENS_PER_SLICE,
        "LOGITS_PER_CHUNK": loss._LOGITS_PER_CHUNK,
    }
    assert getattr(search_cost, name) == theirs[name]


# Text


def test_the_lines_name_every_number_and_the_assumption():
    text = "\n".join(seven_b(context_parallel=4, replicas=2).lines())
    assert "one sample of 262144 tokens: 2.1e+16 FLOP, 84% of it attention" in text
    assert "one evaluation of 5 samples" in text
    assert "1344 evaluations: 1.4e+20 FLOP" in text
    assert (
        "8 GPUs (h100, 989 TFLOP/s each): tensor parallel 1 x context parallel 4 x 2 repl" in text
    )
    assert "assuming 29% of peak" in text
    for part in seven_b().memory:
        assert f"  {part}: " in text


def test_one_of_anything_is_no_plural():
    text = "\n".join(seven_b(4096, samples=1, evaluations=1).lines())
    for singular in ("1 sample:", "1 evaluation:", "1 GPU (", "1 replica"):
        assert singular in text
    assert "1 replicas" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.21 s"), (119, "119 s"), (600, "10 min"), (36000, "10.0 h"), (864000, "240.0 h")],
)
def test_durations_are_in_units_that_people_read(seconds, text):
    assert format_duration(seconds) == text


# GPUs


@pytest.mark.parametrize("text", ["h100", " H100 "])
def test_a_known_gpu_is_found_by_name(text):
    assert parse_gpu(text) == GPUS["h100"]


def test_another_gpu_is_two_numbers():
    gpu = parse_gpu("312:80")
    assert (gpu.tflops, gpu.gib) == (312, 80)


@pytest.mark.parametrize("text", ["v100", "", "312", "312:", "0:80", "nan:80", "312:inf", "1:2:3"])
def test_an_unknown_gpu_is_refused_with_those_known(text):
    with pytest.raises(ValueError, match=r"a100-40, a100-80, h100, h200, b200, or .* 312:80"):
        parse_gpu(text)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples is 0; give 1 or more"),
        ({"replicas": -1}, "replicas is -1"),
        ({"mfu": 0}, r"--mfu 0 is not in \(0, 1\]"),
        ({"mfu": 1.5}, r"--mfu 1\.5 is not in \(0, 1\]"),
        ({"tensor_parallel": 5}, "5 does not divide the 32 query groups"),
        ({"length": 262142, "context_parallel": 4}, "does not split into 8 chunks"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        seven_b(**changes)
