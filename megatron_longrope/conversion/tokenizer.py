"""The tokenizer files of an exported folder, from a SentencePiece model or a Hugging Face folder.

A SentencePiece model becomes a `tokenizer.json` that is compared with SentencePiece on probe texts
before it is accepted: transformers' own LlamaTokenizer assumes Llama's normalization and drops
characters or spaces of other models.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longrope.conversion.companions import (
    TOKENIZER_FILES,
    copy_companions,
    raise_limit,
)
from megatron_longrope.data.tokenizer import (
    PROBES,
    SentencePieceTokenizer,
    load_sentencepiece,
)
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import write_json_atomic
from megatron_longrope.local_folder import LOCAL_ONLY

_SPACE = "\u2581"  # what SentencePiece writes a space as


@dataclass(frozen=True)
class TokenizerInfo:
    """What config.json needs to know of a tokenizer; the defaults mean "no tokenizer given"."""

    vocab_size: int | None = None
    """Largest token id plus one; ids may have holes."""
    bos_token_id: int | None = None
    """Beginning of sequence, if any."""
    eos_token_id: int | None = None
    """End of sequence, if any."""
    pad_token_id: int | None = None
    """Padding, if any."""


def existing_tokenizer(tokenizer: str | Path) -> Path:
    """The path of a tokenizer that is there.

    Raises:
        LongRopeError: It is neither a file nor a folder.
    """
    path = Path(tokenizer)
    if not (path.is_file() or path.is_dir()):
        raise LongRopeError(
            f"{path}: no such tokenizer; give a SentencePiece .model file or a Hugging Face folder"
        )
    return path


def write_tokenizer(tokenizer: Path | None, directory: Path, max_length: int) -> TokenizerInfo:
    """Put a tokenizer that transformers loads into `directory`.

    Args:
        tokenizer (Path, optional): A SentencePiece `.model` file or a Hugging Face folder, from
            :func:`existing_tokenizer`.
        max_length (int): Window of the model, in tokens.

    Raises:
        LongRopeError: It holds no tokenizer, or the converted one gives different tokens.
    """
    if tokenizer is None:
        return TokenizerInfo()
    if tokenizer.is_dir():
        return _copy_hf(tokenizer, directory, max_length)
    return _convert_sentencepiece(tokenizer, directory, max_length)


def copy_tokenizer(folder: Path, directory: Path, max_length: int) -> bool:
    """Copy the tokenizer files of a folder byte for byte, but for a window that is too short.

    Returns:
        bool: Whether there are any.
    """
    found = copy_companions(folder, directory, TOKENIZER_FILES)
    raise_limit(directory / "tokenizer_config.json", "model_max_length", max_length)
    return bool(found)


def _copy_hf(path: Path, directory: Path, max_length: int) -> TokenizerInfo:
    if not copy_tokenizer(path, directory, max_length):
        looked_for = ", ".join(TOKENIZER_FILES)
        raise LongRopeError(f"{path}: holds no tokenizer files (looked for {looked_for})")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), **LOCAL_ONLY)
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        reason = " ".join(str(error).split())
        raise LongRopeError(f"{path}: transformers cannot load this tokenizer: {reason}") from None
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        _check_sentencepiece_ids(path, loaded)
    special = (getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    return TokenizerInfo(max(loaded.get_vocab().values()) + 1, *special)


def _check_sentencepiece_ids(path: Path, loaded: Any) -> None:
    """Refuse a tokenizer.model that transformers, without a tokenizer.json, reads in its own way.

    Raises:
        LongRopeError: A probe text has other ids than sentencepiece's.
    """
    file = path / "tokenizer.model"
    theirs = SentencePieceTokenizer(file)
    for text in PROBES:
        ids, expected = loaded.encode(text, add_special_tokens=False), theirs.encode(text)
        if ids != expected:
            raise LongRopeError(
                f"{path}: transformers reads tokenizer.model with other ids than sentencepiece "
                f"({ids[:4]} instead of {expected[:4]} for {text!r}); give --tokenizer {file}, "
                "which writes a tokenizer.json with sentencepiece's ids"
            )


def _convert_sentencepiece(path: Path, directory: Path, max_length: int) -> TokenizerInfo:
    model = load_sentencepiece(path)
    fast, symbols = _fast_tokenizer(path)
    texts = (symbol.replace(_SPACE, " ") for symbol in symbols)
    probes = [text for it in texts for text in (f"{it}Hello", f"Hello{it}world {it}")]
    for text in (*PROBES, *probes):
        ours, theirs = fast.encode(text, add_special_tokens=False).ids, model.encode(text)
        if ours != theirs:
            raise LongRopeError(
                f"{path}: the tokenizer.json made from it tokenizes {text!r} differently "
                f"({ours[:8]}... instead of {theirs[:8]}...); give --tokenizer a Hugging Face "
                "folder of this tokenizer, or leave it out and add the files by hand"
            )
    ids = {key: getattr(model, f"{key}_id")() for key in ("unk", "bos", "eos", "pad")}
    ids = {key: index for key, index in ids.items() if index >= 0}
    names = {f"{key}_token": model.id_to_piece(index) for key, index in ids.items()}
    _add_special_tokens(fast, names, model)
    fast.save(str(directory / "tokenizer.json"))
    shutil.copyfile(path, directory / "tokenizer.model")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    write_json_atomic(directory / "tokenizer_config.json", config)
    return TokenizerInfo(model.vocab_size(), *map(ids.get, ("bos", "eos", "pad")))


def _fast_tokenizer(path: Path) -> tuple[Any, list[str]]:
    """Rebuild a SentencePiece model (BPE or unigram) with the `tokenizers` library.

    As SpmConverter.build_tokenizer_from_spm_proto of transformers, which 4.57 does not have yet.

    Returns:
        tuple[Any, list[str]]: The tokenizer, and the user-defined symbols.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    pieces = [(item.piece, item.score) for item in proto.pieces]
    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    symbols = [item.piece for item in proto.pieces if item.type == kinds.USER_DEFINED]
    if trainer.model_type == trainer.BPE:
        mergeable = {item.piece for item in proto.pieces if item.type == kinds.NORMAL}
        merges = [
            (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
            for piece, score in pieces
            if piece in mergeable
            for cut in range(1, len(piece))
            if piece[:cut] in mergeable and piece[cut:] in mergeable
        ]
        core = models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(symbols),  # no merges lead to a symbol
        )
    elif trainer.model_type == trainer.UNIGRAM:
        core = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise LongRopeError(f"{path}: only BPE and unigram SentencePiece models can be converted")
    result = Tokenizer(core)
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces alone: SentencePiece keeps the line breaks that its charsmap leaves.
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", _SPACE))
    result.normalizer = normalizers.Sequence(steps)
    if symbols:
        # After the prefix, which added tokens would be cut off before. Where one symbol begins with
        # another the longer one counts.
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        result.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", left=1))
    result.decoder = decoders.Sequence(parts)
    return result, symbols


def _add_special_tokens(fast: Any, names: dict[str, str], model: Any) -> None:
    from tokenizers import AddedToken, processors

    fast.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    if "bos_token" in names:
        bos = names["bos_token"]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, model.bos_id())],
        )
