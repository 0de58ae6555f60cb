"""What a training run needs, in numbers and in words, and what would fit if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import format_length
from megatron_longrope.plan.flags import DEFAULT_CHUNK, Flag, parse, refuse_uncovered, render
from megatron_longrope.plan.hardware import GIB, GPUS, MOST_GPUS, USABLE, Gpu, parse_gpu
from megatron_longrope.plan.layouts import (
    Fixed,
    Layout,
    Training,
    layouts,
    problem,
    rope_overflow,
    traffic,
)
from megatron_longrope.plan.memory import Memory, memory
from megatron_longrope.plan.model import Model
from megatron_longrope.plan.time import Flops, rates, step_flops, step_seconds
from megatron_longrope.progress import format_duration

_FIELDS = {
    "tensor": "tensor-parallel size",
    "context": "context-parallel size",
    "pipeline": "pipeline-parallel size",
    "expert": "expert-parallel size",
    "recompute": "recomputation",
}


@dataclass(frozen=True)
class Estimate:
    """A training run on so many GPUs in one layout."""

    model: Model
    """What is trained."""
    training: Training
    """How long, in which batches."""
    layout: Layout
    """How it is spread."""
    gpu: Gpu
    """The GPU assumed."""
    mfu: float | None = None
    """Part of the peak in place of the anchors of :func:`.time.rates`."""

    @property
    def memory(self) -> Memory:
        """Bytes of the fullest GPU by part."""
        reserve = round((1 - USABLE) * self.gpu.gib * GIB)
        return memory(self.model, self.training, self.layout, reserve)

    @property
    def fits(self) -> bool:
        """Whether the worst moment fits."""
        return self.memory.total <= self.gpu.gib * GIB

    @property
    def step(self) -> Flops:
        """Operations of a step by kind."""
        return step_flops(self.model, self.training, self.layout)

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole run, without recomputation."""
        return self.training.steps * self.step.model

    @property
    def step_seconds(self) -> float:
        """Expected seconds of a step."""
        rate = rates(self.gpu, self.mfu)
        return step_seconds(self.step, self.training, self.layout, self.gpu, rate)

    @property
    def hours(self) -> float:
        """Expected hours of the run."""
        return self.training.steps * self.step_seconds / 3600

    @property
    def tokens_per_second(self) -> float:
        """Expected tokens a second on each GPU."""
        tokens = self.training.global_batch_size * self.training.length
        return tokens / self.step_seconds / self.layout.gpus

    @property
    def utilisation(self) -> float:
        """Expected model FLOPs as a part of the GPUs' peak."""
        return self.step.model / self.step_seconds / self.layout.gpus / (self.gpu.tflops * 1e12)

    def short(self) -> str:
        """The layout in a few words."""
        layout = self.layout
        experts = f" EP{layout.expert}" if self.model.num_experts else ""
        recomputed = "+".join(layout.recompute) or "none"
        return (
            f"TP{layout.tensor} CP{layout.context} PP{layout.pipeline} DP{layout.data}{experts}, "
            f"recompute {recomputed}"
        )

    def text(self) -> str:
        """The estimate for people, several lines."""
        training, step = self.training, self.step
        lines = [
            f"{self.model.parameters / 1e9:.2f} B parameters, {training.length} tokens "
            f"({format_length(training.length)}), batch {training.global_batch_size}, "
            f"{training.steps} steps on {self.layout.gpus} x {self.gpu.name} "
            f"({self.gpu.gib:g} GiB): {self.short()}",
            *self.memory.lines(self.gpu),
            "  (loss and a layer's backward pass are not at work at the same time)",
            f"operations of a step: {step.model:.2e} FLOP, {step.hardware:.2e} with recomputation, "
            f"{step.attention / step.model:.0%} attention",
            f"expected: {format_duration(self.step_seconds)} a step, "
            f"{format_duration(3600 * self.hours)} in all "
            f"({self.hours * self.layout.gpus:.3g} GPU hours), "
            f"{self.tokens_per_second:.0f} tokens/s/GPU, {self.utilisation:.0%} of peak",
        ]
        if self.fits:
            flags = (f"  {' '.join(flag.words):<46}# {flag.reason}" for flag in self.flags())
            lines += ["flags:", *flags]
        return "\n".join(lines)

    def flags(self) -> list[Flag]:
        """The flags to paste, with their reasons."""
        return render(self.layout, self.training, self.model)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in GiB."""
        return {
            "fits": self.fits,
            "gpu": asdict(self.gpu),
            "gpus": self.layout.gpus,
            "layout": asdict(self.layout),
            "training": asdict(self.training),
            "parameters": self.model.parameters,
            "memory_gib": self.memory.gib(),
            "flops_per_step": {"model": self.step.model, "hardware": self.step.hardware},
            "seconds_per_step": self.step_seconds,
            "hours": self.hours,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "utilisation": self.utilisation,
            "flags": [word for flag in self.flags() for word in flag.words],
        }


@dataclass(frozen=True)
class Cluster:
    """GPUs to plan for."""

    gpu: Gpu
    """One of them."""
    gpus: int
    """How many."""
    gpus_per_node: int = 8
    """How many NVLink joins."""
    mfu: float | None = None
    """See :class:`Estimate`."""


def rank(
    model: Model, training: Training, cluster: Cluster, fixed: Fixed | None = None
) -> list[Estimate]:
    """All layouts, the best first.

    Those that fit come first; of them the fastest, to three digits (recomputation and the
    pipeline's bubble cost time), and among equals the one that sends least. Those that do not fit
    follow by their size.

    Args:
        model (Model): Its shape.
        training (Training): What is trained.
        cluster (Cluster): The GPUs.
        fixed (Fixed, optional): Fields of :class:`Layout` that are not chosen.

    Raises:
        LongRopeError: No layout keeps Megatron's rules.
    """
    found = [
        Estimate(model, training, layout, cluster.gpu, cluster.mfu)
        for layout in layouts(model, training, cluster.gpus, cluster.gpus_per_node, fixed or {})
    ]
    if not found:
        raise LongRopeError(
            f"no layout of {cluster.gpus} GPUs keeps Megatron's rules "
            f"({_broken(model, training, cluster, fixed or {})}); change the number of GPUs, the "
            "batch or the sizes that are fixed"
        )

    def key(estimate: Estimate) -> tuple[float, ...]:
        if not estimate.fits:
            return (1, estimate.memory.total)
        sent = traffic(model, training, estimate.layout, cluster.gpus_per_node)
        return (0, float(f"{estimate.step_seconds:.3g}"), sent)

    return sorted(found, key=key)


def _broken(model: Model, training: Training, cluster: Cluster, fixed: Fixed) -> str:
    """A rule that the sizes asked for break, as a sentence."""
    one = Layout(**fixed, data=1)
    if cluster.gpus % one.gpus:
        return f"tensor x context x pipeline parallel = {one.gpus} does not divide the GPUs"
    layout = replace(one, data=cluster.gpus // one.gpus)
    return problem(model, training, layout) or "no size fits all of them"


def remedies(best: Estimate, cluster: Cluster, fixed: Fixed | None = None) -> list[str]:
    """Single changes that would make an estimate fit, a sentence each.

    Args:
        best (Estimate): The first of :func:`rank`; it does not fit.
        cluster (Cluster): The GPUs.
        fixed (Fixed, optional): What :func:`rank` was told not to choose.
    """
    fixed = fixed or {}
    model, training = best.model, best.training

    def fitting(
        training: Training = training, cluster: Cluster = cluster, fixed: Fixed = fixed
    ) -> Estimate | None:
        try:
            other = rank(model, training, cluster, fixed)[0]
        except LongRopeError:  # no layout at all
            return None
        return other if other.fits else None

    found = []
    chunked = replace(training, loss_chunk=DEFAULT_CHUNK)
    if training.loss_chunk is None and (other := fitting(chunked)):
        found.append(f"--chunked-loss ({other.short()})")
    for name in fixed:
        free = cast(Fixed, {key: value for key, value in fixed.items() if key != name})
        if other := fitting(fixed=free):
            found.append(f"leaving the {_FIELDS[name]} to choose ({other.short()})")
    if not found and (other := fitting(chunked, fixed={})):
        found.append(f"--chunked-loss, and leaving everything to choose ({other.short()})")
    gpus = 2 * cluster.gpus
    while gpus <= MOST_GPUS and not (other := fitting(cluster=replace(cluster, gpus=gpus))):
        gpus *= 2
    if gpus <= MOST_GPUS and other:
        found.append(f"{gpus} GPUs ({other.short()})")
    for gpu in GPUS.values():
        if gpu.gib > cluster.gpu.gib and (other := fitting(cluster=replace(cluster, gpu=gpu))):
            found.append(f"GPUs of {gpu.gib:g} GiB, such as {gpu.name} ({other.short()})")
            break
    return found


def plan_command(words: Sequence[str], gpu: str = "h100", gpus: int = 8) -> Estimate:
    """The estimate of a Megatron training command as it stands.

    Args:
        words (Sequence[str]): The command, see :func:`.flags.parse`.
        gpu (str): See :func:`.hardware.parse_gpu`. Defaults to "h100".
        gpus (int): GPUs of the run. Defaults to 8.

    Raises:
        NotCoveredError: It has flags that the plan's formulas do not cover.
        LongRopeError: The command lacks a flag that matters, Megatron would refuse its layout, or
            its fused RoPE cannot index so many tokens.
    """
    refuse_uncovered(words)
    model, training, layout = parse(words, gpus)
    if broken := problem(model, training, layout):
        raise LongRopeError(f"Megatron would refuse the command: {broken}; change the size")
    if layout.rope_fusion and (overflow := rope_overflow(model, training, layout)):
        raise LongRopeError(overflow)
    return Estimate(model, training, layout, parse_gpu(gpu))
