"""Memory and time of generating text with a KV cache; docs/plan.md derives the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops
from megatron_longrope.lengths import PREFILL_TOKENS, format_length
from megatron_longrope.plan.estimate import Cluster
from megatron_longrope.plan.hardware import GIB, USABLE
from megatron_longrope.plan.layouts import Layout, Training, problem
from megatron_longrope.plan.memory import Parts, rank_parameters
from megatron_longrope.plan.model import Model
from megatron_longrope.plan.search_cost import TOKENS_PER_MLP_SLICE
from megatron_longrope.plan.time import rates
from megatron_longrope.progress import format_duration

_READING = 0.6  # part of the memory's bandwidth that weights and keys are read at; assumed
_WIDTH = 2  # bytes of a value, half precision


@dataclass(frozen=True)
class GenerationMemory(Parts):
    """Bytes per GPU."""

    NAMES: ClassVar = {
        "weights": "weights",
        "cache": "keys and values",
        "activations": "activations of a chunk of the prompt",
        "rotary": "rotary table",
        "reserve": "reserve (CUDA, NCCL, fragmentation)",
    }

    weights: int
    """Parameters, in half precision."""
    cache: int
    """Keys and values of this rank's tokens, in all layers."""
    activations: int
    """A layer at work on a chunk of the prompt."""
    rotary: int
    """Angles of the whole sequence, fp32, on every rank."""
    reserve: int = 0
    """CUDA context, communication buffers, gaps between tensors."""


@dataclass(frozen=True)
class GenerationPlan:
    """Prompts of one length, continued one by one by copies of a model."""

    model: Model
    """What generates."""
    length: int
    """Tokens of prompt and continuation."""
    num_new_tokens: int
    """Tokens of the continuation."""
    samples: int
    """Prompts in all."""
    tensor: int
    """GPUs that share a layer."""
    context: int
    """GPUs that share a sequence."""
    cluster: Cluster
    """The GPUs; those beyond one copy of the model hold others."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_new_tokens < self.length:
            raise LongRopeError(
                f"{self.num_new_tokens} new tokens leave no prompt in {self.length} tokens; "
                "--length counts prompt and new tokens"
            )
        if self.cluster.gpu.tb_per_s is None:
            raise LongRopeError(
                f"the bandwidth of GPU {self.cluster.gpu.name!r} is unknown, and every new token "
                "reads all weights; give it as TFLOPS:GIB:TB/s, such as 312:80:2.0"
            )

    @property
    def copies(self) -> int:
        """Copies of the model, each with prompts of its own."""
        return self.cluster.gpus // (self.tensor * self.context)

    @property
    def memory(self) -> GenerationMemory:
        """Bytes of a GPU by part."""
        model, tensor, context = self.model, self.tensor, self.context
        layout = Layout(tensor=tensor, context=context, expert_tensor=tensor)
        weights = sum(rank_parameters(model, Training(self.length), layout, True, True))
        room = self.length if context == 1 else self.length // context + 2 * context
        return GenerationMemory(
            weights=_WIDTH * weights,
            cache=2 * _WIDTH * model.num_layers * min(room, self.length) * model.key(tensor),
            activations=self._activations(),
            rotary=4 * self.length * model.rotary_dim,
            reserve=round((1 - USABLE) * self.cluster.gpu.gib * GIB),
        )

    def _activations(self) -> int:
        model, tensor, context = self.model, self.tensor, self.context
        chunk = min(self.length - self.num_new_tokens, PREFILL_TOKENS)
        own = -(-chunk // context)
        query, key, hidden = model.query // tensor, model.key(tensor), model.hidden_size
        heads = model.num_attention_heads // tensor
        # Residual stream, norm's output, attention's; the projection, rotated queries and keys.
        before = own * _WIDTH * (3 * hidden + 2 * query + 3 * key)
        if context == 1:
            # The output as the kernel lays it out, and as the next product wants it.
            attention = own * (2 * _WIDTH * query + 4 * heads)
        else:
            # Queries of all ranks, twice; a tile's result and what it is merged into, in fp32.
            attention = chunk * (query * (3 * _WIDTH + 12) + 4 * heads * (2 * context + 3))
        width = model.ffn_hidden_size
        if model.num_experts is not None:
            width = model.moe_router_topk * model.moe_ffn_hidden_size
        mlp = min(own, TOKENS_PER_MLP_SLICE) * _WIDTH * 3 * width // tensor + own * _WIDTH * hidden
        return max(before + attention, own * _WIDTH * 2 * hidden + mlp)

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.memory.total <= self.cluster.gpu.gib * GIB

    @property
    def prefill_flops(self) -> float:
        """Operations of reading a prompt; logits are computed for its last token alone."""
        model, prompt = self.model, self.length - self.num_new_tokens
        weights, attention = forward_flops(model, prompt)
        return weights - 2 * prompt * model.hidden_size * model.vocab_size + attention

    @property
    def prefill_seconds(self) -> float:
        """Expected seconds of reading a prompt."""
        gpu = self.cluster.gpu
        of_matmul, of_attention = rates(gpu, self.cluster.mfu)
        attention = forward_flops(self.model, self.length - self.num_new_tokens)[1]
        busy = (self.prefill_flops - attention) / of_matmul + attention / of_attention
        return busy / (gpu.tflops * 1e12 * self.tensor * self.context)

    @property
    def token_seconds(self) -> float:
        """Expected seconds of a new token: a rank reads its weights, and its keys and values."""
        parts = self.memory
        weights = parts.weights
        if self.model.num_experts is not None:  # of the experts, only those of one token
            own = self.model.num_layers * self.model.mlp_parameters * _WIDTH // self.tensor
            weights -= own - own * self.model.moe_router_topk // self.model.num_experts
        bandwidth = self.cluster.gpu.tb_per_s
        assert bandwidth is not None
        return (weights + parts.cache) / (bandwidth * 1e12 * _READING)

    @property
    def seconds(self) -> float:
        """Expected seconds of all prompts."""
        one = self.prefill_seconds + self.num_new_tokens * self.token_seconds
        return math.ceil(self.samples / self.copies) * one

    def short(self) -> str:
        """The layout in a few words."""
        copies = "1 copy" if self.copies == 1 else f"{self.copies} copies"
        return f"TP{self.tensor} CP{self.context}, {copies}"

    def text(self) -> str:
        """The plan for people, several lines."""
        gpu, gpus = self.cluster.gpu, self.cluster.gpus
        lines = [
            f"{self.model.parameters / 1e9:.2f} B parameters, {self.samples} x {self.length} "
            f"tokens ({format_length(self.length)}), {self.num_new_tokens} of them generated, on "
            f"{gpus} x {gpu.name} ({gpu.gib:g} GiB): {self.short()}",
            *self.memory.lines(gpu),
            f"expected: {format_duration(self.prefill_seconds)} to read a prompt "
            f"({self.prefill_flops:.2e} FLOP), {1000 * self.token_seconds:.1f} ms a new token, "
            f"{format_duration(self.seconds)} in all",
        ]
        if self.fits:
            fewest = -(-gpus // self.cluster.gpus_per_node)
            nodes = next(count for count in range(fewest, gpus + 1) if gpus % count == 0)
            several = f"--nnodes {nodes} " if nodes > 1 else ""
            lines.append(
                f"flags: torchrun {several}--nproc-per-node {gpus // nodes} ... "
                f"--tensor-model-parallel-size {self.tensor} "
                f"--context-parallel-size {self.context}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in GiB."""
        return {
            "fits": self.fits,
            "gpu": asdict(self.cluster.gpu),
            "layout": {"tensor": self.tensor, "context": self.context, "copies": self.copies},
            "length": self.length,
            "num_new_tokens": self.num_new_tokens,
            "samples": self.samples,
            "memory_gib": self.memory.gib(),
            "prefill_flops": self.prefill_flops,
            "prefill_seconds": self.prefill_seconds,
            "token_seconds": self.token_seconds,
            "seconds": self.seconds,
        }


