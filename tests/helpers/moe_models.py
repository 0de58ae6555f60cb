"""Tiny random mixtures of experts of transformers, and the folders that it writes of them."""

import torch
import transformers

LAYERS, HIDDEN, FFN, EXPERT_FFN, EXPERTS, VOCAB, WINDOW = 3, 32, 48, 24, 5, 250, 64
GEOMETRY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {"head_dim": 16, "num_experts": EXPERTS, "moe_intermediate_size": EXPERT_FFN}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": WINDOW // 4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
# Name of a case -> class and settings; the gates add up to 1 in all but one of them.
MODELS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "mixtral_longrope": (
        "MixtralConfig",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "head_dim": 8,  # transformers 5.23 checks the factors against it alone
            "rope_parameters": LONGROPE,
            "router_aux_loss_coef": 0.0,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_QWEN, "num_experts_per_tok": 3, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe_other_gates": (
        "Qwen3MoeConfig",
        {**_QWEN, "num_experts_per_tok": 2, "norm_topk_prob": False},
    ),
    "qwen3_moe_one_expert": (
        "Qwen3MoeConfig",
        {**_QWEN, "num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
}


def save(name, directory, **changes):
    """Write a folder; no tensor in it equals another, or what it would be by default."""
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**{**GEOMETRY, **settings, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape) + ("norm" in key)
    model.save_pretrained(directory)
    return directory
