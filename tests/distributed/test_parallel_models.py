"""Models in every parallel layout train like a plain fp64 decoder in one process.

Two real gloo processes take one layout after the other; what they computed is compared here.
"""

import functools
import inspect
from pathlib import Path
from unittest import mock

import pytest
import tiny_gpt
import torch
import torch.distributed as dist
from launching import spawn
from reference_decoder import Weights
from tiny_gpt import RUN, decoder, fill, random_tokens, start_run

pytest.importorskip("megatron.training")

from megatron_longrope.context_parallel import shard, shard_documents
from megatron_longrope.integration import compat

pytestmark = pytest.mark.slow

WORLD, LAYERS = 2, 4
LENGTHS = (24, 40, 8)  # documents of a pack; each splits into 2 x CP chunks
BORDERS = [0, 24, 64, 72]
FORMATS = {"sequence": (2, RUN), "packed": (1, sum(LENGTHS))}  # rows and tokens of a batch
VARIANTS = {  # name: Megatron's arguments, TransformerConfig, the reference's rotation
    "softmax": ({}, {}, {}),
    "rope": ({"longrope_attention_factor_carrier": "rope"}, {}, {}),
    "half of each head, interleaved": (
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"rotary_dim": 4, "interleaved": True},
    ),
}
TENSOR, SEQUENCE = "tensor parallel", "sequence parallel"
PIPELINE, VIRTUAL = "pipeline", "virtual pipeline"
CONTEXT, RECOMPUTED = "context parallel", "context parallel, recomputed"


# What a rank holds of the whole weights


def local_part(name: str, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The rows or columns of a tensor-parallel rank."""
    if name.endswith("linear_fc1.weight"):  # gate and up projection, each split
        return torch.cat([half.chunk(size)[rank] for half in weight.chunk(2)])
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return weight.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return weight.chunk(size, dim=1)[rank]
    return weight


def whole_names(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a pipeline chunk under the names of the whole model."""
    numbers = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
    parameters = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            prefix, layers, number, rest = name.split(".", 3)
            name = f"{prefix}.{layers}.{numbers[int(number)]}.{rest}"
        parameters[name] = parameter
    return parameters


def load(chunk: torch.nn.Module, weights: Weights) -> None:
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in whole_names(chunk).items():
            parameter.copy_(local_part(name, weights[name], rank, size))


# In the processes


def lay_out(**sizes: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def pack():
    from megatron.core.packed_seq_params import PackedSeqParams

    offsets = torch.tensor(BORDERS, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )


def run(chunk, tokens, labels, form: str) -> torch.Tensor:
    """A pipeline chunk's output: losses `[b, s]` on the last, hidden states before."""
    options = {"packed_seq_params": pack()} if form == "packed" else {}
    positions = torch.arange(tokens.shape[1])[None]  # which RoPE does not read
    return chunk(tokens, positions, None, labels=labels, **options)


def gradients_of(chunk) -> Weights:
    return {name: parameter.grad for name, parameter in whole_names(chunk).items()}


def tensor_parallel(weights: Weights, variant: str, form: str, sequence_parallel: bool):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    arguments, options, _ = VARIANTS[variant]
    args = start_run(**arguments)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    norm = sequence_parallel_norm()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    block = TransformerBlockSubmodules(layer_specs=[spec] * LAYERS, layer_norm=norm)
    chunk = tiny_gpt.build(
        args,
        layers=LAYERS,
        model_options={"spec": block} if sequence_parallel else None,
        tensor_model_parallel_size=WORLD,
        sequence_parallel=sequence_parallel,
        **options,
    )
    load(chunk, weights)
    losses = run(chunk, *random_tokens(*FORMATS[form]), form)
    # Sequence parallelism asks in its backward pass, where no torch function mode is active.
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")):
        losses.sum().backward()
    if sequence_parallel:  # each rank's norms have seen its part of the tokens
        for parameter in chunk.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad)
    return {"losses": losses.detach(), "gradients": gradients_of(chunk)}


def sequence_parallel_norm() -> type:
    """RMSNorm for sequence parallelism, which megatron-core's torch norm refuses.

    Transformer Engine's and Apex's norms mark their weights for the reduction like this.
    """

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size, eps=1e-5, **_):
            super().__init__(hidden_size, eps=eps)
            self.weight.sequence_parallel = config.sequence_parallel

    return Norm


def context_parallel(weights: Weights, variant: str, form: str, **recompute):
    from megatron.core import parallel_state

    arguments, options, _ = VARIANTS[variant]
    args = start_run(context_parallel_size=WORLD, **arguments)
    chunk = tiny_gpt.build(args, layers=LAYERS, **options, **recompute)
    load(chunk, weights)
    rank = parallel_state.get_context_parallel_rank()
    tokens, labels = (
        shard(x, rank, WORLD, dim=1)
        if form == "sequence"
        else shard_documents(x, BORDERS, rank, WORLD, dim=1)
        for x in random_tokens(*FORMATS[form])
    )
    losses = run(chunk, tokens, labels, form)
    losses.sum().backward()
    for parameter in chunk.parameters():
        dist.all_reduce(parameter.grad)
    return {"losses": losses.detach(), "gradients": gradients_of(chunk)}


