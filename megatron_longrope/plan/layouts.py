"""How a training run is spread over GPUs: which layouts there are, and which is best."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypedDict

from megatron_longrope.fused_rope import fused_rope_overflow
from megatron_longrope.plan.model import Model

FULL = ("full",)
"""Recompute whole layers."""

_NODE_FACTOR = 9
"""A byte between nodes counts as so many within: 450 GB/s of NVLink against 50 GB/s of network."""


@dataclass(frozen=True)
class Training:
    """What is trained; the layout does not change it."""

    length: int
    """Tokens of a sequence."""
    global_batch_size: int = 32
    """Sequences of a step; 32 is the paper's (section 4.1)."""
    steps: int = 600
    """Steps of the run."""
    loss_chunk: int | None = 1024
    """Tokens whose logits exist at a time (`--longrope-chunked-loss`); None: of all tokens."""
    precision: str = "bf16"
    """`bf16`, `fp16` or `fp32`."""
    half_gradients: bool = False
    """Gradients are summed in half precision (`--grad-reduce-in-bf16`)."""
    hidden_dropout: bool = False
    """Dropout on the residual branches, whose masks are kept."""
    vocab_divisor: int = 128
    """`--make-vocab-size-divisible-by`."""


@dataclass(frozen=True)
class Layout:
    """How many GPUs share what, and what is recomputed; field by field a Megatron flag."""

    tensor: int = 1
    """Tensor-parallel size: GPUs that share a layer."""
    context: int = 1
    """Context-parallel size: GPUs that share a sequence."""
    pipeline: int = 1
    """Pipeline-parallel size: GPUs with different layers."""
    data: int = 1
    """Data-parallel size; follows from the number of GPUs."""
    expert: int = 1
    """Expert-parallel size: GPUs with different experts."""
    expert_tensor: int = 1
    """GPUs that share an expert; Megatron's default is the tensor-parallel size."""
    recompute: tuple[str, ...] = ()
    """Modules recomputed in the backward pass (`--recompute-modules`), :data:`FULL` for whole
    layers, empty for none."""
    recompute_method: str = "uniform"
    """Of full recomputation: `uniform` keeps the input of every group of layers, `block` recomputes
    the first layers of a stage alone."""
    recompute_num_layers: int = 1
    """Layers of a group, or of a stage that are recomputed."""
    micro_batch_size: int = 1
    """Sequences of a microbatch."""
    sequence_parallel: bool = True
    """Norms are split over tensor-parallel ranks too; without effect for one rank."""
    distributed_optimizer: bool = True
    """The optimizer's state is split over data- and context-parallel ranks, that of experts over
    the ranks that hold the same ones."""
    cp_comm_type: str = "p2p"
    """`p2p`, `all_gather` or `a2a` of Transformer Engine; `gathered` is this package's own
    attention, which gathers keys and values once per layer."""
    rope_fusion: bool = True
    """Queries and keys are rotated by the fused kernel, which keeps no cosines and sines."""

    @property
    def gpus(self) -> int:
        """GPUs of the whole run."""
        return self.tensor * self.context * self.pipeline * self.data

    def microbatches(self, training: Training) -> int:
        """Microbatches of a pipeline in a step."""
        return training.global_batch_size // (self.data * self.micro_batch_size)


class Fixed(TypedDict, total=False):
    """Fields of :class:`Layout` that are not to be chosen."""

    tensor: int
    context: int
    pipeline: int
    expert: int
    recompute: tuple[str, ...]


def problem(model: Model, training: Training, layout: Layout) -> str | None:
    """The first of Megatron's rules that a layout breaks, as a sentence; None if none."""
    tensor, context = layout.tensor, layout.context
    heads, groups = model.num_attention_heads, model.num_query_groups
    parts = 2 * context if context > 1 else 1
    split = tensor * context if layout.sequence_parallel else context
    samples = layout.data * layout.micro_batch_size
    experts, ranks = model.num_experts, tensor * context * layout.data
    rules: list[tuple[object, str]] = [
        (heads % tensor, f"tensor parallel {tensor} does not divide the {heads} heads"),
        (
            groups % tensor and tensor % groups,
            f"tensor parallel {tensor} neither divides the {groups} query groups nor is a multiple",
        ),
        (
            model.num_layers % layout.pipeline,
            f"pipeline parallel {layout.pipeline} does not divide the {model.num_layers} layers",
        ),
        (
            training.length % parts or training.length % split,
            f"{training.length} tokens are no multiple of 2 x context parallel = {parts} and "
            f"tensor x context parallel = {split}",
        ),
        (
            experts is None and layout.expert > 1,
            f"expert parallel {layout.expert} has no experts to divide",
        ),
        (
            experts is not None and experts % layout.expert,
            f"expert parallel {layout.expert} does not divide the {experts} experts",
        ),
        (
            experts is not None and ranks % (layout.expert * layout.expert_tensor),
            f"expert parallel {layout.expert} x expert tensor parallel {layout.expert_tensor} does "
            f"not divide the {ranks} ranks of a stage",
        ),
        (
            training.global_batch_size % samples,
            f"{layout.data} data-parallel ranks of {layout.micro_batch_size} sequences do not "
            f"divide the batch of {training.global_batch_size}",
        ),
        (
            layout.cp_comm_type == "a2a" and not a2a_fits(model, tensor, context),
            f"a2a needs context parallel {context} to divide the heads of a rank, "
            f"{heads // tensor} of queries and {max(1, groups // tensor)} of keys",
        ),
    ]
    return next((text for broken, text in rules if broken), None)


