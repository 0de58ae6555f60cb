"""Cross-entropy of a linear layer without its logits: forward and backward in chunks of tokens.

At 32k tokens and a vocabulary of 128k the logits of one sequence take 16 GiB in fp32, several times
over in the backward pass. Here they exist for a few tokens at a time. The backward pass computes
them anew from the hidden states: gradients cannot be prepared in the forward pass, because what a
token's loss is multiplied by (the loss mask, the number of tokens) is known only afterwards, and
the gradient of the weights mixes all tokens.

With n tokens in chunks of c, hidden size h and V vocabulary rows on this rank:

    FLOPs   8 n h V, of which logits twice; plain 6 n h V. The floor of the time is 4/3 of plain.
    bytes   6 c V for logits (fp32 beside half precision; 4 c V for fp32 inputs), plain 6 n V.
            Half precision also sums the weights' gradient in fp32: 6 V h, plain 2 V h. Only an
            fp32 main gradient takes the chunks directly.

The arithmetic of a token is that of Megatron's vocabulary-parallel loss: logits in the inputs'
type, softmax in fp32, the gradient of the logits rounded to the inputs' type. Every vocabulary row
counts, those that only pad the vocabulary too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longrope.errors import LongRopeError

DEFAULT_CHUNK = 1024
"""Tokens at a time: 512 MiB of fp32 logits for 128k vocabulary rows on a rank."""

# Elements of a half-precision product that waits to be added to the fp32 gradient of the weights.
_PARTIAL_ELEMENTS = 2**24


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int = DEFAULT_CHUNK,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Loss of every token, `cross_entropy(hidden @ weight.T, labels)`, differentiable.

    Args:
        hidden (Tensor): [s, b, h]; under sequence parallelism this rank's part, [s / tp, b, h].
        weight (Tensor): [V / tp, h], this rank's rows of the vocabulary.
        labels (Tensor): [s, b], integers over the whole vocabulary and all tokens. A label outside
            it has no probability of its own, as in Megatron: mask its loss.
        chunk_tokens (int): Tokens whose logits exist at the same time.
        tp_group (ProcessGroup, optional): Ranks that share the vocabulary.
        sequence_parallel (bool): Those ranks also share the tokens, in the order of ranks: hidden
            states are gathered, and their gradient is scattered, chunk by chunk.
        main_grad (Tensor, optional): [V / tp, h], where the weights' gradient is added instead of
            being returned (gradient accumulation fusion). In half precision it is added once: the
            chunks are summed in fp32 first.

    Returns:
        Tensor: [s, b] in fp32 (fp64 for fp64 inputs), the same on every rank of `tp_group`.

    Raises:
        LongRopeError: Shapes do not fit, or `chunk_tokens` is below 1.
    """
    if chunk_tokens < 1:
        raise LongRopeError(f"chunk_tokens {chunk_tokens} is below 1; give the tokens of a chunk")
    ranks = 1 if tp_group is None else tp_group.size()
    parts = ranks if sequence_parallel else 1
    tokens = hidden.numel() // hidden.shape[-1] * parts
    if labels.numel() != tokens or weight.shape[-1] != hidden.shape[-1]:
        raise LongRopeError(
            f"labels {tuple(labels.shape)} and weight {tuple(weight.shape)} do not fit hidden "
            f"states {tuple(hidden.shape)} on each of {parts} rank(s); give a label per token"
        )
    plan = _Plan(chunk_tokens, tp_group if ranks > 1 else None, parts, main_grad)
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, plan)


