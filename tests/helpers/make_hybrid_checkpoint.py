"""Write tiny HybridModel checkpoints with megatron-core itself, and the logits it computes.

Run as `python make_hybrid_checkpoint.py DIRECTORY GPT_CHECKPOINT TORCH_THREADS`; a process of its
own for the same reasons as make_megatron_checkpoint.py, whose geometry it shares.
"""

import os
import sys
from pathlib import Path

import make_megatron_checkpoint as maker
import torch
import torch.distributed as dist

# Name -> pattern, query groups, untied. `same` gets the weights of the GPT checkpoint.
VARIANTS = {"same": ("*-" * maker.LAYERS, 2, True), "other": ("-**--*", 4, False)}


def build(pattern, groups, untied, **settings):
    """HybridModel of the plugin's spec with megatron-core's own core attention."""
    from megatron.core.transformer import TransformerConfig

    from megatron_longrope.integration.hybrid_spec import HybridModel, hybrid_stack_spec

    defaults = {"num_layers": len(pattern), **maker.transformer_settings(groups)}
    return HybridModel(
        TransformerConfig(**{**defaults, **settings}),
        hybrid_stack_spec,
        vocab_size=maker.PADDED,
        max_sequence_length=maker.TARGET,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        rotary_base=int(maker.BASE),
        share_embeddings_and_output_weights=not untied,
    ).eval()


def logits(model, tokens, config):
    """[b, s] -> [b, s, PADDED], as make_megatron_checkpoint.logits for GPTModel."""
    length = tokens.shape[1]
    model.rotary_pos_emb = maker.Rotary(config)
    for module in model.decoder.modules():
        if hasattr(module, "softmax_scale") and hasattr(module, "scale_mask_softmax"):
            module.softmax_scale = config.attention_factor_for(length) ** 2 / maker.HEAD_DIM**0.5
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(length)[None], mask)


def main(directory, gpt_checkpoint):
    from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
    from megatron_longrope.conversion.verify import random_tokens

    maker.start(directory)
    for name, (pattern, groups, untied) in VARIANTS.items():
        torch.manual_seed(2)
        model = build(pattern, groups, untied)
        if name == "same":
            load_into(model, MegatronCheckpoint.open(gpt_checkpoint))
        args = maker.arguments(groups, untied)
        args.num_layers = len(pattern)
        # Where pipeline stages begin is not where layers end.
        args.hybrid_layer_pattern = f"{pattern[:3]}|{pattern[3:]}"
        maker.save(model, args, directory / name)
        tokens = random_tokens(maker.VOCAB, maker.LONG_TOKENS, 0)
        result = {"long": logits(model, tokens, maker.longrope_config())}
        torch.save(result, directory / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(int(sys.argv[3]))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