def rank_generation(
    plan: GenerationPlan, fixed: Mapping[str, int] | None = None
) -> list[GenerationPlan]:
    """All layouts of a plan, the best first: those that fit by their time, then by their size.

    Args:
        plan (GenerationPlan): Whose layout does not matter.
        fixed (Mapping, optional): `tensor` or `context`, where they are not to choose.

    Raises:
        LongRopeError: No layout keeps the rules.
    """
    fixed, found = fixed or {}, []
    gpus, gpus_per_node = plan.cluster.gpus, plan.cluster.gpus_per_node
    for tensor in range(1, min(gpus, gpus_per_node) + 1):
        for context in range(1, gpus // tensor + 1):
            layout = Layout(tensor=tensor, context=context)
            rounded = Training(-(-plan.length // (2 * tensor * context)) * 2 * tensor * context)
            if gpus % (tensor * context) or problem(plan.model, rounded, layout, gpus_per_node):
                continue
            if plan.model.num_query_groups % tensor:
                continue  # Megatron would copy groups, the engine gives every rank its own
            if (fixed.get("tensor", tensor), fixed.get("context", context)) == (tensor, context):
                found.append(replace(plan, tensor=tensor, context=context))
    if not found:
        raise LongRopeError(
            f"no layout of {gpus} GPUs keeps the rules: tensor x context parallel must divide the "
            f"GPUs, and tensor parallel the {plan.model.num_query_groups} query groups; change the "
            "number of GPUs or the sizes that are fixed"
        )

    def key(one: GenerationPlan) -> tuple[float, ...]:
        # Of equals that with fewer processes to a sequence: communication is not modelled.
        if one.fits:
            return (0, float(f"{one.seconds:.3g}"), one.context, one.tensor)
        return (1, one.memory.total, one.context, one.tensor)

    return sorted(found, key=key)
