"""Join the factor sets of several files, as the second searches of one model leave them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.errors import LongRopeError

_SAME = ("rotary_base", "rotary_dim", "original_max_position_embeddings", "base_frequencies")


def merge_configs(configs: Mapping[str, LongRopeConfig]) -> LongRopeConfig:
    """One configuration with every factor set of several.

    Each second search extends the same fine-tuned factors to one window (LongRoPE, section 3.3), so
    several of them give several files; a sequence then takes the smallest set that covers it.

    Args:
        configs (Mapping[str, LongRopeConfig]): By the name that an error shall call them.

    Returns:
        LongRopeConfig: The sets of all, sorted by window.

    Raises:
        LongRopeError: There is none, they describe different models or attention factors, or two
            have different factors for the same window.
    """
    if not configs:
        raise LongRopeError("there is no configuration to merge; name at least one")
    (first_name, first), *others = configs.items()
    merged, owners = first, {item.max_length: first_name for item in first.factor_sets}
    for name, config in others:
        check_same_model(name, config, first_name, first, "only factors of one model can be merged")
        if _attention(config) != _attention(first):
            raise LongRopeError(
                f"{name} has {_attention(config)} and {first_name} has {_attention(first)}; "
                "search all windows with the same --attention-factor"
            )
        for item in config.factor_sets:
            owner = owners.setdefault(item.max_length, name)
            if owner == name:
                merged = merged.with_factor_set(item)
            elif _values(item) != _values(merged.factor_set_for(item.max_length)):
                raise LongRopeError(
                    f"{name} and {owner} have different factors for {item.max_length} tokens; "
                    "keep one of the files"
                )
    return merged


def check_same_model(
    name: str, config: LongRopeConfig, other_name: str, other: LongRopeConfig, rule: str
) -> None:
    """Refuse two configurations whose factors multiply different frequencies.

    Args:
        name (str): What an error calls the first; `other_name` is the second.
        rule (str): How the error ends.

    Raises:
        LongRopeError: Base, dimensions, window or the scaling under the factors differ.
    """
    for key in _SAME:
        ours, theirs = getattr(config, key), getattr(other, key)
        if ours != theirs:
            raise LongRopeError(f"{name} has {key} {ours} and {other_name} has {theirs}; {rule}")


def _attention(config: LongRopeConfig) -> str:
    """The attention factor in words; a policy has no effect beside a number."""
    if config.attention_factor is not None:
        return f"attention factor {config.attention_factor!r}"
    return f"attention-factor policy {config.attention_factor_policy}"


def _values(item: FactorSet) -> tuple[tuple[float, ...], int]:
    """What a set does to a model; its origin may differ."""
    return item.rescale_factors, item.effective_start_tokens
