"""Megatron's own data set over a prepared set, as a training reads it."""

from types import SimpleNamespace


def gpt_dataset(prefix, tokenizer, length, count, cache, **options):
    """`count` samples of `length` tokens.

    Args:
        cache (Path, optional): Folder for Megatron's indices. None leaves it to Megatron.
        **options: Of GPTDatasetConfig.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=None if cache is None else str(cache),
        tokenizer=SimpleNamespace(
            eod=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, unique_identifiers={}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **options,
    )
    sizes = [count, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
