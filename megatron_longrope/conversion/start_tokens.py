"""Exporting factors that were searched with start tokens, which transformers cannot express."""

from __future__ import annotations

from dataclasses import replace

from megatron_longrope.config import LongRopeConfig


def drop_start_tokens(
    config: LongRopeConfig, short_length: int | None = None, target_length: int | None = None
) -> tuple[LongRopeConfig, tuple[str, ...]]:
    """The configuration with no start tokens in the sets that are exported.

    Args:
        config (LongRopeConfig): As it was searched.
        short_length (int, optional): As given to the conversion.
        target_length (int, optional): As given to the conversion.

    Returns:
        tuple: The configuration, in which the origin of such a set says how many it had, and a
            sentence about each.
    """
    wanted = {
        "short": config.factor_set_for(short_length or config.original_max_position_embeddings),
        "long": config.factor_set_for(target_length or config.max_length),
    }
    dropped: dict[int, str] = {}
    for window, item in wanted.items():
        if item.effective_start_tokens:
            sentence = (
                f"{window}_factor (set up to {item.max_length} tokens): {item.num_start_tokens} "
                "start tokens dropped"
            )
            dropped.setdefault(item.max_length, sentence)
    sets = tuple(
        replace(
            item,
            num_start_tokens=0,
            origin={**item.origin, "dropped_start_tokens": item.num_start_tokens},
        )
        if item.max_length in dropped
        else item
        for item in config.factor_sets
    )
    return replace(config, factor_sets=sets), tuple(dropped.values())
