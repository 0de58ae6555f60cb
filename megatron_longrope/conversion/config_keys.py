"""Which keys of a config.json conversion reads: where to look when two models differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_longrope.checkpoint.hf.families import FAMILIES
from megatron_longrope.checkpoint.hf.limits import checked_keys
from megatron_longrope.hf_rope import read_hf_rope

# Keys that change no logit of ours or of transformers, or that other functions read.
_KNOWN_KEYS = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "embd_pdrop",
    "eos_token_id", "id2label", "initializer_range", "label2id", "layer_types", "max_window_layers",
    "model_type", "original_max_position_embeddings", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "partial_rotary_factor", "pretraining_tp",
    "resid_pdrop", "return_dict", "rope_parameters", "rope_scaling", "router_jitter_noise",
    "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that conversion does not read, sorted.

    Raises:
        LongRopeError: As :func:`.read_hf_rope`.
    """
    family = FAMILIES[config["model_type"]]
    read = {*_KNOWN_KEYS, *family.config_keys(), *family.absent, *family.config, *checked_keys()}
    rope = read_hf_rope(config)
    inside = [f"{rope.holder}.{key}" for key in rope.ignored]
    top = [key for key in config if key not in read and not key.startswith("_")]
    return sorted([*top, *inside])
