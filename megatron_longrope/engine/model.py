"""Build a megatron-core model from a checkpoint: the one place that knows the model class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_longrope.attention import SdpaCoreAttention
from megatron_longrope.checkpoint.hf.limits import unsupported
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.engine.mlp import slice_mlps
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import softmax_scale
from megatron_longrope.integration import compat
from megatron_longrope.rotary import LongRopeRotaryEmbedding


def build_model(
    shape: ModelShape,
    config: LongRopeConfig,
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    hf_parity: bool = False,
    core_attention: type = SdpaCoreAttention,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A model of `shape` with the LongRoPE rotary module, for scoring; its parameters are to fill.

    They are allocated once, where and in what they will be used: a copy in fp32 on the host, in
    every process of a node, would take several times the model's bytes. Model-parallel groups must
    exist; see :func:`.process_groups.initialize`.

    The options are those of :func:`.loading.load_engine`; `core_attention` comes from
    :func:`.kernels.core_attention`.

    Raises:
        LongRopeError: The architecture is not a decoder with SwiGLU and RMSNorm, dense or of
            experts.
    """
    _check_architecture(shape)
    settings = _transformer_settings(shape, tensor_parallel, context_parallel)
    options = dict(
        # Ranks have as many rows each; those that a folder, or another layout, lacks are zero.
        vocab_size=-(-shape.padded_vocab_size // tensor_parallel) * tensor_parallel,
        max_sequence_length=config.max_length,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=not shape.untie_embeddings,
        parallel_output=True,
    )
    with torch.device("meta"):
        model = _language_model(shape, settings, options, core_attention)
    # A buffer would come out of to_empty without its values.
    assert not [name for name, _ in model.named_buffers()]
    model.to(dtype).to_empty(device=device)
    slice_mlps(model)
    model.rotary_pos_emb = LongRopeRotaryEmbedding(
        config,
        shape.head_dim,
        shape.rotary_percent,
        shape.rotary_interleaved,
        rotary_base=shape.rotary_base,
        cp_group=model.pg_collection.cp,
        hf_parity=hf_parity,
    )
    # The model then returns hidden states (after the final norm, which is the decoder's): the
    # engine applies the output layer chunk by chunk; [sequence, vocabulary] logits never exist.
    model.post_process = False
    return model.eval()


def _transformer_settings(
    shape: ModelShape, tensor_parallel: int, context_parallel: int
) -> dict[str, Any]:
    """Of the TransformerConfig, without the number of layers."""
    return dict(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        rotary_interleaved=shape.rotary_interleaved,
        tensor_model_parallel_size=tensor_parallel,
        context_parallel_size=context_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        window_size=None if shape.sliding_window is None else (shape.sliding_window - 1, 0),
        # All weights are loaded, so that none is drawn; and without the first of these two Megatron
        # allocates them on torch.cuda.current_device().
        use_cpu_initialization=True,
        perform_initialization=False,
        # Fused kernels need Apex or Transformer Engine; scoring is bound by matrix products anyway.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **(_expert_settings(shape) if shape.num_experts else {}),
    )


def _expert_settings(shape: ModelShape) -> dict[str, Any]:
    return dict(
        num_moe_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
        moe_router_topk=shape.moe_router_topk,
        moe_router_pre_softmax=not shape.moe_normalized_gates,
        moe_router_dtype=shape.moe_router_dtype,
        moe_router_load_balancing_type="none",  # a loss of training
        moe_grouped_gemm=False,  # needs CUDA
    )


def _check_architecture(shape: ModelShape) -> None:
    # The engine has interleaved pairs.
    for problem, lacking in unsupported(replace(shape, rotary_interleaved=False)):
        raise LongRopeError(f"this checkpoint has {problem}; the engine does not support {lacking}")
    if shape.num_experts and shape.hybrid_layer_pattern:
        raise LongRopeError(
            f"this checkpoint is a HybridModel with {shape.num_experts} experts; the engine runs "
            "mixtures of experts as GPTModel only"
        )
    if shape.hybrid_layer_pattern and shape.rotary_interleaved:
        raise LongRopeError(
            "this checkpoint is a HybridModel with --rotary-interleaved, which Megatron applies to "
            "angles in the order of two halves; the engine does not reproduce that"
        )


def _language_model(
    shape: ModelShape,
    settings: dict[str, Any],
    options: dict[str, Any],
    core_attention: type,
) -> nn.Module:
    """The one place that knows Megatron's model classes.

    GPTModel is deprecated since megatron-core 0.19. HybridModel runs what was trained with it, and
    also the checkpoints of GPTModel once that is gone: a transformer layer is then two layers.

    Args:
        settings (dict): Of the TransformerConfig, without the number of layers.
        options (dict): Arguments that all model classes take.
        core_attention (type): Class for the attention's innermost part.
    """
    if shape.hybrid_layer_pattern is None:
        try:
            from megatron.core.models.gpt import GPTModel
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        except ImportError:
            pass
        else:
            transformer = TransformerConfig(num_layers=shape.num_layers, **settings)
            spec = get_gpt_layer_local_spec(
                num_experts=shape.num_experts,
                moe_grouped_gemm=False,
                normalization="RMSNorm",
                qk_layernorm=shape.qk_layernorm,
            )
            spec.submodules.self_attention.submodules.core_attention = core_attention
            return GPTModel(transformer, spec, **options)
    if shape.num_experts:
        raise LongRopeError(
            "this megatron-core has no GPTModel, which the engine runs mixtures of experts with; "
            "install megatron-core 0.19"
        )
    from megatron_longrope.integration import hybrid_spec

    pattern = shape.hybrid_layer_pattern or "*-" * shape.num_layers
    hybrid_spec.check_layers(pattern)
    transformer = TransformerConfig(num_layers=len(pattern), **settings)
    spec = ModuleSpec(hybrid_spec.LocalHybridStack, params={"core_attention": core_attention})
    return hybrid_spec.HybridModel(transformer, spec, hybrid_layer_pattern=pattern, **options)


def set_attention_factor(model: nn.Module, factor: float) -> None:
    """Carry the attention factor: the softmax scale when whole heads rotate, else cos and sin.

    transformers multiplies cos and sin. In its parity mode so do we, which makes the logits of an
    fp32 model equal to the last bit; through the softmax scale they differ by fp32 rounding.

    Args:
        factor (float): Multiplier m of q and k; logits get m^2.
    """
    head_dim = model.config.kv_channels
    rotary = model.rotary_pos_emb
    by_softmax = rotary.rotary_dim == head_dim and not rotary.hf_parity
    for layer in model.decoder.layers:
        attention = layer.self_attention
        if not isinstance(attention, Attention):
            continue  # an MLP layer of HybridModel
        compat.set_cos_sin_factor(attention, 1.0 if by_softmax else factor)
        scale = softmax_scale(factor if by_softmax else 1.0, head_dim)
        attention.core_attention.softmax_scale = scale


def vocab_range(model: nn.Module, vocab_size: int) -> tuple[int, int]:
    """First token id of this tensor-parallel rank's output rows, and how many are real tokens."""
    rank, size = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    rows = model.vocab_size // size
    return rank * rows, max(0, min(rows, vocab_size - rank * rows))


def default_device() -> torch.device:
    """This process' GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
