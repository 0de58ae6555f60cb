"""What a run has really built, after Megatron has built it."""

from __future__ import annotations

from typing import Any

from megatron_longrope.integration import agreement, chunked_loss, compat
from megatron_longrope.integration.attention_choice import OURS
from megatron_longrope.ranks import rank


def check_models(
    chunks: list, attention: str, *, has_factors: bool, loss_chunk: int | None = None
) -> None:
    """Compare a run's model chunks with what its flags announced.

    A model type or a layer spec may choose its modules by itself (VLMs copy the language model's
    config for their vision tower; the specs of heterogeneous layers and of ModelOpt name
    DotProductAttention). Without factors that is a line in the log, with factors the end of the
    run.

    Args:
        chunks (list): Megatron's model chunks, wrapped or not.
        attention (str): Of :class:`.wrappers.Run`.
        has_factors (bool): Whether the run has LongRoPE factors.
        loss_chunk (int, optional): Of :class:`.wrappers.Run`.

    Raises:
        SystemExit: The factors would not act, or on more than the language model; or a chunk of the
            last pipeline stage has kept Megatron's loss.
    """
    from megatron.core.utils import unwrap_model

    built: set[str] = set()
    errors: list[str] = []  # the other ranks' chunks may be without any
    for chunk in unwrap_model(chunks):
        # Megatron-FSDP wraps a model twice, of which unwrap_model takes off the outer one; in half
        # precision Float16Module is within.
        while type(chunk).__name__ == "MegatronFSDP":
            chunk = unwrap_model(chunk.module)
        if has_factors and (error := _rotary_error(chunk)):
            errors.append(error)
        is_last = getattr(chunk, "post_process", True)
        if loss_chunk is not None and is_last and not chunked_loss.is_deferred(chunk):
            errors.append(
                f"the model {type(chunk).__name__} has not taken {chunked_loss.FLAG}; the plugin "
                "supports GPTModel and HybridModel: remove the flag"
            )
        built |= _other_attention(chunk) if attention in OURS else set()
    sentence = (
        f"the model has {', '.join(sorted(built))} where {attention} attention was announced: its "
        "layer spec chooses core attention by itself"
    )
    if built and has_factors:
        errors.append(f"{sentence}; give --longrope-attention local, or another --spec")
    agreement.decide(errors[0] if errors else None)
    if built and rank() == 0:
        print(f"> longrope: {sentence}", flush=True)


def _rotary_error(chunk: Any) -> str | None:
    from megatron_longrope.rotary import LongRopeRotaryEmbedding

    rotary = getattr(chunk, "rotary_pos_emb", None)
    # isinstance: `fully_shard` (--use-torch-fsdp2) gives every module a subclass of another name.
    if isinstance(chunk, compat.language_models()) and isinstance(rotary, LongRopeRotaryEmbedding):
        return None
    found = "none" if rotary is None else type(rotary).__name__
    return (
        f"the model {type(chunk).__name__} did not take the LongRoPE rotary module (it has "
        f"{found}); the plugin supports GPTModel and HybridModel"
    )


def _other_attention(chunk: Any) -> set[str]:
    """Classes of core attention that are not the plugin's."""
    from megatron_longrope.attention import SdpaCoreAttention

    return {
        type(module).__name__
        for name, module in chunk.named_modules()
        if name.rpartition(".")[2] == "core_attention" and not isinstance(module, SdpaCoreAttention)
    }
