"""What is measured: models, and the factors that each of them is measured under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.baselines import extended_config
from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.errors import LongRopeError
from megatron_longrope.methods import method
from megatron_longrope.ranks import rank

if TYPE_CHECKING:
    from megatron_longrope.data.tokenizer import Tokenizer

OWN = "checkpoint"
"""Label of a checkpoint's own factors."""


@dataclass(frozen=True)
class NamedModel:
    """A checkpoint whose headers have been read; its weights have not."""

    label: str
    """What it is called in tables and figures."""
    path: str
    """As given."""
    checkpoint: Checkpoint
    """Megatron checkpoint or Hugging Face folder."""
    hugging_face: bool = False
    """Whether it is a Hugging Face folder, which has its tokenizer beside it."""
    dtype: str | None = None
    """Of the weights, as asked for; None for the device's default."""

    @cached_property
    def content_sha256(self) -> str:
        """Hash what the checkpoint's files hold, which identifies it wherever it lies."""
        from megatron_longrope.checkpoint.fingerprint import content_sha256

        return content_sha256(self.checkpoint.directory)

    @cached_property
    def recorded_dtype(self) -> str:
        """Dtype of the weights as records name it: that asked for, or the device's default."""
        from megatron_longrope.engine.loading import default_dtype

        return self.dtype or str(default_dtype(self.checkpoint.shape)).removeprefix("torch.")

    def config(self) -> LongRopeConfig:
        """Return the checkpoint's own factors, or stock RoPE up to its window."""
        from megatron_longrope.checkpoint.opening import model_config

        return model_config(self.checkpoint)


