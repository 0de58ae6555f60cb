"""Write tiny mixtures of experts with megatron-core itself, and the logits its GPTModel computes.

Run as `python make_moe_checkpoint.py DIRECTORY TORCH_THREADS`, for the same reasons as
`make_megatron_checkpoint.py`, whose geometry it takes.
"""

import os
import sys
from pathlib import Path

import make_megatron_checkpoint as maker
import torch
import torch.distributed as dist

EXPERTS, EXPERT_FFN, TOPK = 4, 40, 2
# pre-softmax routing, norms on q and k, whether the layers are given one by one
VARIANTS = {"stacked": (False, False, False), "numbered": (True, True, True)}


def settings(pre_softmax, listed):
    return {
        "moe_ffn_hidden_size": EXPERT_FFN,
        "moe_router_topk": TOPK,
        "moe_router_pre_softmax": pre_softmax,
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": [1] * maker.LAYERS if listed else 1,
    }


def arguments(pre_softmax, qk_layernorm, listed):
    args = maker.arguments(groups=2, untied=True)
    for name in ("softmax_scale", "longrope_attention_factor", "longrope_config_value"):
        delattr(args, name)
    vars(args).update(settings(pre_softmax, listed), num_experts=EXPERTS, qk_layernorm=qk_layernorm)
    return args


def build(pre_softmax, qk_layernorm, listed):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=maker.LAYERS,
        num_moe_experts=EXPERTS,
        moe_token_dispatcher_type="allgather",
        qk_layernorm=qk_layernorm,
        **maker.transformer_settings(2),
        **settings(pre_softmax, listed),
    )
    spec = get_gpt_layer_local_spec(
        num_experts=EXPERTS,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        qk_layernorm=qk_layernorm,
    )
    return GPTModel(
        config,
        spec,
        vocab_size=maker.PADDED,
        max_sequence_length=maker.ORIGINAL,
        position_embedding_type="rope",
        rotary_base=int(maker.BASE),
        share_embeddings_and_output_weights=False,
    ).eval()


def main(directory):
    from megatron_longrope.conversion.verify import random_tokens

    maker.start(directory)
    for name, variant in VARIANTS.items():
        torch.manual_seed(1)
        model = maker.with_random_norms(build(*variant))
        maker.save(model, arguments(*variant), directory / name)
        tokens = random_tokens(maker.VOCAB, maker.SHORT_TOKENS, 0)
        torch.save(maker.logits(model, tokens), directory / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(int(sys.argv[2]))
    main(Path(sys.argv[1]))
