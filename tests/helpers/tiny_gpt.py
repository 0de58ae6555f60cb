"""A tiny GPTModel as Megatron builds it in a run with LongRoPE factors, and its reference."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from reference_decoder import Decoder, Rope, Weights

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.integration import hooks, wrappers
from megatron_longrope.integration.settings import LongRopeSettings, settings_from_args

ORIGINAL, RUN = 32, 64  # tokens: the pre-trained window and the run's
HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 32, 48, 4, 2, 8, 96
ATTENTION_FACTOR = 1.2  # for the run; 1 within the original window
START_TOKENS = 3
FACTORS = {8: (1.0, 1.3, 1.7, 2.0), 4: (1.2, 2.0)}  # by rotary_dim


def longrope_config(rotary_dim: int = HEAD_DIM) -> LongRopeConfig:
    """Stock RoPE in the original window, factors and an attention factor in the run's."""
    long = FactorSet(RUN, FACTORS[rotary_dim], num_start_tokens=START_TOKENS)
    return LongRopeConfig(
        rotary_base=10000.0,
        rotary_dim=rotary_dim,
        original_max_position_embeddings=ORIGINAL,
        factor_sets=(FactorSet(ORIGINAL, (1.0,) * (rotary_dim // 2)), long),
        attention_factor=ATTENTION_FACTOR,
    )


def run_arguments(**changes: Any) -> argparse.Namespace:
    """What Megatron's parser and validation leave behind, as far as the plugin reads it."""
    values = {
        "longrope_config": "factors.json",
        "longrope_mode": "auto",
        "longrope_attention": "auto",
        "longrope_attention_factor_carrier": "auto",
        "longrope_hf_parity": False,
        "position_embedding_type": "rope",
        "transformer_impl": "local",
        "context_parallel_size": 1,
        "kv_channels": HEAD_DIM,
        "rotary_percent": 1.0,
        "rotary_base": 10000,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "multi_latent_attention": False,
        "hybrid_context_parallel": False,
        "seq_length": RUN,
        "train_iters": 1,
        "create_attention_mask_in_dataloader": False,
        "reset_attention_mask": False,
        "rank": 0,
    }
    return argparse.Namespace(**{**values, **changes})


def start_run(config: LongRopeConfig | None = None, **changes: Any) -> argparse.Namespace:
    """Hook Megatron and let models follow the run; `changes` are Megatron's arguments.

    Returns:
        Namespace: The arguments, which hold `softmax_scale` if that carries the attention factor.
    """
    args = run_arguments(**changes)
    rotary_dim = int(HEAD_DIM * args.rotary_percent)
    settings = settings_from_args(args, config or longrope_config(rotary_dim), "sdpa")
    hooks.apply()
    wrappers.activate(wrappers.Run(settings, "sdpa"))
    return args


def settings_of_run() -> LongRopeSettings:
    """What the active run uses."""
    return wrappers._run.settings


def transformer_config(args: argparse.Namespace, *, layers: int = 2, **changes: Any):
    """A TransformerConfig; as Megatron does, every argument that it knows is copied."""
    from megatron.core.transformer import TransformerConfig

    values = {
        "num_layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": args.kv_channels,
        "context_parallel_size": args.context_parallel_size,
        "softmax_scale": getattr(args, "softmax_scale", None),
        "flash_decode": getattr(args, "flash_decode", False),
        "no_rope_freq": getattr(args, "no_rope_freq", None),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**values, **changes})


def build(args: argparse.Namespace, *, model_options: dict | None = None, **changes: Any):
    """The GPTModel of the active run, with random weights; `changes` are TransformerConfig's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = transformer_config(args, **changes)
    options = dict(model_options or {})
    spec = options.pop("spec", None) or get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=RUN,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=False,
        **options,
    )


def fill(model: torch.nn.Module, seed: int = 3) -> Weights:
    """Give a whole model weights for which attention matters; returns them in fp64.

    Norms, which start at ones, are moved too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread, centre = (0.2, 1.0) if "norm.weight" in name else (0.1, 0.0)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + spread * noise)
    return reference_weights(model)


def reference_weights(model: torch.nn.Module) -> Weights:
    """The model's parameters, copied to fp64, with gradients."""
    return {
        name: parameter.detach().double().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }


def rope(rotary_dim: int = HEAD_DIM, **changes: Any) -> Rope:
    """The rotation that a sequence of the run must get."""
    values = {"attention_factor": ATTENTION_FACTOR, "num_start_tokens": START_TOKENS}
    return Rope(FACTORS[rotary_dim], **{**values, **changes})


def decoder(
    rotary_dim: int = HEAD_DIM, unrotated_layers: tuple[int, ...] = (), **changes: Any
) -> Decoder:
    """The reference of a model of the run; `changes` are the rotation's."""
    return Decoder(rope(rotary_dim, **changes), HEADS, GROUPS, unrotated_layers)


def random_tokens(batch: int, length: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their labels, `[b, s]` each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (batch, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
