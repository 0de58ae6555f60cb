"""The README.md of an exported folder: what it is, where the factors come from, what to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.rope_export import ExportedRope, is_bare_base
from megatron_longrope.conversion.start_tokens import DroppedStartTokens
from megatron_longrope.lengths import format_length

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
    *,
    name: str,
    hf_config: dict[str, Any],
    longrope_config: LongRopeConfig | None,
    rope: ExportedRope | None,
    short_length: int | None,
    target_length: int | None,
    iteration: int,
    version: str,
    has_tokenizer: bool,
    dropped_window: int | None = None,
    dropped: Sequence[DroppedStartTokens] = (),
) -> str:
    """Markdown with the YAML front matter of a Hugging Face model card.

    Args:
        hf_config (dict): Content of config.json.
        rope (ExportedRope, optional): Its rotary keys, with factors.
        short_length (int, optional): Window whose set is short_factor.
        target_length (int, optional): Window whose set is long_factor.
        dropped_window (int, optional): Sliding window, in tokens, that the source model had.
        dropped (Sequence[DroppedStartTokens]): Sets that lost their start tokens.
    """
    has_factors = longrope_config is not None and not is_bare_base(longrope_config)
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
        f"Megatron checkpoint by megatron_longrope {version}.",
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
    lines += _about_factors(longrope_config, rope, short_length, target_length)
    if dropped:
        lines += ["", "The search kept the first positions as they were; this folder cannot:", ""]
        lines += [f"- {item.describe()}" for item in dropped]
    limits = _LIMITS.format(original=longrope_config.original_max_position_embeddings)
    return "\n".join([*lines, "", limits, *(f"Note: {remark}.\n" for remark in rope.remarks)])


def _about_factors(
    config: LongRopeConfig, rope: ExportedRope, short_length: int | None, target_length: int | None
) -> list[str]:
    """Return the section that says which set is used for what, in lines."""
    original = config.original_max_position_embeddings
    lines = [
        "## LongRoPE factors",
        "",
        f"Original window {original} tokens, rotary base {config.rotary_base:g}, "
        f"attention factor {rope.attention_factor:.6g}. "
        "`longrope.json` holds the full configuration.",
        "",
        "| used as | factor set | first factor | last factor | provenance |",
        "|---|---|---|---|---|",
    ]
    wanted = (
        (f"short_factor (up to {original})", short_length or original),
        ("long_factor (beyond)", target_length or config.max_length),
    )
    for role, length in wanted:
        item = config.factor_set_for(length)
        first, last = item.rescale_factors[0], item.rescale_factors[-1]
        lines.append(
            f"| {role} | up to {format_length(item.max_length)} | {first:.4g} | {last:.4g} | "
            f"{_origin(item.origin)} |"
        )
    return lines


def _origin(origin: Mapping[str, Any]) -> str:
    """Where factors come from, in a table cell; `longrope.json` has all of it."""
    plain = {key: value for key, value in origin.items() if isinstance(value, str | int | float)}
    plain.pop("checkpoint", None)  # a path of the machine that searched
    cells = (
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in sorted(plain.items())
    )
    return ", ".join(cells).replace("|", "\\|") or "not stated"
