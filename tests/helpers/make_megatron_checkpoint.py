"""Write tiny checkpoints with megatron-core itself, and the logits its GPTModel computes.

Run as `python make_megatron_checkpoint.py DIRECTORY TORCH_THREADS`; a process of its own because it
initializes process groups and answers the places where megatron-core asks for CUDA.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

LAYERS, HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, PADDED = 3, 64, 96, 4, 16, 250, 256
ORIGINAL, TARGET, BASE = 64, 256, 50000.0
SHORT_TOKENS, LONG_TOKENS = 48, 160
VARIANTS = {"untied_gqa": (2, True), "tied_mha": (4, False)}


def longrope_config():
    from megatron_longrope.config import FactorSet, LongRopeConfig

    return LongRopeConfig(
        rotary_base=BASE,
        rotary_dim=HEAD_DIM,
        original_max_position_embeddings=ORIGINAL,
        factor_sets=(
            FactorSet(ORIGINAL, (1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5), origin={"by": "test"}),
            FactorSet(TARGET, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), origin={"by": "test"}),
        ),
        attention_factor=1.15,
    )


def arguments(groups, untied):
    return argparse.Namespace(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        group_query_attention=groups != HEADS,
        num_query_groups=groups,
        kv_channels=HEAD_DIM,
        vocab_size=VOCAB,
        padded_vocab_size=PADDED,
        layernorm_epsilon=1e-5,
        rotary_base=BASE,
        untie_embeddings_and_output_weights=untied,
        swiglu=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        position_embedding_type="rope",
        max_position_embeddings=ORIGINAL,
        seq_length=ORIGINAL,
        params_dtype=torch.float32,
        # What a training run with these factors stores: the attention factor's carrier.
        softmax_scale=longrope_config().attention_factor ** 2 / HEAD_DIM**0.5,
        longrope_attention_factor=longrope_config().attention_factor,
        longrope_config_value=longrope_config().to_dict(),
    )


def build(groups, untied):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=LAYERS, **transformer_settings(groups))
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=TARGET,
        position_embedding_type="rope",
        rotary_base=int(BASE),
        share_embeddings_and_output_weights=not untied,
    ).eval()


def transformer_settings(groups):
    """Of a TransformerConfig for the CPU, all but its layers; the makers share it."""
    return dict(
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=HEAD_DIM,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Wide enough for attention to matter; at 0.15 fp32 rounding alone is 1.5e-5 on the logits.
        init_method_std=0.1,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


class Rotary(torch.nn.Module):
    """Megatron's rotary interface over transformers' fp32 angles."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def get_rotary_seq_len(self, inference_context, transformer, hidden, config, packed=None):
        return hidden.shape[0]

    def forward(self, length, *args, **kwargs):
        from fp32_angles import angles_fp32

        item = self.config.factor_set_for(length)
        factors = torch.tensor(item.rescale_factors)
        angles = angles_fp32(torch.arange(length), BASE, HEAD_DIM, factors)
        return torch.cat((angles, angles), dim=-1)[:, None, None]


def logits(model, tokens, config=None):
    """[b, s] -> [b, s, PADDED]; the attention factor enters the softmax scale, squared."""
    length = tokens.shape[1]
    factor = 1.0
    if config is not None:
        model.rotary_pos_emb = Rotary(config)
        factor = config.attention_factor_for(length)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.softmax_scale = factor**2 / HEAD_DIM**0.5
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(length)[None], mask)


def answer_for_cuda():
    """The places where a forward pass and a save ask for CUDA."""
    from megatron.core import tensor_parallel
    from megatron.core.utils import GlobalMemoryBuffer

    from megatron_longrope.integration import cpu_host

    cpu_host.start_results_server()  # a spawned one would import Megatron again

    class Tracker:
        def fork(self, name=None):
            return contextlib.nullcontext()

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    tensor_parallel.get_cuda_rng_tracker = Tracker
    GlobalMemoryBuffer.get_tensor = lambda self, shape, dtype, name, *rest: torch.empty(
        shape, dtype=dtype
    )


def start(directory):
    """Make this process a whole job of Megatron's."""
    from megatron.core import parallel_state

    store = dist.FileStore(str(directory / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    answer_for_cuda()


def with_random_norms(model):
    """The model, whose norms have weights of their own: as built they are all ones."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model, args, folder):
    """Write the checkpoint of iteration 3."""
    from megatron.core import dist_checkpointing

    (folder / "iter_0000003").mkdir(parents=True)
    state = {**model.sharded_state_dict(), "args": args, "iteration": 3}
    dist_checkpointing.save(state, str(folder / "iter_0000003"))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


def main(directory):
    from megatron_longrope.checkpoint import MegatronCheckpoint, load_into
    from megatron_longrope.conversion.verify import random_tokens

    start(directory)
    for name, (groups, untied) in VARIANTS.items():
        torch.manual_seed(1)
        model = with_random_norms(build(groups, untied))
        save(model, arguments(groups, untied), directory / name)
        config = longrope_config()
        short, long = (random_tokens(VOCAB, n, 0) for n in (SHORT_TOKENS, LONG_TOKENS))
        result = {
            "plain": logits(model, short),
            "short": logits(model, short, config),
            "long": logits(model, long, config),
        }
        loaded = build(groups, untied)
        load_into(loaded, MegatronCheckpoint.open(directory / name))
        result["loaded"] = logits(loaded, long, config)
        torch.save(result, directory / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(int(sys.argv[2]))
    main(Path(sys.argv[1]))
