"""A local layer spec for `HybridModel`, Megatron's successor of GPTModel: it also trains on a CPU.

    longrope pretrain pretrain_hybrid.py --hybrid-layer-pattern '*-*-' \
        --spec megatron_longrope.integration.hybrid_spec hybrid_stack_spec ...

megatron-core's own stack spec needs Transformer Engine. This one takes attention (`*`) and dense
MLP (`-`) layers from megatron-core's local modules; `*-` is a transformer layer of GPTModel. In
megatron-core 0.17 the model is called MambaModel and the script pretrain_mamba.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import compat

HybridModel, HybridStack, HybridStackSubmodules = compat.hybrid_classes()

__all__ = ["HybridModel", "LocalHybridStack", "check_layers", "hybrid_stack_spec"]


class LocalHybridStack(HybridStack):
    """Megatron's stack of hybrid layers, built from modules that need no Transformer Engine.

    Its layers are chosen when the model is built, not when this file is imported: the plugin
    replaces the core attention in between.

    Args:
        config (TransformerConfig): megatron-core configuration.
        core_attention (type, optional): Class for the attention's innermost part. Defaults to that
            of megatron-core's local layers, which `--longrope-attention` may have replaced.
        submodules (object, optional): Accepted for interface compatibility.
        post_layer_norm (bool): End with a norm. Defaults to True.
        **options (object): Further arguments of megatron-core's HybridStack.

    Raises:
        LongRopeError: The pattern has another kind of layer; see :func:`check_layers`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        core_attention: type | None = None,
        submodules: object = None,
        post_layer_norm: bool = True,
        **options: object,
    ) -> None:
        check_layers(options.get("layer_type_list") or ())
        if getattr(config, "mtp_num_layers", None):
            check_layers("/")
        super().__init__(
            config,
            submodules=local_submodules(config, core_attention),
            post_layer_norm=False,  # the final norm of the base class is Transformer Engine's
            **options,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = WrappedTorchNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def local_submodules(
    config: TransformerConfig, core_attention: type | None = None
) -> HybridStackSubmodules:
    """The two kinds of layers; together they are megatron-core's local GPT layer.

    Args:
        config (TransformerConfig): Says which norms queries and keys get.
        core_attention (type, optional): See :class:`LocalHybridStack`.
    """
    qk_norm: type = IdentityOp
    if getattr(config, "qk_l2_norm", False):
        qk_norm = L2Norm
    elif config.qk_layernorm:
        qk_norm = WrappedTorchNorm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention or LocalSpecProvider().core_attention(),
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    # On disk a norm belongs to the linear layer after it, as in all checkpoints of Megatron.
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=compat.dense_mlp(
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention_layer),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp_layer),
    )


def check_layers(pattern: Iterable[str]) -> None:
    """Refuse layers of other kinds than attention (`*`) and dense MLP (`-`).

    Args:
        pattern (Iterable[str]): Letters of `--hybrid-layer-pattern`.

    Raises:
        LongRopeError: A letter stands for another kind.
    """
    for letter in pattern:
        if letter not in "*-":
            raise LongRopeError(
                f"the hybrid layer pattern has {letter!r}; without Transformer Engine only '*' "
                "(attention) and '-' (dense MLP) layers run, and no multi-token prediction ('/')"
            )


# What `--spec megatron_longrope.integration.hybrid_spec hybrid_stack_spec` names.
hybrid_stack_spec = ModuleSpec(module=LocalHybridStack)