@dataclass(frozen=True)
class _Plan:
    """How the ranks share the work."""

    chunk_tokens: int
    group: dist.ProcessGroup | None
    parts: int  # ranks that the tokens are sharded over
    main_grad: Tensor | None

    def chunks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of this rank's tokens, and the hidden states [c, h] of that slice of all ranks."""
        step = max(self.chunk_tokens // self.parts, 1)
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            yield part, self._gather(rows[part])

    def _gather(self, rows: Tensor) -> Tensor:
        if self.parts == 1:
            return rows
        gathered = rows.new_empty(self.parts * len(rows), rows.shape[1])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.group)
        return gathered

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's tokens of the sum over ranks; without sharded tokens the rows themselves."""
        if self.parts == 1:
            return rows
        own = rows.new_empty(len(rows) // self.parts, rows.shape[1])
        dist.reduce_scatter_tensor(own, rows, group=self.group)
        return own

    def all_reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)

    def own_columns(self, labels: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Column of each label among this rank's logits, and whether it is there at all."""
        first = 0 if self.group is None else self.group.rank() * vocabulary
        is_here = (labels >= first) & (labels < first + vocabulary)
        return torch.where(is_here, labels - first, 0)[:, None], is_here[:, None]


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """See :func:`chunked_linear_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, plan: _Plan) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        targets = labels.reshape(plan.parts, -1)  # [s, b] -> [parts, s b / parts]
        losses = torch.empty(targets.shape, dtype=_softmax_dtype(hidden), device=hidden.device)
        normalizers = torch.empty_like(losses)
        for part, chunk in plan.chunks(rows):
            loss, normalizer = _forward_chunk(chunk, weight, targets[:, part].flatten(), plan)
            losses[:, part] = loss.view(plan.parts, -1)
            normalizers[:, part] = normalizer.view(plan.parts, -1)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.plan = plan
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = hidden.reshape(-1, hidden.shape[-1])
        grad_loss = grad_loss.reshape(targets.shape)
        grad_rows = torch.empty_like(rows) if needs_hidden else None
        total = _weight_sum(weight, plan) if needs_weight else None
        for part, chunk in plan.chunks(rows):
            grad_logits = _logits_gradient(
                chunk,
                weight,
                targets[:, part].flatten(),
                normalizers[:, part].flatten(),
                grad_loss[:, part].flatten(),
                plan,
            )
            if needs_hidden:
                grad_rows[part] = plan.scatter_sum(grad_logits @ weight)
            if needs_weight:
                _add_product(total, grad_logits, chunk)
            del grad_logits
        if needs_hidden:
            if plan.parts == 1:
                plan.all_reduce(grad_rows)
            grad_rows = grad_rows.view(hidden.shape)
        return grad_rows, _weight_gradient(weight, total, plan.main_grad), None, None


def _softmax_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(chunk: Tensor, weight: Tensor) -> Tensor:
    """[c, h] -> [c, V / tp]: rounded to the inputs' type first, as a linear layer's output is."""
    return (chunk @ weight.t()).to(_softmax_dtype(chunk))


def _forward_chunk(
    chunk: Tensor, weight: Tensor, labels: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Loss and log of the softmax's denominator of every token, each [c]."""
    logits = _logits(chunk, weight)
    peak = logits.amax(dim=-1)
    plan.all_reduce(peak, dist.ReduceOp.MAX)
    logits.sub_(peak[:, None])
    columns, is_here = plan.own_columns(labels, len(weight))
    predicted = logits.gather(1, columns).mul_(is_here)[:, 0]
    both = torch.stack([logits.exp_().sum(dim=-1), predicted])
    plan.all_reduce(both)
    log_sum = both[0].log()
    return log_sum - both[1], peak.add_(log_sum)


def _logits_gradient(
    chunk: Tensor,
    weight: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_loss: Tensor,
    plan: _Plan,
) -> Tensor:
    """[c, V / tp] in the inputs' type: (softmax - one-hot label) times the loss' gradient."""
    logits = _logits(chunk, weight)
    softmax = logits.sub_(normalizers[:, None]).exp_()
    columns, is_here = plan.own_columns(labels, len(weight))
    softmax.scatter_add_(1, columns, -is_here.to(softmax.dtype))
    return softmax.mul_(grad_loss[:, None]).to(chunk.dtype)


def _weight_sum(weight: Tensor, plan: _Plan) -> Tensor:
    """Where the chunks' gradients of the weights add up: in fp32, which half precision lacks.

    A main gradient in half precision (`--grad-reduce-in-bf16`, `--fp16`) is no place for it: each
    chunk would be rounded to the sum of all micro-batches.
    """
    dtype = _softmax_dtype(weight)
    if plan.main_grad is not None and plan.main_grad.dtype == dtype:
        return plan.main_grad
    return torch.zeros_like(weight, dtype=dtype)


def _add_product(total: Tensor, grad_logits: Tensor, chunk: Tensor) -> None:
    """`total += grad_logits.T @ chunk`, [V / tp, h]."""
    if total.dtype == chunk.dtype:
        total.addmm_(grad_logits.t(), chunk)
        return
    step = max(_PARTIAL_ELEMENTS // chunk.shape[1], 1)
    for start in range(0, len(total), step):  # a second [V, h] would undo what the chunks save
        rows = slice(start, start + step)
        total[rows] += grad_logits[:, rows].t() @ chunk


def _weight_gradient(
    weight: Tensor, total: Tensor | None, main_grad: Tensor | None
) -> Tensor | None:
    """What autograd gets; with `main_grad` a dummy, if Megatron's hooks wait for a gradient."""
    if total is None or main_grad is None:
        return None if total is None else total.to(weight.dtype)
    if total is not main_grad:
        main_grad.copy_(total.add_(main_grad))  # rounded once for a micro-batch
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    is_summed = getattr(weight, "zero_out_wgrad", False)  # tied: the embedding's is added to it
    return torch.zeros_like(weight) if is_summed else torch.empty_like(weight)
