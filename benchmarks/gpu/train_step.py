"""Training steps of a 1B-class model at 32k to 256k tokens on one GPU, the plugin against stock.

bf16 weights and gradients, fused AdamW, full activation recompute, the package's loss in chunks of
the sequence (no [sequence, vocabulary] logits). Both arms run SdpaCoreAttention or
FlashCoreAttention on the same shapes and take turns, step by step; only the rotary module and the
softmax scale differ. An arm's peak leaves out what the other one holds. Model FLOPs leave
recomputation out. `ratio` of a length is the plugin's seconds over stock's.

    python benchmarks/gpu/train_step.py [--quick] [--attention sdpa|flash] [--lengths 32k,64k,...]

256k takes minutes: `--lengths 256k --steps 1 --warm-up 0`. `--quick` runs a toy model, on the CPU
if need be: it checks the script, not the claim.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import device as gpu
import measure
import torch

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.flops import forward_flops
from megatron_longrope.lengths import parse_lengths
from megatron_longrope.methods import yarn_factors
from megatron_longrope.plan import Model
from megatron_longrope.training_loss import chunked_linear_cross_entropy

_LOSS_CHUNK = 4096


@dataclass(frozen=True)
class Shape(Model):
    """A Llama-type model, with the base and the window of its RoPE."""

    base: float = 500000.0
    window: int = 8192


FULL = Shape(16, 2048, 8192, 32, 8, 32000, 64)
TOY = Shape(2, 64, 128, 4, 2, 512, 16, base=10000.0, window=128)


def longrope(shape: Shape, length: int) -> LongRopeConfig:
    """YaRN's factors for the length: any non-trivial set costs the same."""
    factors = yarn_factors(shape.head_dim, length / shape.window, shape.base, shape.window)
    sets = (
        FactorSet(shape.window, (1.0,) * (shape.head_dim // 2)),
        FactorSet(length, tuple(factors)),
    )
    return LongRopeConfig(shape.base, shape.head_dim, shape.window, sets)


def build(shape: Shape, length: int, attention: str, *, plugin: bool, device: torch.device):
    """A GPTModel that returns hidden states, as Megatron builds it with or without the plugin."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_longrope.integration import hooks, wrappers
    from megatron_longrope.integration.settings import LongRopeSettings
    from megatron_longrope.selection import FactorSelection

    hooks.apply()
    scale, settings = None, None
    if plugin:
        selection = FactorSelection(longrope(shape, length), "auto", length)
        factor = selection.attention_factor(length)
        settings = LongRopeSettings(selection, "softmax", factor)
        scale = factor**2 / math.sqrt(shape.head_dim)
    wrappers.activate(wrappers.Run(settings, attention))
    torch.manual_seed(0)
    config = gpu.transformer_config(
        shape,
        device,
        softmax_scale=scale,
        bf16=device.type == "cuda",
        params_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
        rotary_base=int(shape.base),
        share_embeddings_and_output_weights=False,
    )
    model.post_process = False
    return model.to(device).train()


def training_step(model, optimizer, tokens: torch.Tensor):
    """One optimizer step on `[1, s + 1]` tokens; returns the loss as a number."""
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
    hidden = model(tokens[:, :-1], positions, None)  # [s, 1, h]
    loss = chunked_linear_cross_entropy(
        hidden, model.output_layer.weight, tokens[:, 1:].t(), chunk_tokens=_LOSS_CHUNK
    ).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


class Arm:
    """A model and its optimizer.

    Args:
        shape (Shape): Of the model.
        length (int): Tokens of a sequence.
        attention (str): `sdpa` or `flash`.
        plugin (bool): Whether LongRoPE is in.
        device (torch.device): Where.
    """

    def __init__(
        self, shape: Shape, length: int, attention: str, plugin: bool, device: torch.device
    ) -> None:
        self.model = build(shape, length, attention, plugin=plugin, device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.device = device
        self.losses: list[float] = []
        self.peaks: list[int] = []

    def own_bytes(self) -> int:
        """Parameters and the optimizer's state, which lie there between steps."""
        state = [x for item in self.optimizer.state.values() for x in item.values()]
        tensors = [*self.model.parameters(), *(x for x in state if torch.is_tensor(x))]
        return sum(x.numel() * x.element_size() for x in tensors)

    def step(self, tokens: torch.Tensor) -> None:
        """One step, whose peak leaves out what lay there before and is not ours."""
        others = max(0, gpu.allocated(self.device) - self.own_bytes())  # 0 on a CPU
        gpu.reset_peak(self.device)
        self.losses.append(training_step(self.model, self.optimizer, tokens))
        gpu.synchronize(self.device)
        self.peaks.append(gpu.peak(self.device) - others)


def measure_length(
    shape: Shape, length: int, attention: str, steps: int, warm_up: int, device: torch.device
) -> dict[str, dict]:
    """Seconds of a step and peak memory of both arms, which take turns."""
    arms = {
        name: Arm(shape, length, attention, plugin, device)
        for name, plugin in (("stock", False), ("longrope", True))
    }
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape.vocab_size, (1, length + 1), generator=generator).to(device)
    samples = measure.sample_interleaved(
        {name: lambda arm=arm: arm.step(tokens) for name, arm in arms.items()},
        steps,
        warmup=warm_up,
    )
    found = {}
    for name, arm in arms.items():
        seconds = statistics.median(samples[name])
        found[name] = {
            "seconds": seconds,
            "tokens_per_second": length / seconds,
            # Backward is twice forward.
            "model_tflops": 3 * sum(forward_flops(shape, length)) / seconds / 1e12,
            "peak_gib": max(arm.peaks) / 2**30,
            "first_loss": arm.losses[0],
            "last_loss": arm.losses[-1],
        }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = gpu.options(__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=("sdpa", "flash"), default="sdpa")
    parser.add_argument("--lengths", default=None, help="default 32k,64k,128k")
    parser.add_argument("--steps", type=int, default=2, help="that count, of each arm")
    parser.add_argument("--warm-up", type=int, default=1, help="that do not")
    options = parser.parse_args()
    shape = TOY if options.quick else FULL
    lengths = parse_lengths(options.lengths or ("256,512" if options.quick else "32k,64k,128k"))
    if min(lengths) <= shape.window:
        parser.error(f"--lengths {options.lengths}: each must be above the window, {shape.window}")
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    device = gpu.start(options.quick)
    fits = False
    for length in lengths:
        label = {"part": "train_step", "attention": options.attention, "tokens": length}
        try:
            arms = measure_length(
                shape, length, options.attention, options.steps, options.warm_up, device
            )
        except torch.OutOfMemoryError:
            gpu.record(options.output, **label, skipped="out of memory")
            break
        fits = True
        ratio = arms["longrope"]["seconds"] / arms["stock"]["seconds"]
        gpu.record(options.output, **label, ratio=ratio, **arms)
    if not fits:
        raise SystemExit("no length fitted into memory; give shorter --lengths")
    gpu.record(options.output, part="train_step", environment=gpu.environment(device))


if __name__ == "__main__":
    try:
        main()
    except LongRopeError as error:
        raise SystemExit(f"train_step: error: {error}") from None
