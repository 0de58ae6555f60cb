"""What dropping the start tokens of factor sets does to a model's perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.conversion.start_tokens import DroppedStartTokens, PerplexityEffect


def measured(
    load: str,
    iteration: int | None,
    config: LongRopeConfig,
    dropped: Sequence[DroppedStartTokens],
    *,
    data: str,
    tokenizer: str | None,
    num_documents: int,
    short_length: int | None = None,
    target_length: int | None = None,
    data_length: int | None = None,
) -> list[DroppedStartTokens]:
    """Add the perplexities before and after, one window of each document.

    Args:
        load (str): The Megatron checkpoint.
        config (LongRopeConfig): As it was searched.
        dropped (Sequence[DroppedStartTokens]): The sets concerned.
        data (str): Prefix of a prepared set, or text.
        tokenizer (str, optional): For text.
        num_documents (int): How many documents.
        short_length (int, optional): As given to the conversion.
        target_length (int, optional): As given to the conversion.
        data_length (int, optional): Longest window, in tokens, to measure. Defaults to those that
            the sets are exported for.

    Raises:
        LongRopeError: The documents are missing, too short, or of another tokenizer.
    """
    from megatron_longrope.checkpoint import MegatronCheckpoint
    from megatron_longrope.engine import load_engine, process_groups
    from megatron_longrope.evaluation.perplexity import perplexity
    from megatron_longrope.evaluation.scored_documents import read_scored_documents
    from megatron_longrope.evaluation.targets import NamedModel, check_tokenizer_fits

    checkpoint = MegatronCheckpoint.open(load, iteration)
    model = NamedModel(load, load, checkpoint)
    windows = {
        "short": config.original_max_position_embeddings,
        "long": target_length or config.max_length,
    }
    factor = config.attention_factor_for(windows["long"])
    engine: Any = None
    results = []
    for item in dropped:
        length = min(windows[item.window], data_length or windows[item.window])
        documents = read_scored_documents(data, tokenizer, length, num_documents)
        check_tokenizer_fits(documents.vocab_size, None, f"the tokenizer of {data}", [model])
        values = []
        for count in (item.factor_set.num_start_tokens, 0):
            pinned = _pinned(config, item.factor_set, count, factor)
            if engine is None:
                process_groups.initialize(alone=True)  # as a conversion is
                engine = load_engine(checkpoint, longrope_config=pinned)
            engine.set_config(pinned)
            result = perplexity(engine.nll, documents.tokens, documents.bos_id, length)
            values.append(result.ppl_window_mean)
        effect = PerplexityEffect(length, len(documents.tokens), *values)
        results.append(replace(item, effect=effect))
    return results


def _pinned(
    config: LongRopeConfig, item: FactorSet, num_start_tokens: int, factor: float
) -> LongRopeConfig:
    """One set for every length, with the attention factor that transformers applies to both."""
    length = max(item.max_length, config.original_max_position_embeddings)
    only = replace(item, max_length=length, num_start_tokens=num_start_tokens)
    return replace(config, factor_sets=(only,), attention_factor=factor)
