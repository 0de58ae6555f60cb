"""The README.md of an exported folder: what it is, which factors it uses, what to expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_longrope import __version__
from megatron_longrope.conversion.rope_export import is_bare_base
from megatron_longrope.lengths import format_length

if TYPE_CHECKING:
    from megatron_longrope.conversion.to_hf import Factors

_LIMITS = """\
## Known limits of the context switch in transformers

- transformers chooses short or long factors once per forward pass, from the longest position in
  the batch: one long sequence switches every sequence of its batch to the long factors.
- When generation crosses {original} tokens the factors change but the key/value cache keeps keys
  rotated with the short ones (transformers recomputes the cache for Phi-3 only). If prompt plus
  answer may exceed {original} tokens, either generate with `use_cache=False`, or set `short_factor`
  equal to `long_factor` in config.json so that nothing switches.
- transformers multiplies position and frequency in fp32. Training used fp64 angles, unless it ran
  with `--longrope-hf-parity`; near 100k tokens the two differ by up to 0.006 rad.

vLLM 0.32 (measured) decides once, when it starts: with a `max_model_len` above {original} every
position of every sequence uses the long factors, and without one it stops at {original} tokens.
vLLM 0.7 to 0.11 chooses by batch and keeps keys of the short factors, and llama.cpp converts
longrope factors of `Phi3ForCausalLM` only (both by their sources).
"""


def model_card(
    name: str,
    hf_config: dict[str, Any],
    factors: Factors,
    *,
    iteration: int,
    has_tokenizer: bool,
    dropped_window: int | None,
) -> str:
    """Markdown with the YAML front matter of a Hugging Face model card.

    Args:
        hf_config (dict): Content of config.json.
        dropped_window (int, optional): Sliding window, in tokens, that the source model had.
    """
    config, rope = factors.config, factors.rope
    has_factors = config is not None and not is_bare_base(config)
    tags = ["megatron", *(["longrope", "long-context"] if has_factors else [])]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {name}",
        "",
        f"`{hf_config['architectures'][0]}`, {hf_config['num_hidden_layers']} layers, hidden size "
        f"{hf_config['hidden_size']}, {hf_config['dtype']}, window "
        f"{hf_config['max_position_embeddings']} tokens; converted from iteration {iteration} of a "
        f"Megatron checkpoint by megatron_longrope {__version__}.",
        "",
        "Loads with `AutoModelForCausalLM.from_pretrained(folder)` of transformers, 4.57 or newer "
        "unless a note below says otherwise.",
        "",
    ]
    if not has_tokenizer:
        lines += ["No tokenizer is included; add the files of the one used in training.", ""]
    if dropped_window is not None:
        lines += [
            f"The model that this one was made from attended within a sliding window of "
            f"{dropped_window} tokens; the window was dropped (`--sliding-window drop`), so that "
            "every token attends to all before it.",
            "",
        ]
    if not has_factors or rope is None:
        return "\n".join(lines)
    original = config.original_max_position_embeddings
    wanted = factors.lengths[0] or original, factors.lengths[1] or config.max_length
    short, long = (format_length(config.factor_set_for(length).max_length) for length in wanted)
    lines += [
        "## LongRoPE factors",
        "",
        f"Original window {original} tokens, rotary base {config.rotary_base:g}, attention factor "
        f"{rope.attention_factor:.6g}. Up to {original} tokens: short_factor, the set up "
        f"to {short} tokens; beyond: long_factor, the set up to {long} tokens. "
        "`longrope.json` holds every set with its origin.",
    ]
    if factors.dropped:
        lines += ["", "The search kept the first positions as they were; this folder cannot:", ""]
        lines += [f"- {sentence}" for sentence in factors.dropped]
    limits = _LIMITS.format(original=original)
    return "\n".join([*lines, "", limits, *(f"Note: {remark}.\n" for remark in rope.remarks)])