@dataclass(frozen=True)
class Target:
    """A model under given factors."""

    model: NamedModel
    """The model."""
    label: str
    """Name of the factors: a file's label, a published method, or :data:`OWN`."""
    config: LongRopeConfig
    """The factors."""
    path: str | None = None
    """Factor file, if they come from one."""
    policy: str | None = None
    """Attention-factor policy of a published method."""

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Return the fields that every record has of its target."""
        return {
            "model": self.model.label,
            "checkpoint": self.model.path,
            "checkpoint_sha256": self.model.content_sha256,
            "iteration": self.model.checkpoint.iteration,
            "label": self.label,
            "policy": self.policy,
            "config": self.path,
            "config_sha256": config_sha256(self.config),
            "original_length": self.config.original_max_position_embeddings,
            "sliding_window": self.model.checkpoint.shape.sliding_window,
            "requested_dtype": self.model.recorded_dtype,
        }


def config_sha256(config: LongRopeConfig) -> str:
    """Hash everything that changes a result: not where the factors come from."""
    value = config.to_dict()
    for item in value["factor_sets"]:
        del item["origin"]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_models(
    megatron: Sequence[str],
    hugging_face: Sequence[str],
    iteration: int | None = None,
    sliding_window: str = "refuse",
    dtype: str | None = None,
) -> list[NamedModel]:
    """Read the headers of checkpoints.

    Args:
        megatron (Sequence[str]): `[LABEL=]DIR` of Megatron checkpoints.
        hugging_face (Sequence[str]): `[LABEL=]DIR` of Hugging Face folders.
        iteration (int, optional): Of the Megatron checkpoints. Defaults to the latest.
        sliding_window (str): Of the folders: `refuse`, `drop` or `keep`.
        dtype (str, optional): Of the weights. Defaults to the device's.

    Raises:
        LongRopeError: None or an unreadable one was given, or a label stands for two.
    """
    from megatron_longrope.checkpoint.opening import open_checkpoint

    if not megatron and not hugging_face:
        raise LongRopeError(
            "no model was given; name a Megatron checkpoint with --load or a Hugging "
            "Face folder with --hf"
        )
    models = [
        NamedModel(label, path, open_checkpoint(path, None, iteration), dtype=dtype)
        for label, path in labelled(megatron)
    ]
    models += [
        NamedModel(
            label, path, open_checkpoint(None, path, sliding_window=sliding_window), True, dtype
        )
        for label, path in labelled(hugging_face)
    ]
    _check_distinct([model.label for model in models], "models")
    return models


def targets_at(
    models: Sequence[NamedModel], factor_files: Sequence[str], lengths: Sequence[int] = ()
) -> list[Target]:
    """Return every model under every factor file, or its own factors; no weight is loaded.

    Args:
        models (Sequence[NamedModel]): From :func:`open_models`.
        factor_files (Sequence[str]): `[LABEL=]PATH` of LongRoPE JSON files.
        lengths (Sequence[int]): To be measured, in tokens.

    Raises:
        LongRopeError: A file is damaged or for another model, a label stands for two, or the
            factors do not cover a length.
    """
    from megatron_longrope.checkpoint.opening import check_fits, warn_of_window

    files = [(label, path, LongRopeConfig.load(path)) for label, path in labelled(factor_files)]
    _check_distinct([label for label, *_ in files], "factor files")
    targets = []
    for model in models:
        for label, path, config in files:
            try:
                check_fits(config, model.checkpoint.shape, model.checkpoint.longrope)
            except ValueError as error:
                raise LongRopeError(f"{path} with {model.path}: {error}") from None
            warn_of_window(config, path, model.checkpoint)
            targets.append(Target(model, label, config, path))
        if not files:
            targets.append(Target(model, OWN, model.config()))
    for target in targets if lengths else ():
        try:
            target.config.factor_set_for(max(lengths))
        except ValueError as error:
            raise LongRopeError(f"{target.path or target.model.path}: {error}") from None
    return targets


def baselines_of(
    model: NamedModel,
    names: Sequence[str],
    policies: Sequence[str | None],
    lengths: Sequence[int],
    window: int | None = None,
) -> Iterator[tuple[int, Target]]:
    """Yield (length, target) of a model under published methods.

    Args:
        model (NamedModel): Its factors, if it has any, are extended.
        names (Sequence[str]): Of :data:`megatron_longrope.methods.METHODS`.
        policies (Sequence[str | None]): Attention-factor policies; None for each method's own.
        lengths (Sequence[int]): In tokens; within the model's window every method is the model as
            it was trained, which is yielded once.
        window (int, optional): Pre-trained window in tokens. Defaults to the checkpoint's.

    Raises:
        LongRopeError: `window` contradicts the model's factors.
    """
    from megatron_longrope.checkpoint.opening import model_config

    base = model_config(model.checkpoint, window)
    plain = base.max_length == base.original_max_position_embeddings
    if not plain and rank() == 0:
        print(f"{model.label}: baselines multiply its factors for {base.max_length} tokens")
    pairs = [
        (name, policy or (method(name).policy if plain else None))
        for name in names
        for policy in policies
    ]
    name, policy = pairs[0]
    # On plain RoPE a policy changes nothing within the window but the hash, by which records are
    # found; on a model with factors it would change the attention factor.
    inside = extended_config(name, base, base.max_length, policy if plain else None)
    for length in lengths:
        if length <= base.max_length:
            yield length, Target(model, name, inside, policy=policy)
    for name, policy in pairs:
        for length in lengths:
            if length > base.max_length:
                config = extended_config(name, base, length, policy)
                yield length, Target(model, name, config, policy=policy)


def own_tokenizer(given: str | None, models: Sequence[NamedModel]) -> str | None:
    """Return the tokenizer given, else that of the only model when it is a Hugging Face folder."""
    if given is None and len(models) == 1 and models[0].hugging_face:
        return models[0].path
    return given


def prompt_tokenizer(given: str | None, models: Sequence[NamedModel]) -> str:
    """Return what :func:`own_tokenizer` does.

    Raises:
        LongRopeError: There is none.
    """
    if (path := own_tokenizer(given, models)) is None:
        raise LongRopeError(
            "prompts need a tokenizer: give the models' own with --tokenizer (a sentencepiece "
            ".model file or a Hugging Face folder); models with different ones need a command each"
        )
    return path


def check_tokenizer_fits(
    vocab_size: int, tokenizer: Tokenizer | None, what: str, models: Sequence[NamedModel]
) -> None:
    """Refuse the tokenizer of another model.

    Args:
        vocab_size (int): Largest token id that it has, plus one.
        tokenizer (Tokenizer, optional): It itself, if it is still there.
        what (str): What it is called.
        models (Sequence[NamedModel]): That read its tokens.

    Raises:
        LongRopeError: A model has fewer tokens, or a tokenizer beside its weights that reads the
            same text as other ones.
    """
    from megatron_longrope.checkpoint.opening import check_vocabulary
    from megatron_longrope.data.tokenizer import check_same_tokens

    for model in models:
        check_vocabulary(vocab_size, what, model.checkpoint.shape, model.path)
        if tokenizer is not None and model.hugging_face:
            check_same_tokens(tokenizer, what, Path(model.path))


def labelled(items: Sequence[str]) -> list[tuple[str, str]]:
    """Split `LABEL=PATH`; without a label, the name of the file or directory.

    An equals sign may be a part of the path, as in `runs/lr=2e-5`: a path that exists has no label,
    and a label has no slash.
    """
    pairs = []
    for item in items:
        label, separator, path = item.partition("=")
        if not separator or "/" in label or Path(item).exists():
            path = item
            label = Path(path).stem if Path(path).suffix == ".json" else Path(path).resolve().name
        if not label or not path:
            raise LongRopeError(f"{item!r} lacks its label or its path; write LABEL=PATH")
        pairs.append((label, path))
    return pairs


def _check_distinct(labels: Sequence[str], what: str) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise LongRopeError(
                f"label {label!r} stands for two {what}; give each its own, as LABEL=PATH"
            )
