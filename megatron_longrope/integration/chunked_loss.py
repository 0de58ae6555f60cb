"""Training loss in chunks (`--longrope-chunked-loss`) inside Megatron's GPTModel and HybridModel.

Both call their output layer and hand its logits to `compute_language_model_loss`. The output layer
of a model that :func:`defer` has changed gives :class:`DeferredLogits` instead: hidden states and
weights, from which the loss is computed chunk by chunk.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor

from megatron_longrope.errors import LongRopeError
from megatron_longrope.training_loss import chunked_linear_cross_entropy

FLAG = "--longrope-chunked-loss"

# Megatron's arguments that ask for what needs whole logits, or for another way to the same loss.
_REFUSED = {
    "mtp_num_layers": "multi-token prediction looks for the largest of its logits",
    "use_mup": "it scales the logits after the output layer",
    "defer_embedding_wgrad_compute": "it computes the output weights' gradient from whole logits",
    "overlap_moe_expert_parallel_comm": "its schedule calls the output layer by itself",
    "use_megatron_fsdp": "the output weights are sharded again before the loss needs them",
    "use_torch_fsdp2": "the output weights are sharded again before the loss needs them",
    "cross_entropy_loss_fusion": "it is another implementation of the same loss",
    "config_logger_dir": "it logs whole logits",
    "fp8_output_proj": "the output layer would not compute in the parameters' type",
    "logit_dtype": "chunks of logits are rounded to the parameters' type",
    "logits_load_dir": "distillation compares whole logits with the teacher's",
    "logits_save_dir": "it stores whole logits",
    "perform_rl_step": "RL takes the log-probabilities of its tokens from whole logits",
    "export_kd_teacher_load": "distillation compares whole logits with the teacher's",
}
# Flags that argparse stores under another name.
_FLAG_OF = {"logit_dtype": "--output-logit-dtype"}


def chunk_tokens_from_args(args: argparse.Namespace) -> int | None:
    """Tokens of a chunk that `--longrope-chunked-loss` asks for, None without the flag.

    Raises:
        LongRopeError: The number is below 1, or another flag needs the logits.
    """
    tokens = getattr(args, "longrope_chunked_loss", None)
    if tokens is None:
        return None
    if tokens < 1:
        raise LongRopeError(f"{FLAG} {tokens} is below 1; give the number of tokens of a chunk")
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            flag = _FLAG_OF.get(name, f"--{name.replace('_', '-')}")
            raise LongRopeError(
                f"{FLAG} cannot be combined with {flag}: {reason}; remove one of the two"
            )
    if (getattr(args, "gtp_weight_remat_size", None) or 1) > 1:
        raise LongRopeError(
            f"{FLAG} cannot be combined with --tensor-parallel-num-weight-shards: the output "
            "weights are sharded between uses; remove one of the two"
        )
    return tokens


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """What stands for logits [s, b, V / tp] until someone asks for the loss."""

    layer: Any
    """Megatron's output layer."""
    hidden: Tensor
    """[s, b, h], or a rank's part of the sequence."""
    weight: Tensor
    """[V / tp, h]."""

    def loss(self, labels: Tensor, chunk_tokens: int) -> Tensor:
        """Loss of every token, [b, s] as `labels`."""
        layer = self.layer
        main_grad = None
        if layer.gradient_accumulation_fusion:
            main_grad = getattr(self.weight, "main_grad", None)
        loss = chunked_linear_cross_entropy(
            self.hidden,
            self.weight,
            labels.transpose(0, 1).contiguous(),  # [b, s] -> [s, b]
            chunk_tokens=chunk_tokens,
            tp_group=layer.tp_group,
            sequence_parallel=layer.sequence_parallel,
            main_grad=main_grad,
        )
        return loss.transpose(0, 1).contiguous()

    def transpose(self, first: int, second: int) -> Tensor:
        """The logits themselves, transposed: what Megatron returns when there are no labels."""
        logits, _ = type(self.layer).forward(self.layer, self.hidden, weight=self.weight)
        return logits.transpose(first, second)


def defer(model: Any, chunk_tokens: int) -> None:
    """Let a model with an output layer compute its loss in chunks.

    Args:
        model (LanguageModule): GPTModel, HybridModel or MambaModel of the last pipeline stage.
        chunk_tokens (int): Tokens whose logits exist at the same time.

    Raises:
        LongRopeError: The output layer does something else than multiply.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = getattr(model, "output_layer", None)
    only_multiplies = (
        type(layer) is ColumnParallelLinear
        and layer.bias is None
        and not layer.gather_output
        and getattr(layer, "output_dtype", None) is None  # since 0.20: logits in another type
    )
    if not only_multiplies:
        raise LongRopeError(
            f"{FLAG} needs an output layer of type ColumnParallelLinear without bias, with parallel"
            f" output in the parameters' type, and {type(model).__name__} has {_describe(layer)}; "
            "remove the flag"
        )
    layer.forward = MethodType(_deferring_forward, layer)
    model.longrope_chunk_tokens = chunk_tokens
    model.compute_language_model_loss = MethodType(_deferred_loss, model)


def is_deferred(model: Any) -> bool:
    """True when :func:`defer` has changed the model."""
    return hasattr(model, "longrope_chunk_tokens")


def _describe(layer: Any) -> str:
    if layer is None:
        return "none"
    bias = "without" if getattr(layer, "bias", None) is None else "with"
    output = "gathered" if getattr(layer, "gather_output", False) else "parallel"
    if getattr(layer, "output_dtype", None) is not None:
        output += f" {layer.output_dtype}"
    return f"{type(layer).__name__} {bias} bias, {output} output"


def _deferring_forward(
    layer: Any,
    input_: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Any, None]:
    if runtime_gather_output:  # inference: it wants the logits of the last tokens, here and now
        return type(layer).forward(layer, input_, weight, runtime_gather_output)
    return DeferredLogits(layer, input_, layer.weight if weight is None else weight), None


def _deferred_loss(model: Any, labels: Tensor, logits: Any) -> Tensor:
    if not isinstance(logits, DeferredLogits):
        raise LongRopeError(
            f"{FLAG} computes the loss from hidden states, and {type(model).__name__} has gathered "
            "its logits; remove the flag or runtime_gather_output"
        )
    return logits.loss(labels, model.longrope_chunk_tokens)