def rope_overflow(model: Model, training: Training, layout: Layout) -> str | None:
    """Why fused RoPE cannot index a rank's tokens, see :func:`.fused_rope_overflow`, or None."""
    return fused_rope_overflow(
        training.length // layout.context * layout.micro_batch_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
        layout.tensor,
    )


def a2a_fits(model: Model, tensor: int, context: int) -> bool:
    """Whether context parallelism can split the heads of a rank instead of the sequence."""
    groups = model.key(tensor) // model.head_dim
    return not (model.num_attention_heads // tensor) % context and not groups % context


def layouts(
    model: Model, training: Training, gpus: int, gpus_per_node: int, fixed: Fixed
) -> Iterator[Layout]:
    """Every layout of so many GPUs that breaks no rule.

    Args:
        model (Model): Its shape.
        training (Training): What is trained.
        gpus (int): GPUs of the run.
        gpus_per_node (int): GPUs that NVLink joins; tensor parallelism over more is no choice.
        fixed (Fixed): What is not chosen.
    """
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    experts = sizes if model.num_experts is not None else [1]

    for tensor, context, pipeline, expert, recompute in itertools.product(
        _choices(fixed.get("tensor"), [size for size in sizes if size <= min(8, gpus_per_node)]),
        _choices(fixed.get("context"), sizes),
        _choices(fixed.get("pipeline"), sizes),
        _choices(fixed.get("expert"), experts),
        _choices(fixed.get("recompute"), [(), (model.mlp_module,), FULL]),
    ):
        if gpus % (tensor * context * pipeline):
            continue
        # Where both work a2a moves less; ring attention has no bound on its size.
        comm = "a2a" if context > 1 and a2a_fits(model, tensor, context) else "p2p"
        layout = Layout(
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            data=gpus // (tensor * context * pipeline),
            expert=expert,
            recompute=recompute,
            cp_comm_type=comm,
        )
        if problem(model, training, layout) is None:
            fusion = rope_overflow(model, training, layout) is None
            yield replace(layout, rope_fusion=fusion)


def _choices[T](fixed: T | None, values: list[T]) -> list[T]:
    return values if fixed is None else [fixed]


def traffic(model: Model, training: Training, layout: Layout, gpus_per_node: int = 8) -> float:
    """Bytes that a GPU sends in a step, those between nodes weighted; only good for comparing."""
    tensor, context = layout.tensor, layout.context
    tokens = layout.micro_batch_size * training.length // context
    hidden = 2 * tokens * model.hidden_size
    repeats = 1 + (layout.recompute == FULL)
    # Two gathers and two scatters each way, and the inputs gathered again for their weights.
    layer = hidden * (tensor - 1) / tensor * (4 * repeats + 6 + 2 * ("mlp" in layout.recompute))

    def far(ranks: int) -> int:
        return _NODE_FACTOR if ranks > gpus_per_node else 1

    if layout.cp_comm_type == "a2a":
        pieces = 2 * tokens * (2 * model.query // tensor + 2 * model.key(tensor)) / context
        layer += far(tensor * context) * (context - 1) * pieces * (1 + repeats)
    else:  # keys and values, forward, backward, and their gradients
        pair = 4 * tokens * model.key(tensor)
        layer += far(tensor * context) * (context - 1) * pair * (2 + repeats)
    dense, experts = model.parameters, 0
    same = layout.expert * layout.expert_tensor  # ranks that have all experts once
    if model.num_experts is not None:
        repeats = max(repeats, 1 + ("moe" in layout.recompute))
        there_and_back = 2 * hidden * model.moe_router_topk * (1 + repeats) / tensor
        layer += there_and_back * (layout.expert - 1) / layout.expert * far(same)
        experts = model.num_layers * model.mlp_parameters
        dense -= experts
    per_batch = layer * model.num_layers / layout.pipeline
    if layout.pipeline > 1:
        per_batch += 2 * _NODE_FACTOR * hidden / tensor
    ranks = layout.gpus // layout.pipeline  # of which each holds a part, and sends the others
    summed = dense * (1 / tensor - 1 / ranks) + experts * (1 / same - 1 / ranks)
    summed *= 6 / layout.pipeline * far(layout.gpus)
    return per_batch * layout.microbatches(training) + summed
