"""One interface over sentencepiece and Hugging Face tokenizers.

Neither adds special tokens: BOS and EOS are placed by :mod:`megatron_longrope.data.segments` and by
the evaluation code, which know where a sequence starts and ends.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import read_object
from megatron_longrope.local_folder import LOCAL_ONLY

# Files that define a Hugging Face tokenizer, in the order in which transformers prefers them.
_HF_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)

PROBES = (
    "Hello world",
    " lead",
    "The quick brown fox jumps over the lazy dog, twice!",
    "  def f(x):\n\treturn x * 12345  # done\n\n",
    " one  two   three ",
    "na\u00efve caf\u00e9 \u6f22\u5b57 \U0001f642 \u00bd \ufb01",
    "https://example.org/?q=1&r=%20#top",
)
"""Texts on which two readings of a tokenizer are compared."""

# A line of a tiktoken vocabulary: a token in base64 and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


class Tokenizer(Protocol):
    """What data preparation and evaluation need of a tokenizer."""

    path: str
    """The file or folder it was loaded from."""
    sha256: str
    """Hash of what decides the ids: the sentencepiece model or the tokenizer's defining files."""
    vocab_size: int
    """Largest token id plus one."""
    bos_id: int | None
    """Begin-of-sequence token, None when the tokenizer has none (stock Qwen2, Qwen2.5, Qwen3)."""
    eos_id: int | None
    """End-of-sequence token, None when the tokenizer has none."""
    end_ids: Sequence[int]
    """Tokens that end a generated text: EOS, and those of the folder's generation_config.json."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; `</s>` in the text is ordinary text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    Encoding is exactly sentencepiece's, so the character U+2581, its stand-in for a space, decodes
    to a space; all other text survives the round trip through a model with byte fallback that does
    not normalize.
    """

    def __init__(self, path: str | Path) -> None:
        self._processor = load_sentencepiece(path)
        self.path = str(path)
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = _valid_id(self._processor.bos_id())
        self.eos_id = _valid_id(self._processor.eos_id())
        self.end_ids = _end_ids(Path(path), self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; those that a folder adds to the model, all special, have none."""
        known = self._processor.vocab_size()
        return self._processor.DecodeIds([int(token) for token in ids if token < known])


def load_sentencepiece(path: str | Path) -> Any:
    """Load a sentencepiece model.

    Returns:
        sentencepiece.SentencePieceProcessor: The model.

    Raises:
        LongRopeError: The file is none; one of tiktoken's is called so.
    """
    import sentencepiece

    data = Path(path).read_bytes()
    if _TIKTOKEN.match(data):
        raise LongRopeError(
            f"{path} is a tiktoken vocabulary, not a sentencepiece model; give the folder of the "
            "Hugging Face model, with its tokenizer.json"
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError:
        raise LongRopeError(
            f"{path} is not a sentencepiece model; give a .model file, "
            "or the folder of a Hugging Face tokenizer"
        ) from None
    return processor


class HuggingFaceTokenizer:
    """A local Hugging Face tokenizer folder; nothing is downloaded and no remote code runs."""

    def __init__(self, path: str | Path) -> None:
        defining = _defining_files(Path(path))
        self._tokenizer = _load_auto(path)
        # Long documents are the purpose here: no warning beyond the model's window.
        self._tokenizer.model_max_length = 2**62
        self.path = str(path)
        settings = Path(path) / "tokenizer_config.json"
        # add_prefix_space, for one, stands in the settings and changes ids.
        if settings.is_file() and not self._is_as_stored(defining[0]):
            defining.append(settings)
        content = b"".join(file.read_bytes() for file in defining)
        self.sha256 = hashlib.sha256(content).hexdigest()
        # Added tokens may leave holes, so count to the largest id instead of counting entries.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.end_ids = _end_ids(Path(path), self.eos_id)

    def _is_as_stored(self, file: Path) -> bool:
        """Return whether tokenizer.json alone gives the same ids."""
        from tokenizers import Tokenizer as Stored

        if file.name != "tokenizer.json":
            return False
        stored = Stored.from_file(str(file))
        # Tokens that are not special are found in text; transformers adds special ones of its own.
        added = self._tokenizer.added_tokens_decoder.values()
        texts = [f"x {token.content} y" for token in added if not token.special]
        return all(
            stored.encode(text, add_special_tokens=False).ids == self.encode(text)
            for text in (*PROBES, *texts)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the name of a special token in the text is split like any text."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(
            [int(token) for token in ids], clean_up_tokenization_spaces=False
        )


def load_tokenizer(path: str | Path, bos: int | None = None) -> Tokenizer:
    """Load a sentencepiece `.model` file or a Hugging Face folder.

    Args:
        path (Path): File or folder.
        bos (int, optional): Token id to use as BOS. Defaults to the tokenizer's own, or none.

    Raises:
        LongRopeError: The path does not exist or holds neither, or `bos` is none of its tokens.
    """
    if Path(path).is_dir():
        file = _defining_files(Path(path))[0]
        loaded: Tokenizer = (
            _sentencepiece_folder(path, file)
            if file.suffix == ".model"
            else HuggingFaceTokenizer(path)
        )
    elif Path(path).is_file():
        loaded = SentencePieceTokenizer(path)
    else:
        raise LongRopeError(
            f"tokenizer {path} does not exist; give a sentencepiece .model file "
            "or the folder of a Hugging Face tokenizer"
        )
    if bos is not None:
        check_bos(bos, loaded.vocab_size)
        loaded.bos_id = bos
    return loaded


def check_same_tokens(tokenizer: Tokenizer, what: str, folder: Path) -> None:
    """Refuse a tokenizer that reads text as other tokens than the one beside a model's weights.

    Args:
        what (str): What it is called.
        folder (Path): Of the model; one that holds no tokenizer says nothing.

    Raises:
        LongRopeError: They read one of :data:`PROBES` otherwise.
    """
    if not has_tokenizer(folder) or Path(tokenizer.path).resolve() == folder.resolve():
        return
    try:
        own = load_tokenizer(folder)
    except LongRopeError:  # another one was given because this cannot be loaded
        return
    for text in PROBES:
        if tokenizer.encode(text) != own.encode(text):
            raise LongRopeError(
                f"{what} reads {text!r} as other tokens than the tokenizer in {folder}; it is "
                "not the model's tokenizer"
            )


def _end_ids(path: Path, eos_id: int | None) -> list[int]:
    """EOS and, as transformers has it, every id that a folder's generation_config.json names."""
    settings = path / "generation_config.json"
    named = read_object(settings).get("eos_token_id") if settings.is_file() else None
    ids = named if isinstance(named, list) else [named]
    if not all(token is None or isinstance(token, int) for token in ids):
        raise LongRopeError(
            f"{settings}: eos_token_id is {named!r}; it must be a token id or a list of them"
        )
    return sorted({token for token in (*ids, eos_id) if token is not None})


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    return any((folder / names[0]).is_file() for names in _HF_FILES)


def _defining_files(folder: Path) -> list[Path]:
    """The files that transformers makes the tokenizer of a folder from."""
    for names in _HF_FILES:
        if (folder / names[0]).is_file():
            return [folder / name for name in names if (folder / name).is_file()]
    wanted = ", ".join(names[0] for names in _HF_FILES)
    raise LongRopeError(
        f"{folder} holds no tokenizer ({wanted}); "
        "give the folder of a Hugging Face model or a sentencepiece .model file"
    )


def _load_auto(path: str | Path) -> Any:
    """transformers' tokenizer of a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), **LOCAL_ONLY)
    except Exception as error:  # transformers raises many types for a broken folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise LongRopeError(
            f"{path} cannot be loaded as a Hugging Face tokenizer: {reason}; check its files"
        ) from None


def _sentencepiece_folder(path: str | Path, file: Path) -> SentencePieceTokenizer:
    """A folder without tokenizer.json: ids by sentencepiece, special tokens by the folder.

    transformers makes a tokenizer of its own from the .model file, which keeps or drops a leading
    space otherwise than sentencepiece does.

    Raises:
        LongRopeError: The folder gives the pieces other ids, or adds tokens that are found in text.
    """
    loaded, theirs = SentencePieceTokenizer(file), _load_auto(path)
    vocabulary = theirs.get_vocab()
    processor = loaded._processor
    moved = [i for i in range(loaded.vocab_size) if vocabulary.get(processor.IdToPiece(i), i) != i]
    added = [
        str(token)
        for index, token in theirs.added_tokens_decoder.items()
        if index >= loaded.vocab_size and not token.special
    ]
    if moved or added:
        what = f"adds {added[0]!r} to" if added else f"moves {processor.IdToPiece(moved[0])!r} in"
        raise LongRopeError(
            f"{path} {what} the vocabulary of {file.name}, so that sentencepiece alone does not "
            "give its ids; save the tokenizer with transformers once, which writes tokenizer.json"
        )
    loaded.path = str(path)
    loaded.vocab_size = max(loaded.vocab_size, max(vocabulary.values()) + 1)
    loaded.bos_id, loaded.eos_id = theirs.bos_token_id, theirs.eos_token_id
    loaded.end_ids = _end_ids(Path(path), loaded.eos_id)
    return loaded


def check_bos(bos: int, vocab_size: int) -> None:
    """Refuse a BOS that is no token.

    Raises:
        LongRopeError: It is not an id from 0 to `vocab_size` - 1.
    """
    if not 0 <= bos < vocab_size:
        raise LongRopeError(f"--bos {bos} is no token id; the tokenizer has 0 to {vocab_size - 1}")


def bos_name(bos_id: int | None) -> int | str:
    """Return the id of BOS for a record, or `none`."""
    return "none" if bos_id is None else bos_id


def bos_prefix(bos_id: int | None) -> list[int]:
    """Return what stands before a window: BOS, or nothing where the model has none."""
    return [] if bos_id is None else [bos_id]


def decode_generated(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text that a model generated, without special tokens.

    A model may have more tokens than its tokenizer, and an untrained one may choose them.
    """
    special = {tokenizer.bos_id, *tokenizer.end_ids}
    return tokenizer.decode(
        [token for token in ids if token < tokenizer.vocab_size and token not in special]
    )


def _valid_id(token: int) -> int | None:
    return token if token >= 0 else None