def pipeline(weights: Weights, variant: str, form: str, chunks_per_rank: int):
    """Megatron's own schedule over chunks of one or two layers, two micro-batches."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    arguments, options, _ = VARIANTS[variant]
    args = start_run(**arguments)
    virtual = chunks_per_rank > 1
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for stage in range(chunks_per_rank):
        number = stage * WORLD + rank
        where = {
            "pre_process": number == 0,
            "post_process": number == WORLD * chunks_per_rank - 1,
            "vp_stage": stage if virtual else None,
        }
        chunk = tiny_gpt.build(
            args,
            layers=LAYERS,
            model_options=where,
            pipeline_model_parallel_size=WORLD,
            virtual_pipeline_model_parallel_size=chunks_per_rank if virtual else None,
            pipeline_dtype=torch.float32,
            **options,
        )
        load(chunk, weights)
        chunks.append(chunk)
    tokens, labels = random_tokens(*FORMATS[form])
    rows = len(tokens)
    if rows == 1:  # the pack twice
        tokens, labels = tokens.repeat(2, 1), labels.repeat(2, 1)
    losses = []

    def loss_func(output):
        losses.append(output.detach())
        return output.sum(), {}

    def forward_step(iterator, chunk, *_):
        tokens, labels = next(iterator)
        return run(chunk, tokens, labels, form), loss_func

    batches = list(zip(tokens.split(1), labels.split(1), strict=True))
    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=chunks if virtual else chunks[0],
        num_microbatches=len(batches),
        seq_length=tokens.shape[1],
        micro_batch_size=1,
    )
    gradients = {}
    for chunk in chunks:
        gradients |= {name: value * rows for name, value in gradients_of(chunk).items()}
    return {
        "losses": torch.cat(losses)[:rows] if losses else None,
        "gradients": gradients,
        "rotary": [type(chunk.rotary_pos_emb).__name__ for chunk in chunks],
        "layers": [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks],
    }


def split_batches() -> dict:
    """What megatron-core's context-parallel split of a pack gives with and without the run."""
    from megatron.core import parallel_state, utils

    from megatron_longrope.integration import wrappers

    group = parallel_state.get_context_parallel_group()
    signature = inspect.signature(utils.get_batch_on_this_cp_rank)
    by_sequence = "use_per_sequence_balancing" in signature.parameters  # from 0.19 on

    def split(borders=BORDERS, padded=None, **options):
        rows = torch.arange(sum(LENGTHS))[None]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        batch = {name: rows + 100 * index for index, name in enumerate(names)}
        for name, offsets in (("cu_seqlens", borders), ("cu_seqlens_padded", padded)):
            batch[name] = offsets and torch.tensor([offsets], dtype=torch.int32)
        batch["max_seqlen"] = torch.tensor([max(LENGTHS)])
        options |= {"is_hybrid_cp": False, "cp_group": group}
        return utils.get_batch_on_this_cp_rank(batch, **options)

    start_run(context_parallel_size=WORLD)
    found = {
        "by document": split(),
        "padded": split(borders=[0, 20, 64, 72], padded=BORDERS),
        "no documents": split(borders=None),
    }
    try:
        split(borders=[0, 26, 64, 72])
    except ValueError as error:
        found["refusal"] = str(error)
    if by_sequence:  # what pretrain_gpt.py asks for with --dataloader-inter-document-masking
        found["by sequence"] = split(use_per_sequence_balancing=True)
        wrappers.activate(None)
        found["stock"] = split(use_per_sequence_balancing=True)
    return found


def worker(rank: int, directory: str) -> None:
    from megatron_longrope.integration import cpu_host

    cpu_host.prepare_environment()
    cpu_host.enable()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    lay_out()
    weights = fill(tiny_gpt.build(start_run(), layers=LAYERS))
    results["weights"] = {name: weight.detach() for name, weight in weights.items()}
    cases = [(variant, form) for variant in VARIANTS for form in FORMATS]

    lay_out(tensor_model_parallel_size=WORLD)
    for form in FORMATS:  # heads are shared out, each of which is rotated as on one rank
        results[TENSOR, form] = tensor_parallel(weights, "softmax", form, False)
        results[SEQUENCE, form] = tensor_parallel(weights, "softmax", form, True)

    lay_out(context_parallel_size=WORLD)
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    for case in cases:
        results[CONTEXT, *case] = context_parallel(weights, *case)
        results[RECOMPUTED, *case] = context_parallel(
            weights, *case, recompute_num_layers=1, **full
        )
    if compat.batch_split_symbols():
        results["split"] = split_batches()

    lay_out(pipeline_model_parallel_size=WORLD)
    for case in cases:
        results[PIPELINE, *case] = pipeline(weights, *case, 1)

    lay_out(pipeline_model_parallel_size=WORLD, virtual_pipeline_model_parallel_size=2)
    for case in cases:
        results[VIRTUAL, *case] = pipeline(weights, *case, 2)

    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


