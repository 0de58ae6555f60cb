"""Tiny random Hugging Face models of every family."""

from dataclasses import replace

import torch
import transformers
from safetensors.torch import load_file

from megatron_longrope.config import FactorSet, identity_config

WINDOW = 64
GEOMETRY = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 8}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}


def make_hf_folder(path, family, dtype=torch.float32, **changes):
    """Write a model with random weights, none of which is a default; gives its config."""
    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**GEOMETRY, **own, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape) + ("norm" in key)
    model.to(dtype).save_pretrained(path)
    return config


def tensors(folder):
    """What all safetensors files of a folder hold."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found
    return found


def factors(stored, rotary_dim, attention):
    """Factors of the window and of twice that, over the stored ones or plain RoPE."""
    base = stored or identity_config(10000.0, rotary_dim, WINDOW)
    sets = (
        FactorSet(length, tuple(1.0 + slope * index for index in range(rotary_dim // 2)))
        for length, slope in ((WINDOW, 0.1), (2 * WINDOW, 0.5))
    )
    return replace(base, factor_sets=tuple(sets), attention_factor=attention)
