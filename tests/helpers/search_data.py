"""Documents and a tokenizer that fit the tiny checkpoints of `make_megatron_checkpoint`."""

from __future__ import annotations

import json
import string
from pathlib import Path

import make_megatron_checkpoint as maker
from tiny_corpus import make_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import WholeDocuments


def make_search_data(directory: Path, bos: bool = True) -> dict[str, str]:
    """Write `search` and `heldout` sets; returns their prefixes and the tokenizer's path."""
    tokenizer = directory / "tokenizer"
    _character_tokenizer("<s>" if bos else None).save_pretrained(str(tokenizer))
    texts = [make_text(seed, 400) for seed in range(8)]
    for name, part in (("search", texts[:5]), ("heldout", texts[5:])):
        source = directory / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        prepare([source], directory / name, tokenizer, WholeDocuments())
    return search_data_in(directory)


def search_data_in(directory: Path) -> dict[str, str]:
    """What :func:`make_search_data` returned for the directory."""
    return {name: str(directory / name) for name in ("search", "heldout", "tokenizer")}


def _character_tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    """One token per printable character: the checkpoints' vocabulary holds no bytes."""
    tokens = ["<unk>", "<s>", "</s>", *string.printable]
    assert len(tokens) <= maker.VOCAB
    vocabulary = {token: index for index, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )
