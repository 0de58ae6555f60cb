"""Bytes of a training run on its fullest GPU, part by part; docs/plan.md derives the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_longrope.plan.hardware import GIB, Gpu
from megatron_longrope.plan.layouts import FULL, Layout, Training
from megatron_longrope.plan.model import Model

# Bytes of a parameter: (weight, gradient, optimizer state). Half precision has a copy of the
# weight and Adam's two moments in fp32; gradients summed in half precision get an fp32 copy, too.
_PRECISIONS = {
    ("bf16", False): (2, 4, 12),
    ("bf16", True): (2, 2, 16),
    ("fp16", False): (2, 2, 16),
    ("fp16", True): (2, 2, 16),
    ("fp32", False): (4, 4, 8),
    ("fp32", True): (4, 4, 8),
}

STAGES = ("first", "last")
"""Of a pipeline, those that can be the fullest: the others hold less than the first."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU. Loss and layer are not at work at the same time: the larger one counts."""

    NAMES: ClassVar[Mapping[str, str]] = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "activations": "activations kept",
        "kv": "keys and values of context parallelism",
        "rotary": "rotary table",
        "loss": "logits and loss",
        "layer": "one layer's backward pass",
        "reserve": "reserve (CUDA, NCCL, fragmentation)",
    }
    """The parts' names for people."""

    weights: int
    """Parameters."""
    gradients: int
    """Gradients that are summed over microbatches."""
    optimizer: int
    """Adam's moments and, in half precision, the fp32 weights."""
    activations: int
    """What forward passes keep for backward passes, of all microbatches under way."""
    kv: int
    """Keys and values, and their gradients, that context parallelism brings together."""
    rotary: int
    """The rotary table with its cosines and sines."""
    loss: int
    """Logits, and the sum of the output layer's gradient; 0 on all stages but the last."""
    layer: int
    """One layer's backward pass: what it recomputes, and gradients."""
    reserve: int = 0
    """CUDA context, communication buffers, gaps between tensors."""

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        sizes: list[int] = [getattr(self, name) for name in self.NAMES]
        return sum(sizes) - min(self.loss, self.layer)

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the worst moment: all but the reserve."""
        return self.total - self.reserve

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(self.NAMES, key=lambda name: getattr(self, name))

    def gib(self) -> dict[str, float]:
        """Parts and total in GiB."""
        return {name: round(getattr(self, name) / GIB, 3) for name in (*self.NAMES, "total")}

    def lines(self, gpu: Gpu) -> list[str]:
        """The total with a verdict, and the parts by their names for people."""
        room = gpu.gib - self.total / GIB
        verdict = f"fits, {room:.1f} GiB free" if room >= 0 else f"does NOT fit, {-room:.1f} over"
        return [
            f"memory per GPU: {self.total / GIB:.1f} GiB at the worst moment, {verdict}",
            *(
                f"  {name:<40}{getattr(self, part) / GIB:8.2f} GiB"
                for part, name in self.NAMES.items()
            ),
        ]


def memory(model: Model, training: Training, layout: Layout, reserve: int = 0) -> Memory:
    """Memory of the fullest GPU.

    Args:
        model (Model): Its shape.
        training (Training): What is trained.
        layout (Layout): How it is spread; :func:`.layouts.problem` finds nothing wrong with it.
        reserve (int): Bytes that are kept free. Defaults to 0.
    """
    stages = (stage_memory(model, training, layout, stage, reserve) for stage in STAGES)
    return max(stages, key=lambda stage: stage.total)


def stage_memory(
    model: Model, training: Training, layout: Layout, stage: str, reserve: int = 0
) -> Memory:
    """Memory of a GPU of the first or of the last pipeline stage, see :func:`memory`."""
    first = stage == "first" or layout.pipeline == 1
    last = stage == "last" or layout.pipeline == 1
    width = 4 if training.precision == "fp32" else 2
    dense, experts = rank_parameters(model, training, layout, first, last)
    weight, gradient, optimizer = _PRECISIONS[training.precision, training.half_gradients]
    dense_shards = layout.data * layout.context if layout.distributed_optimizer else 1
    expert_ranks = layout.data * layout.context * layout.tensor
    expert_shards = expert_ranks // (layout.expert * layout.expert_tensor)
    if not layout.distributed_optimizer:
        expert_shards = 1
    tokens = layout.micro_batch_size * training.length // layout.context
    # The schedule starts as many microbatches as there are stages before the first comes back.
    under_way = min(layout.pipeline, layout.microbatches(training)) if first else 1
    layer = _Layer(model, training, layout, width)
    layers = model.num_layers // layout.pipeline
    kept, recomputed = layer.kept(layers)
    kv_kept, kv_working = layer.key_values(layers)
    inputs = 0
    if first:  # token numbers, and the mask of the embedding's dropout
        inputs = 8 + training.hidden_dropout * model.hidden_size // layer.split
    return Memory(
        weights=weight * (dense + experts),
        gradients=gradient * (dense + experts),
        optimizer=-(-optimizer * dense // dense_shards) + -(-optimizer * experts // expert_shards),
        activations=tokens * (kept + inputs) * under_way,
        kv=tokens * (kv_kept * under_way + kv_working),
        rotary=12 * training.length // layout.context * model.rotary_dim,
        loss=_loss(model, training, layout, tokens, width) if last else 0,
        layer=tokens * (recomputed + layer.backward()),
        reserve=reserve,
    )


def rank_parameters(
    model: Model, training: Training, layout: Layout, first: bool, last: bool
) -> tuple[int, int]:
    """Parameters of a GPU: (all but experts, experts)."""
    layers = model.num_layers // layout.pipeline
    rows = model.rows(layout.tensor, training.vocab_divisor) * model.hidden_size
    dense = layers * (model.attention_parameters // layout.tensor + model.replicated_parameters)
    # The last of several stages has a copy of tied embeddings.
    dense += rows * (first + (last and (model.untie_embeddings or not first)))
    dense += model.hidden_size * last  # the final norm
    mlp = layers * model.mlp_parameters
    if model.num_experts is None:
        return dense + mlp // layout.tensor, 0
    return dense, mlp // (layout.expert * layout.expert_tensor)


def _loss(model: Model, training: Training, layout: Layout, tokens: int, width: int) -> int:
    """Logits, softmax and their gradient: docs/training_loss.md. And the inputs of norm and loss.

    The output layer's gradient is summed in fp32 over chunks.
    """
    rows = model.rows(layout.tensor, training.vocab_divisor)
    split = layout.tensor if layout.sequence_parallel else 1
    inputs = 2 * width * tokens * model.hidden_size // split
    chunk = tokens if training.loss_chunk is None else min(training.loss_chunk, tokens)
    summed = 0 if training.loss_chunk is None else 4 * model.hidden_size * rows
    return inputs + (width + 4 if width == 2 else width) * chunk * rows + summed


@dataclass(frozen=True)
class _Layer:
    """Bytes of one token of one microbatch in one transformer layer, on one GPU."""

    model: Model
    training: Training
    layout: Layout
    width: int

    @property
    def split(self) -> int:
        """Ranks over which the residual stream and the norms are split."""
        return self.layout.tensor if self.layout.sequence_parallel else 1

    @property
    def _hidden(self) -> int:
        return self.width * self.model.hidden_size // self.split

    @property
    def _query(self) -> int:
        return self.model.query // self.layout.tensor

    @property
    def _key(self) -> int:
        return self.model.key(self.layout.tensor)

    @property
    def _projected(self) -> int:
        """Width of what queries, keys and values are views of."""
        model, tensor = self.model, self.layout.tensor
        # With fewer groups than ranks Megatron gathers the projection of all of them.
        whole = model.num_query_groups < tensor
        return model.query + 2 * model.key() if whole else self._query + 2 * self._key

    def attention(self) -> int:
        """Inputs of norm, projection, kernel and output projection; the softmax's sums in fp32."""
        heads = self.model.num_attention_heads // self.layout.tensor
        # Values are a view of what q, k and v were projected to, and keep all of it alive, unless
        # context parallelism copies them.
        values = self._projected if self.layout.context == 1 else self._key
        kernel = self.width * (2 * self._query + self._key + values) + 4 * heads
        normed = self.width * (self._query + self._key) * self.model.qk_layernorm
        # Without the fused kernel: cosines and sines in half precision, of queries and of keys;
        # those of all sequences of a microbatch are the same.
        angles = 4 * self.width * self.model.rotary_dim // self.layout.micro_batch_size
        rotated = 0 if self.layout.rope_fusion else angles
        return 2 * self._hidden + kernel + normed + rotated + self._dropout()

    def mlp(self) -> int:
        """Inputs of norm and first product; the halves of the gate and what comes of them."""
        model, layout = self.model, self.layout
        if model.num_experts is None:
            inner = 3 * self.width * model.ffn_hidden_size // layout.tensor
        else:
            # A rank's experts see, if all are equally busy, top-k rows a token of those ranks that
            # share an expert; the router keeps its logits and probabilities in fp32.
            rows = model.moe_router_topk * layout.expert_tensor
            expert = 3 * model.moe_ffn_hidden_size // layout.expert_tensor
            inner = rows * self.width * (model.hidden_size + expert) // self.split
            inner += 8 * model.num_experts // self.split
        return 2 * self._hidden + inner + self._dropout()

    def _dropout(self) -> int:
        return self.training.hidden_dropout * self.model.hidden_size // self.split

    def kept(self, layers: int) -> tuple[int, int]:
        """What is kept of all layers until the backward pass, and what that computes at once."""
        layout, whole = self.layout, self.attention() + self.mlp()
        if layout.recompute == FULL:
            count = min(layout.recompute_num_layers, layers)
            if layout.recompute_method == "block":
                return (layers - count) * whole + count * self._hidden, whole
            return -(-layers // count) * self._hidden, count * whole
        dropped = 0
        if self.model.mlp_module in layout.recompute:
            # A dense MLP is recomputed from the input of its norm, which Transformer Engine has
            # inside of it; experts from what their norm, a module of its own, makes of that.
            inputs = 1 if self.model.num_experts is None else 2
            dropped = self.mlp() - inputs * self._hidden - self._dropout()
        return layers * (whole - dropped), dropped

    def backward(self) -> int:
        """Gradients inside a layer, and inputs that sequence parallelism gathers once more."""
        gathered = self.width * self.model.hidden_size * (3 if self.split > 1 else 2)
        attention = self.width * (2 * self._query + 2 * self._key + self._projected)
        attention += 4 * self._query  # the kernel's sum of the queries' gradient, in fp32
        if self.model.num_experts is None:
            mlp = 3 * self.width * self.model.ffn_hidden_size // self.layout.tensor
        else:
            mlp = self.mlp() - 2 * self._hidden
        return gathered + self._hidden + max(attention, mlp)

    def key_values(self, layers: int) -> tuple[int, int]:
        """What context parallelism keeps of keys and values of all layers, and has at work."""
        size = self.layout.context
        if size == 1:
            return 0, 0
        pair = 2 * self.width * self._key
        if self.layout.cp_comm_type.startswith("a2a"):  # q, k, v and output, sent and received
            return 0, 2 * self.width * (2 * self._query + 2 * self._key)
        if self.layout.cp_comm_type == "p2p":
            # Two buffers for the pair and two for its gradient; results are merged in fp32.
            return 0, 4 * pair + 4 * self._query
        gathered = size * pair
        if self.layout.cp_comm_type == "all_gather":  # gathered again in the backward pass
            return 0, 2 * gathered
        # Ours: a rank has one copy of all that it sees, on the first one everything.
        kept, again = layers, 0  # layers that keep theirs, and that gather them again at once
        if self.layout.recompute == FULL:
            count = min(self.layout.recompute_num_layers, layers)
            is_block = self.layout.recompute_method == "block"
            kept, again = (layers - count, 1) if is_block else (0, count)
        elif "core_attn" in self.layout.recompute:
            kept, again = 0, 1
        return kept * gathered, (again + 3) * gathered
