"""Megatron's flags of a layout, and the layout, training and model of a Megatron command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_longrope.errors import LongRopeError
from megatron_longrope.options import argument_type, parse_positive
from megatron_longrope.plan.layouts import FULL, Layout, Training
from megatron_longrope.plan.model import Model, NotCoveredError

DEFAULT_CHUNK = 1024
"""Tokens that `--longrope-chunked-loss` means without a number; a test compares."""

UNCOVERED = (
    "account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split",
    "attention-output-gate", "cpu-offloading-num-layers", "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers", "experimental-attention-variant",
    "fine-grained-activation-offloading", "heterogeneous-layers-config-encoded-json",
    "heterogeneous-layers-config-path", "hybrid-layer-pattern", "hybrid-override-pattern",
    "moe-latent-size", "moe-layer-freq", "moe-shared-expert-intermediate-size", "mtp-num-layers",
    "multi-latent-attention", "num-distributed-optimizer-instances",
    "num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank",
    "optimizer-cpu-offload", "pipeline-model-parallel-layout", "tensor-parallel-num-weight-shards",
    "use-megatron-fsdp", "use-precision-aware-optimizer", "use-torch-fsdp2",
)  # fmt: skip
"""Flags of Megatron that change memory or hours in ways that the formulas do not know."""

_WITHOUT_EFFECT = {
    "cpu-offloading-num-layers": "0", "moe-layer-freq": "1", "mtp-num-layers": "0",
    "num-distributed-optimizer-instances": "1", "num-virtual-stages-per-pipeline-rank": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """A few words of a command line."""

    words: tuple[str, ...]
    """The flag and its values."""
    reason: str
    """Why it is there."""


def render(layout: Layout, training: Training, model: Model) -> list[Flag]:
    """The flags that make Megatron use a layout, with a reason each; :func:`parse` reads them."""
    part = "MLPs" if model.num_experts is None else "experts"
    reasons: dict[tuple[str, ...], str] = {
        (model.mlp_module,): f"{part}, the most memory for the fewest operations",
        FULL: "whole layers, their attention too",
    }
    dropped = f"recomputes {reasons.get(layout.recompute, 'what was asked for')}"
    found = [
        _flag("tensor-model-parallel-size", layout.tensor, "GPUs that share a layer"),
        _flag("context-parallel-size", layout.context, "GPUs that share a sequence"),
        _flag("pipeline-model-parallel-size", layout.pipeline, "GPUs with different layers"),
        _flag("micro-batch-size", layout.micro_batch_size, "long sequences fill a GPU one by one"),
        _flag("global-batch-size", training.global_batch_size, "sequences of a step"),
        _flag("seq-length", training.length, "tokens of a sequence"),
    ]
    if model.num_experts is not None:
        found += [
            _flag("expert-model-parallel-size", layout.expert, "GPUs with different experts"),
            _flag("expert-tensor-parallel-size", layout.expert_tensor, "GPUs that share an expert"),
            _flag("moe-token-dispatcher-type", "alltoall", "a GPU holds the tokens of its experts"),
        ]
    if layout.sequence_parallel and layout.tensor > 1:
        found.append(_flag("sequence-parallel", None, "splits norms and their inputs by TP, too"))
    if layout.distributed_optimizer:
        found.append(
            _flag("use-distributed-optimizer", None, "splits Adam's state over DP x CP ranks")
        )
    if layout.recompute == FULL:
        method, number = "keeps the inputs of groups", "layers of a group"
        if layout.recompute_method == "block":
            method, number = "keeps the other layers whole", "layers of a stage that are recomputed"
        found += [
            _flag("recompute-granularity", "full", dropped),
            _flag("recompute-method", layout.recompute_method, method),
            _flag("recompute-num-layers", layout.recompute_num_layers, number),
        ]
    elif layout.recompute:
        attention = "computed again" if "core_attn" in layout.recompute else "kept"
        found += [
            _flag("recompute-granularity", "selective", dropped),
            Flag(("--recompute-modules", *layout.recompute), f"attention is {attention}"),
        ]
    if layout.cp_comm_type == "gathered":
        found.append(_flag("longrope-attention", "flash", "this package's own attention"))
    elif layout.context > 1:
        how = {
            "a2a": "splits heads: CP divides the key heads of a rank, and less is sent",
            "p2p": "a ring: sends overlap with attention, and heads need not divide",
            "all_gather": "gathers keys and values",
            "a2a+p2p": "as the command has it, with its --hierarchical-context-parallel-sizes",
        }
        found.append(_flag("cp-comm-type", layout.cp_comm_type, how[layout.cp_comm_type]))
    found += [
        _flag(
            "no-create-attention-mask-in-dataloader",
            None,
            f"the mask would take {training.length**2 / 2**30:.3g} GiB a sequence",
        ),
        _flag("calculate-per-token-loss", None, "the mean over tokens, whatever CP and DP are"),
    ]
    if not layout.rope_fusion:
        found.append(_flag("no-rope-fusion", None, "the fused kernel's offsets have 32 bits"))
    if training.loss_chunk is not None:
        chunk = None if training.loss_chunk == DEFAULT_CHUNK else training.loss_chunk
        found.append(_flag("longrope-chunked-loss", chunk, "logits of a few tokens at a time"))
    if training.precision != "fp32":
        found.append(_flag(training.precision, None, "half precision"))
    if training.half_gradients:
        found.append(_flag("grad-reduce-in-bf16", None, "halves the gradients"))
    if not training.hidden_dropout:
        found.append(_flag("hidden-dropout", "0", "keeps no masks"))
    return found


def _flag(name: str, value: object, reason: str) -> Flag:
    return Flag((f"--{name}",) if value is None else (f"--{name}", str(value)), reason)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LongRopeError(f"the Megatron command does not parse ({message}); correct its flags")


_positive = argument_type(parse_positive)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    sizes = (
        "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups",
        "kv-channels", "vocab-size", "moe-ffn-hidden-size", "moe-router-topk", "seq-length",
        "global-batch-size", "recompute-num-layers", "expert-tensor-parallel-size",
    )  # fmt: skip
    for name in sizes:
        parser.add_argument(f"--{name}", type=_positive)
    for name in ("num-experts", "train-iters", "train-samples"):  # Megatron takes 0
        parser.add_argument(f"--{name}", type=int)
    ones = ("tensor-model", "context", "pipeline-model", "expert-model")
    for name in ones:
        parser.add_argument(f"--{name}-parallel-size", type=_positive, default=1)
    parser.add_argument("--micro-batch-size", type=_positive, default=1)
    parser.add_argument("--make-vocab-size-divisible-by", type=_positive, default=128)
    parser.add_argument("--rotary-percent", type=float, default=1.0)
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--recompute-method", choices=("uniform", "block"), default="uniform")
    parser.add_argument("--recompute-modules", nargs="+", default=["core_attn"])
    kinds = ("p2p", "all_gather", "a2a", "a2a+p2p")
    parser.add_argument("--cp-comm-type", nargs="+", choices=kinds, default=["p2p"])
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--longrope-attention", default="auto")
    parser.add_argument("--longrope-chunked-loss", nargs="?", type=_positive, const=DEFAULT_CHUNK)
    for name in ("load", "pretrained-checkpoint", "tokenizer-model", "tokenizer-type"):
        parser.add_argument(f"--{name}")
    switches = (
        "group-query-attention", "untie-embeddings-and-output-weights", "swiglu", "add-qkv-bias",
        "qk-layernorm", "bf16", "fp16", "grad-reduce-in-bf16", "sequence-parallel",
        "use-distributed-optimizer", "recompute-activations", "use-checkpoint-args",
        "no-rope-fusion",
    )  # fmt: skip
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def parse(words: Sequence[str], gpus: int) -> tuple[Model, Training, Layout]:
    """What a Megatron training command trains, and how; flags that are not known are passed over.

    Args:
        words (Sequence[str]): The command's words; those before the first flag do not matter.
        gpus (int): GPUs that it runs on, which gives the data-parallel size.

    Raises:
        LongRopeError: A flag that is needed is missing, or a value is no number.
    """
    args, _ = _parser().parse_known_args(list(words))
    model = _model(args)
    layout = _layout(args, model, gpus)
    batch = args.global_batch_size or layout.data * layout.micro_batch_size
    steps = args.train_iters
    if steps is None and args.train_samples is not None:
        steps = args.train_samples // batch
    training = Training(
        length=_needed(args, "seq_length"),
        global_batch_size=batch,
        steps=_needed(args, "train_iters") if steps is None else steps,
        loss_chunk=args.longrope_chunked_loss,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        half_gradients=args.grad_reduce_in_bf16,
        hidden_dropout=args.hidden_dropout > 0,
        vocab_divisor=args.make_vocab_size_divisible_by,
    )
    return model, training, layout


def refuse_uncovered(words: Sequence[str]) -> None:
    """Refuse a Megatron training command with flags that the plan's formulas do not cover.

    Raises:
        NotCoveredError: It has some.
    """
    split = [part for word in words for part in word.split("=", 1)]
    given = dict(zip(split, [*split[1:], ""], strict=True))
    if found := ", ".join(
        flag
        for name in UNCOVERED
        if (flag := f"--{name}") in given and given[flag] != _WITHOUT_EFFECT.get(name)
    ):
        raise NotCoveredError(
            f"the Megatron command has {found}, which the plan's formulas do not cover; plan it "
            "without, and measure the difference"
        )


def _needed(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    if value is None:
        raise LongRopeError(
            f"the Megatron command has no --{name.replace('_', '-')}, which memory and hours "
            "depend on; add it"
        )
    return value


def _layout(args: argparse.Namespace, model: Model, gpus: int) -> Layout:
    ranks = (
        args.tensor_model_parallel_size
        * args.context_parallel_size
        * args.pipeline_model_parallel_size
    )
    if ranks < 1 or gpus < ranks or gpus % ranks:
        raise LongRopeError(
            f"{gpus} GPUs are no multiple of the command's tensor x context x pipeline parallel "
            f"size {ranks}; give a multiple"
        )
    granularity = args.recompute_granularity
    recompute: tuple[str, ...] = ()
    if granularity == "full":
        recompute = FULL
        _needed(args, "recompute_num_layers")
    elif granularity == "selective" or args.recompute_activations:
        recompute = tuple(args.recompute_modules)
    ours = args.longrope_attention in ("flash", "sdpa")
    ours |= args.longrope_attention == "auto" and args.transformer_impl == "local"
    return Layout(
        tensor=args.tensor_model_parallel_size,
        context=args.context_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        data=gpus // ranks,
        expert=args.expert_model_parallel_size if model.num_experts else 1,
        expert_tensor=(args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
        if model.num_experts
        else 1,
        recompute=recompute,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers or 1,
        micro_batch_size=args.micro_batch_size,
        sequence_parallel=args.sequence_parallel or args.tensor_model_parallel_size == 1,
        distributed_optimizer=args.use_distributed_optimizer,
        rope_fusion=not args.no_rope_fusion and args.transformer_impl != "local",
        cp_comm_type="gathered" if ours else args.cp_comm_type[0],
    )


def _model(args: argparse.Namespace) -> Model:
    if args.num_layers is None and args.use_checkpoint_args:
        return _checkpoint(args)
    layers, hidden = _needed(args, "num_layers"), _needed(args, "hidden_size")
    heads = _needed(args, "num_attention_heads")
    if not args.swiglu:
        raise NotCoveredError(
            "the Megatron command has no --swiglu, and the plan's formulas are those of gated "
            "MLPs; plan a model with them"
        )
    ffn = args.ffn_hidden_size or 8 * hidden // 3 // 64 * 64  # Megatron's for gated MLPs
    groups = (args.num_query_groups or 1) if args.group_query_attention else heads
    return Model(
        layers,
        hidden,
        ffn,
        heads,
        groups,
        vocab_size=args.vocab_size or _vocabulary(args),
        head_dim=args.kv_channels or hidden // heads,
        untie_embeddings=args.untie_embeddings_and_output_weights,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        rotary_percent=args.rotary_percent,
        num_experts=args.num_experts or None,
        moe_ffn_hidden_size=(args.moe_ffn_hidden_size or ffn) if args.num_experts else 0,
        moe_router_topk=(args.moe_router_topk or 2) if args.num_experts else 0,
    )


def _vocabulary(args: argparse.Namespace) -> int:
    """The tokenizer's, if it is there.

    Raises:
        LongRopeError: It is not.
    """
    if args.tokenizer_model and Path(args.tokenizer_model).exists():
        from megatron_longrope.data.tokenizer import load_tokenizer

        return int(load_tokenizer(args.tokenizer_model).vocab_size)
    return int(_needed(args, "vocab_size"))


def _checkpoint(args: argparse.Namespace) -> Model:
    """The model of the checkpoint that the command takes its arguments from."""
    paths = [path for path in (args.load, args.pretrained_checkpoint) if path]
    there = next((path for path in paths if Path(path).exists()), None)
    if there is None:
        raise LongRopeError(
            f"the Megatron command takes the model from {' or '.join(paths) or 'no checkpoint'}, "
            "which is not there; give the model's flags, such as --num-layers, as well"
        )
    from megatron_longrope.checkpoint import MegatronCheckpoint  # needs torch

    return Model.from_shape(MegatronCheckpoint.open(there).shape)