# Compared


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every rank computed, in rank order."""
    directory = Path(tmp_path_factory.mktemp("parallel"))
    spawn(worker, (str(directory),), WORLD)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def reference(ranks):
    """Losses `[b, s]` and gradients of the plain decoder, by variant and format."""

    @functools.cache
    def compute(variant: str, form: str) -> tuple[torch.Tensor, Weights]:
        weights = {
            name: weight.clone().requires_grad_() for name, weight in ranks[0]["weights"].items()
        }
        model = decoder(**VARIANTS[variant][2])
        tokens, labels = random_tokens(*FORMATS[form])
        if form == "packed":
            losses = model.packed_losses(weights, tokens, labels, LENGTHS)
        else:
            losses = model.losses(weights, tokens, labels)
        losses.sum().backward()
        return losses.detach().float(), {name: w.grad.float() for name, w in weights.items()}

    return compute


def assert_losses(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_gradients(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        allowed = 1e-5 * expected.abs().max().item() + 1e-6
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=allowed, msg=name)


every_case = pytest.mark.parametrize(
    ("variant", "form"), [(variant, form) for variant in VARIANTS for form in FORMATS]
)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", [TENSOR, SEQUENCE])
def test_tensor_parallel_ranks_train_like_one_process(ranks, reference, layout, form):
    losses, gradients = reference("softmax", form)
    for rank, results in enumerate(ranks):
        ours = results[layout, form]
        assert_losses(ours["losses"], losses)
        theirs = {n: local_part(n, value, rank, WORLD) for n, value in gradients.items()}
        assert_gradients(ours["gradients"], theirs)


@every_case
def test_context_parallel_ranks_train_like_one_process(ranks, reference, variant, form):
    losses, gradients = reference(variant, form)
    for rank, results in enumerate(ranks):
        ours = results[CONTEXT, variant, form]
        borders = BORDERS if form == "packed" else [0, RUN]
        assert_losses(ours["losses"], shard_documents(losses, borders, rank, WORLD, dim=1))
        assert_gradients(ours["gradients"], gradients)


@every_case
def test_recomputation_under_context_parallelism_changes_no_bit(ranks, variant, form):
    for results in ranks:
        plain, ours = (results[layout, variant, form] for layout in (CONTEXT, RECOMPUTED))
        assert torch.equal(ours["losses"], plain["losses"])
        for name, gradient in plain["gradients"].items():
            assert torch.equal(ours["gradients"][name], gradient), name


@every_case
@pytest.mark.parametrize(
    ("layout", "layers"),
    [(PIPELINE, ([[1, 2]], [[3, 4]])), (VIRTUAL, ([[1], [3]], [[2], [4]]))],
)
def test_pipeline_chunks_train_like_one_process(ranks, reference, layout, layers, variant, form):
    losses, gradients = reference(variant, form)
    found = [results[layout, variant, form] for results in ranks]
    assert [ours["layers"] for ours in found] == list(layers)
    for ours in found:  # also in chunks that hold neither end of the model
        assert set(ours["rotary"]) == {"LongRopeRotaryEmbedding"}
    assert found[0]["losses"] is None
    assert_losses(found[1]["losses"], losses)
    assert_gradients(found[0]["gradients"] | found[1]["gradients"], gradients)


@pytest.mark.skipif(not compat.batch_split_symbols(), reason="Megatron splits packs from 0.18 on")
def test_megatrons_split_of_a_pack_takes_document_by_document(ranks):
    whole = torch.arange(sum(LENGTHS))[None]
    for rank, results in enumerate(ranks):
        found = results["split"]
        by_document = shard_documents(whole, BORDERS, rank, WORLD, dim=1)
        for name in {"by sequence", "by document", "padded"} & found.keys():
            for index, key in enumerate(("tokens", "labels", "loss_mask", "position_ids")):
                assert torch.equal(found[name][key], by_document + 100 * index), (name, key)
            assert found[name]["cu_seqlens"].shape == (1, len(BORDERS))
        # Without documents, and without the plugin, the sample is split as a whole.
        for name in {"no documents", "stock"} & found.keys():
            assert torch.equal(found[name]["tokens"], shard(whole, rank, WORLD, dim=1))
        assert found["refusal"].startswith("packed document 0: sequence length 26 is not divisible")
    # Zigzag chunks of 6, 10 and 2 tokens.
    assert ranks[1]["split"]["by document"]["tokens"][0].tolist() == [
        *range(6, 18), *range(34, 54), *range(66, 70)
    ]  # fmt: skip
