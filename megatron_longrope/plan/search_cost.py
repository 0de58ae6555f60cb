"""What a search costs before it is started: arithmetic, memory per GPU, expected hours.

Plain arithmetic. :mod:`megatron_longrope.flops` has the operations of a forward pass;
docs/scoring.md says which tensors exist at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops, layer_weights
from megatron_longrope.plan.hardware import GIB, USABLE, Gpu
from megatron_longrope.plan.time import rates
from megatron_longrope.progress import format_duration

if TYPE_CHECKING:
    from megatron_longrope.checkpoint.model_args import ModelShape
    from megatron_longrope.factor_search.options import SearchOptions

# The engine's own sizes, repeated here because importing it takes seconds; a test compares them.
TOKENS_PER_MLP_SLICE = 4096
LOGITS_PER_CHUNK = 1 << 24

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class SearchCost:
    """An estimate of a search."""

    shape: ModelShape
    """The model's geometry."""
    target_length: int
    """Tokens of a sample."""
    samples: int
    """Samples of an evaluation."""
    evaluations: int
    """Evaluations of the search."""
    gpu: Gpu
    """The GPU assumed; see :func:`megatron_longrope.plan.hardware.parse_gpu`."""
    tensor_parallel: int = 1
    """GPUs that share a layer."""
    context_parallel: int = 1
    """GPUs that share a sequence."""
    replicas: int = 1
    """Copies of the model that score candidates side by side."""
    batch: int = 1
    """Samples that are scored together."""
    dtype: str = "bfloat16"
    """`bfloat16`, `float16` or `float32`, of weights and activations; peak TFLOP/s are always those
    of half precision."""
    mfu: float | None = None
    """Part of the peak in place of the anchors of :func:`.time.rates`."""

    def __post_init__(self) -> None:
        for name in ("target_length", "samples", "evaluations", "tensor_parallel",
                     "context_parallel", "replicas", "batch"):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise LongRopeError(f"{name} is {value}; give 1 or more")
        rates(self.gpu, self.mfu)
        if self.shape.num_query_groups % self.tensor_parallel:
            raise LongRopeError(
                f"tensor parallel size {self.tensor_parallel} does not divide the "
                f"{self.shape.num_query_groups} query groups; use a divisor"
            )
        # Each rank takes a chunk from the front and one from the end, to balance causal attention.
        chunks = 2 * self.context_parallel
        if self.context_parallel > 1 and self.target_length % chunks:
            raise LongRopeError(
                f"target length {self.target_length} does not split into {chunks} chunks for "
                f"context parallel {self.context_parallel}; use a multiple of {chunks}"
            )

    @property
    def sample_flops(self) -> float:
        """Floating-point operations of one sample's forward pass."""
        return float(sum(forward_flops(self.shape, self.target_length)))

    @property
    def attention_share(self) -> float:
        """The part of them that is attention, 0 to 1."""
        return forward_flops(self.shape, self.target_length)[1] / self.sample_flops

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per GPU by part, see docs/scoring.md. Not all parts exist at once."""
        return _memory(
            self.shape,
            tokens=self.batch * self.target_length // self.context_parallel,
            width=_BYTES[self.dtype],
            tensor_parallel=self.tensor_parallel,
            context_parallel=self.context_parallel,
        )

    @property
    def peak_bytes(self) -> int:
        """Bytes per GPU at the worst moment."""
        parts = self.memory

        def total(*beginnings: str) -> int:
            return sum(size for part, size in parts.items() if part.startswith(beginnings))

        always = total("weights", "rotary", "hidden")
        return always + max(total("attention"), total("MLP"), total("logits"))

    @property
    def evaluation_flops(self) -> float:
        """Floating-point operations of one evaluation."""
        return self.samples * self.sample_flops

    @property
    def search_flops(self) -> float:
        """Floating-point operations of the search."""
        return self.evaluations * self.evaluation_flops

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return self.tensor_parallel * self.context_parallel * self.replicas

    @property
    def evaluation_seconds(self) -> float:
        """Expected seconds of one evaluation on one copy of the model."""
        products, attention = forward_flops(self.shape, self.target_length)
        of_products, of_attention = rates(self.gpu, self.mfu)
        busy = self.samples * (products / of_products + attention / of_attention)
        return busy / (self.gpu.tflops * 1e12 * self.tensor_parallel * self.context_parallel)

    @property
    def utilisation(self) -> float:
        """Part of the peak that this is."""
        gpus = self.tensor_parallel * self.context_parallel
        return self.evaluation_flops / (self.evaluation_seconds * self.gpu.tflops * 1e12 * gpus)

    @property
    def hours(self) -> float:
        """Expected hours of the search; a copy never helps with another copy's evaluation."""
        return math.ceil(self.evaluations / self.replicas) * self.evaluation_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Expected hours times GPUs."""
        return self.hours * self.num_gpus

    @property
    def fits(self) -> bool:
        """Whether the worst moment fits in the usable part of the memory."""
        return self.peak_bytes <= USABLE * self.gpu.gib * GIB

    def lines(self) -> list[str]:
        """The estimate for people, a line each."""
        usable = USABLE * self.gpu.gib
        if self.fits:
            verdict = f"fits in {usable:.0f} GiB ({USABLE:.0%} of the GPU)"
        else:
            verdict = (
                f"does NOT fit in {usable:.0f} GiB ({USABLE:.0%} of the GPU); raise the "
                "context-parallel size for long samples, the tensor-parallel size for large weights"
            )
        return [
            f"one sample of {self.target_length} tokens: {self.sample_flops:.1e} FLOP, "
            f"{self.attention_share:.0%} of it attention",
            f"one evaluation of {_count(self.samples, 'sample')}: {self.evaluation_flops:.1e} FLOP",
            f"{_count(self.evaluations, 'evaluation')}: {self.search_flops:.1e} FLOP",
            f"{_count(self.num_gpus, 'GPU')} ({self.gpu.name}, {self.gpu.tflops:g} TFLOP/s each): "
            f"tensor parallel {self.tensor_parallel} x context parallel {self.context_parallel} x "
            f"{_count(self.replicas, 'replica')}",
            f"memory per GPU in {self.dtype}: {self.peak_bytes / GIB:.1f} GiB at the worst moment, "
            f"{verdict}",
            *(f"  {part}: {_gib(size)}" for part, size in self.memory.items()),
            "  (of attention, MLP and logits only one is at work at a time)",
            f"expected: {format_duration(self.evaluation_seconds)} an evaluation, "
            f"{format_duration(3600 * self.hours)} in all, {self.gpu_hours:.3g} GPU hours, "
            f"assuming {self.utilisation:.0%} of peak",
        ]


def estimate_command(
    options: SearchOptions,
    shape: ModelShape,
    *,
    samples: int,
    evaluations: int,
    gpus: int,
    gpu: Gpu,
    mfu: float | None = None,
) -> SearchCost:
    """The cost of a `longrope search` command.

    Args:
        options (SearchOptions): Its options.
        gpus (int): GPUs of the job, a multiple of the command's TP x CP.
    """
    tensor, context = options.tensor_model_parallel_size, options.context_parallel_size
    return SearchCost(
        shape,
        options.target_length,
        samples,
        evaluations,
        gpu,
        tensor,
        context,
        replicas=gpus // (tensor * context),
        batch=min(samples, max(1, options.tokens_per_forward // options.target_length)),
        dtype=options.dtype or str(shape.params_dtype).removeprefix("torch."),
        mfu=mfu,
    )


def _memory(
    shape: ModelShape, *, tokens: int, width: int, tensor_parallel: int, context_parallel: int
) -> dict[str, int]:
    """Bytes by part of one rank, see docs/scoring.md.

    Args:
        tokens (int): Tokens of this rank.
        width (int): Bytes of a value.
    """
    hidden = shape.hidden_size
    query = shape.num_attention_heads * shape.head_dim // tensor_parallel
    key = shape.num_query_groups * shape.head_dim // tensor_parallel
    vocab = math.ceil(shape.padded_vocab_size / tensor_parallel)
    weights = sum(layer_weights(shape)) // tensor_parallel
    weights += (2 if shape.untie_embeddings else 1) * vocab * hidden
    # One tensor holds q, k and v as they are projected; grouped queries are copied out of it.
    projected = query + 2 * key
    copied = query if query != key else 0
    rotating_query = projected + copied + 3 * query
    rotating_key = projected + query + 3 * key
    attended = projected + query + key + query + hidden  # and the output is projected
    ring = 0
    if context_parallel > 1:
        # Three blocks of keys and values; the sum and its merging in fp32, the output of one tile.
        ring = 6 * key * width + query * (12 + width)
    ffn, copies = shape.ffn_hidden_size, 1
    if shape.num_experts is not None:
        # At worst all tokens of a slice go to the same expert: they are copied for it, and so is
        # what it makes of them before it is weighted and added.
        assert shape.moe_ffn_hidden_size is not None
        ffn, copies = shape.moe_ffn_hidden_size, 4
    slice_tokens = min(tokens, TOKENS_PER_MLP_SLICE)
    rows = min(tokens, max(1, LOGITS_PER_CHUNK // vocab))
    # Logits in the model's dtype and in fp32, and what the softmax makes of those.
    per_logit = 8 if width == 4 else 8 + width
    return {
        "weights": weights * width,
        "rotary table": tokens * shape.rotary_dim * 12,  # fp32, with its cosines and sines
        "hidden states": tokens * width * 3 * hidden,
        "attention: queries, keys, values": tokens
        * width
        * max(rotating_query, rotating_key, attended),
        "attention: key-value ring": tokens * ring,
        "MLP: hidden states": tokens * width * hidden,
        "MLP: slice": slice_tokens
        * (math.ceil(5 * ffn / tensor_parallel) + copies * hidden)
        * width,
        "logits: chunk": rows * vocab * per_logit,
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
