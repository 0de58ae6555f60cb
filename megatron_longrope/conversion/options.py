"""Options of the conversions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longrope.lengths import parse_length
from megatron_longrope.options import DTYPES, Options, flag, sliding_window_flag


@dataclass(frozen=True, kw_only=True)
class _Checkpoint(Options):
    load: str = flag(metavar="CKPT")
    """Megatron --save or iter_XXXXXXX directory"""


@dataclass(frozen=True, kw_only=True)
class _MaybeCheckpoint(Options):
    load: str | None = flag(None, metavar="CKPT")
    """Megatron --save or iter_XXXXXXX directory"""


@dataclass(frozen=True, kw_only=True)
class _Factors(Options):
    """Which factors an export has."""

    iteration: int | None = flag(None, type=int)
    """iteration (default: the latest)"""
    longrope_config: str | None = flag(None, metavar="F")
    """factors to export (default: those stored in the checkpoint)"""
    drop_start_tokens: bool = flag(False)
    """take factor sets with start tokens, which transformers cannot express, without them"""


@dataclass(frozen=True, kw_only=True)
class _ExportedWindows(Options):
    short_length: int | None = flag(None, type=parse_length, metavar="N")
    """window, in tokens, whose set becomes short_factor (default: the original window)"""
    target_length: int | None = flag(None, type=parse_length, metavar="N")
    """window, in tokens, whose set becomes long_factor (default: the largest)"""


@dataclass(frozen=True, kw_only=True)
class _ComparedWindows(Options):
    short_length: int | None = flag(None, type=parse_length, metavar="N")
    """window, in tokens, whose set is the folder's short_factor (default: what the folder has)"""
    target_length: int | None = flag(None, type=parse_length, metavar="N")
    """window, in tokens, whose set is the folder's long_factor (default: what the folder has)"""


@dataclass(frozen=True, kw_only=True)
class _Folder(Options):
    output: str = flag(metavar="DIR")
    """folder to write"""
    tokenizer: str | None = flag(None, metavar="T")
    """SentencePiece .model file or Hugging Face folder to include"""
    family: str | None = flag(None)
    """model family (default: that of an import that was not trained since, else the first that
    fits)"""
    overwrite: bool = flag(False)
    """replace an existing folder, unless it holds what is read or a Megatron checkpoint"""


@dataclass(frozen=True, kw_only=True)
class _Written(Options):
    dtype: str = flag("keep", choices=(*DTYPES, "keep"))
    """dtype of the weights (default: as on disk)"""
    no_verify: bool = flag(False)
    """do not compare logits before finishing, which holds the model in memory twice, in fp32"""


@dataclass(frozen=True, kw_only=True)
class _Tolerance(Options):
    tolerance: float = flag(1e-4, type=float)
    """largest difference of a logit"""


@dataclass(frozen=True, kw_only=True)
class ToHfOptions(_Tolerance, _Written, _Folder, _ExportedWindows, _Factors, _Checkpoint):
    """What `longrope convert to-hf` is told."""


@dataclass(frozen=True, kw_only=True)
class _Import(Options):
    hf: str = flag(metavar="DIR")
    """Hugging Face folder to read"""
    output: str = flag(metavar="CKPT")
    """Megatron --load directory to write"""
    make_vocab_size_divisible_by: int = flag(128, type=int, metavar="N")
    """pad the vocabulary to a multiple of N rows per rank"""
    tensor_model_parallel_size: int = flag(1, type=int, metavar="N")
    """ranks to pad the vocabulary for; tensors are not split"""
    sliding_window: str = sliding_window_flag()


@dataclass(frozen=True, kw_only=True)
class FromHfOptions(_Tolerance, _Written, _Import):
    """What `longrope convert from-hf` is told."""


@dataclass(frozen=True, kw_only=True)
class _Compared(Options):
    hf: str = flag(metavar="DIR")
    """Hugging Face folder"""
    sliding_window: str = sliding_window_flag()

    json: bool = flag(False)
    """print one JSON object"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(_Tolerance, _Compared, _ComparedWindows, _Factors, _MaybeCheckpoint):
    """What `longrope convert verify` is told."""


@dataclass(frozen=True, kw_only=True)
class InspectCheckpointOptions(Options):
    """What `longrope convert inspect` is told."""

    checkpoint: str = flag(positional=True, metavar="CKPT")
    """--save or iter_XXXXXXX directory"""
    iteration: int | None = flag(None, type=int)
    """iteration (default: the latest)"""
    json: bool = flag(False)
    """print one JSON object"""
