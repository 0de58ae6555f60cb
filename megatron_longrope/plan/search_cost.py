"""What a search costs before it is started: arithmetic, memory per GPU, expected hours.

Plain arithmetic. :mod:`megatron_longrope.flops` has the operations of a forward pass;
docs/scoring.md says which tensors exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops, layer_weights
from megatron_longrope.plan.hardware import GIB, USABLE, Gpu
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
    """An estimate; every number follows from the arguments of :func:`estimate`."""

    target_length: int
    """Tokens of a sample."""

    samples: int
    """Samples of an evaluation."""

    evaluations: int
    """Evaluations of the search."""

    tensor_parallel: int
    """GPUs that share a layer."""

    context_parallel: int
    """GPUs that share a sequence."""

    replicas: int
    """Copies of the model that score candidates side by side."""

    gpu: Gpu
    """The GPU assumed."""

    dtype: str
    """Of weights and activations."""

    utilisation: float
    """Assumed share of the GPU's peak."""

    sample_flops: float
    """Floating-point operations of one sample's forward pass."""

    attention_share: float
    """The part of them that is attention, 0 to 1."""

    memory: Mapping[str, int]
    """Bytes per GPU by part. Not all parts exist at once."""

    peak_bytes: int
    """Bytes per GPU at the worst moment."""

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
        rate = self.tensor_parallel * self.context_parallel * self.gpu.tflops * 1e12
        return self.evaluation_flops / (rate * self.utilisation)

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
    utilisation: float = 0.4,
) -> SearchCost:
    """:func:`estimate` of a `longrope search` command.

    Args:
        options (SearchOptions): Its options.
        gpus (int): GPUs of the job, a multiple of the command's TP x CP.
    """
    tensor, context = options.tensor_model_parallel_size, options.context_parallel_size
    return estimate(
        shape,
        target_length=options.target_length,
        samples=samples,
        evaluations=evaluations,
        gpu=gpu,
        tensor_parallel=tensor,
        context_parallel=context,
        replicas=gpus // (tensor * context),
        batch=min(samples, max(1, options.tokens_per_forward // options.target_length)),
        dtype=options.dtype or str(shape.params_dtype).removeprefix("torch."),
        utilisation=utilisation,
    )


def estimate(
    shape: ModelShape,
    *,
    target_length: int,
    samples: int,
    evaluations: int,
    gpu: Gpu,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    replicas: int = 1,
    batch: int = 1,
    dtype: str = "bfloat16",
    utilisation: float = 0.4,
) -> SearchCost:
    """Estimate a search.

    Args:
        shape (ModelShape): The model's geometry.
        target_length (int): Tokens of a sample.
        samples (int): Samples of an evaluation.
        evaluations (int): Evaluations of the search.
        gpu (Gpu): See :func:`megatron_longrope.plan.hardware.parse_gpu`.
        tensor_parallel (int): GPUs that share a layer. Defaults to 1.
        context_parallel (int): GPUs that share a sequence. Defaults to 1.
        replicas (int): Copies of the model. Defaults to 1.
        batch (int): Samples that are scored together. Defaults to 1.
        dtype (str): `bfloat16`, `float16` or `float32`. Peak TFLOP/s are those of half precision
            nevertheless. Defaults to "bfloat16".
        utilisation (float): Share of the peak that the model reaches. Defaults to 0.4.

    Raises:
        LongRopeError: A count below 1, a dtype or utilisation out of range, or sizes that do not
            divide what they split.
    """
    for name, value in (
        ("target_length", target_length),
        ("samples", samples),
        ("evaluations", evaluations),
        ("tensor_parallel", tensor_parallel),
        ("context_parallel", context_parallel),
        ("replicas", replicas),
        ("batch", batch),
    ):
        if value < 1:
            raise LongRopeError(f"{name} is {value}; give 1 or more")
    if not 0 < utilisation <= 1:
        raise LongRopeError(f"utilisation {utilisation} is not in (0, 1]; give a share such as 0.4")
    if dtype not in _BYTES:
        raise LongRopeError(f"dtype {dtype!r} is unknown; choose among {', '.join(_BYTES)}")
    _check_divides(shape, target_length, tensor_parallel, context_parallel)
    linear, attention = forward_flops(shape, target_length)
    memory, peak = _memory(
        shape,
        tokens=batch * target_length // context_parallel,
        width=_BYTES[dtype],
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
    )
    return SearchCost(
        target_length=target_length,
        samples=samples,
        evaluations=evaluations,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        replicas=replicas,
        gpu=gpu,
        dtype=dtype,
        utilisation=utilisation,
        sample_flops=float(linear + attention),
        attention_share=attention / (linear + attention),
        memory=memory,
        peak_bytes=peak,
    )


def _check_divides(
    shape: ModelShape, target_length: int, tensor_parallel: int, context_parallel: int
) -> None:
    """Refuse parallel sizes that the heads or the tokens cannot be split by."""
    if shape.num_query_groups % tensor_parallel:
        raise LongRopeError(
            f"tensor parallel size {tensor_parallel} does not divide the "
            f"{shape.num_query_groups} query groups; use a divisor"
        )
    # Each rank takes a chunk from the front and one from the end, which balances causal attention.
    if context_parallel > 1 and target_length % (2 * context_parallel):
        raise LongRopeError(
            f"target length {target_length} does not split into {2 * context_parallel} chunks for "
            f"context parallel {context_parallel}; use a multiple of {2 * context_parallel}"
        )


def _memory(
    shape: ModelShape, *, tokens: int, width: int, tensor_parallel: int, context_parallel: int
) -> tuple[dict[str, int], int]:
    """Bytes by part and at the worst moment of one rank, see docs/scoring.md.

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
    parts = {
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

    def total(*beginnings: str) -> int:
        return sum(size for part, size in parts.items() if part.startswith(beginnings))

    always = total("weights", "rotary", "hidden")
    return parts, always + max(total("attention"), total("MLP"), total("logits"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
