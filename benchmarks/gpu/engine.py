"""Forward passes of the engine on one GPU: a search's candidate, and a passkey trial at 1M tokens.

`evaluation`: a 1B-class model (random weights) scores a candidate at 64k and 256k tokens: seconds,
model TFLOP/s, peak, and the share of the time that is not the model's forward pass. `passkey`: a
small model (random weights, so that only cost is measured) answers the five last of 1M tokens.

    python benchmarks/gpu/engine.py evaluation|passkey [--quick] [--attention auto] [--output FILE]
"""

from __future__ import annotations

import statistics

import device as gpu
import measure
import torch

from megatron_longrope.checkpoint.hf.families import shape_from_hf_config
from megatron_longrope.checkpoint.model_args import ModelShape
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.engine.kernels import ATTENTIONS
from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops
from megatron_longrope.methods import yarn_factors

_BASE, _WINDOW, _ANSWER = 500000.0, 8192, 5
_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SIZES = {
    "evaluation": (16, 2048, 8192, 32, 8, 64, 32000),
    "passkey": (8, 1024, 2816, 8, 2, 128, 32000),
    "toy": (2, 64, 128, 4, 2, 16, 512),
}


def factors(shape: ModelShape, length: int, scale: float) -> LongRopeConfig:
    """A candidate for `length`: YaRN's factors for `scale`."""
    window = shape.max_position_embeddings
    chosen = tuple(yarn_factors(shape.head_dim, scale, _BASE, window))
    return LongRopeConfig(_BASE, shape.head_dim, window, (FactorSet(length, chosen),))


def make_engine(kind: str, length: int, attention: str, device: torch.device):
    """An engine with random weights, as it would come out of a checkpoint."""
    from megatron_longrope.engine import Engine
    from megatron_longrope.engine.kernels import core_attention
    from megatron_longrope.engine.model import build_model

    window = min(_WINDOW, length // 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = shape_from_hf_config(
        {
            "model_type": "llama",
            **dict(zip(_KEYS, _SIZES[kind], strict=True)),
            "rms_norm_eps": 1e-5,
            "rope_theta": _BASE,
            "max_position_embeddings": window,
            "dtype": str(dtype).removeprefix("torch."),
        }
    )
    kernel = core_attention(attention, device, dtype)
    config = factors(shape, length, 2.0)
    model = build_model(shape, config, core_attention=kernel, device=device, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    model.rotary_pos_emb.table_device = device
    return Engine(model, shape), kernel.__name__


def evaluation(kind: str, length: int, attention: str, device: torch.device) -> dict:
    """A candidate's score against the model's forward pass alone, taking turns."""
    engine, kernel = make_engine(kind, length, attention, device)
    tokens = torch.randint(0, engine.shape.vocab_size, (1, length))
    configs = [factors(engine.shape, length, scale) for scale in (1.5, 2.0)]

    def candidate() -> None:
        configs.reverse()
        engine.set_config(configs[0])  # a rotary table of its own, as every candidate has
        engine.nll(tokens)

    @torch.no_grad()
    def forward() -> None:
        engine._hidden(tokens)
        gpu.synchronize(device)

    weights = gpu.allocated(device)
    gpu.reset_peak(device)
    samples = measure.sample_interleaved({"candidate": candidate, "forward": forward}, 1)
    seconds, alone = (statistics.median(samples[name]) for name in ("candidate", "forward"))
    return {
        "attention": kernel,
        "seconds": seconds,
        "model_tflops": sum(forward_flops(engine.shape, length)) / seconds / 1e12,
        "share_beside_the_forward": 1 - alone / seconds,
        "weights_gib": weights / 2**30,
        "peak_gib": gpu.peak(device) / 2**30,
    }


def passkey(kind: str, length: int, attention: str, device: torch.device) -> dict:
    """One teacher-forced trial, after one that warms up at a sixteenth of the length."""
    engine, kernel = make_engine(kind, length, attention, device)
    tokens = torch.randint(0, engine.shape.vocab_size, (1, length))
    engine.answer(tokens[:, : length // 16], _ANSWER)
    gpu.reset_peak(device)
    seconds = measure.sample_interleaved(
        {"trial": lambda: engine.answer(tokens, _ANSWER)}, 1, warmup=0
    )["trial"][0]
    return {
        "attention": kernel,
        "seconds": seconds,
        "model_tflops": sum(forward_flops(engine.shape, length)) / seconds / 1e12,
        "peak_gib": gpu.peak(device) / 2**30,
    }


def main() -> None:
    """Run one of the parts."""
    parser = gpu.options(__doc__.splitlines()[0])
    parser.add_argument("what", choices=("evaluation", "passkey"))
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    options = parser.parse_args()
    device = gpu.start(options.quick)
    lengths = {"evaluation": (65536, 262144), "passkey": (2**20,)}[options.what]
    kind = options.what
    if options.quick:
        kind, lengths = "toy", tuple(length // 512 for length in lengths)
    function = {"evaluation": evaluation, "passkey": passkey}[options.what]
    fits = False
    for length in lengths:
        try:
            found = function(kind, length, options.attention, device)
            fits = True
        except torch.OutOfMemoryError:
            found = {"skipped": "out of memory"}
        gpu.record(options.output, part=options.what, tokens=length, **found)
    if not fits:
        raise SystemExit("no length fitted into memory")
    gpu.record(options.output, part=options.what, environment=gpu.environment(device))


if __name__ == "__main__":
    try:
        main()
    except LongRopeError as error:  # such as flash-attn that is not here
        raise SystemExit(f"engine: error: {error}") from None
