"""What the plugin puts around Megatron's own functions, and the state of the run they follow.

Each function takes a Megatron symbol and returns what replaces it: the original, until a run with
`--longrope-config` is configured. There are two ways in. hooks.py installs them at run time; the
files in patches/ bind them in Megatron's source. Both therefore train the same model.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.context_parallel import check_divisible, shard_documents
from megatron_longrope.errors import LongRopeError
from megatron_longrope.frequencies import softmax_scale
from megatron_longrope.integration import (
    agreement,
    chunked_loss,
    compat,
    model_check,
    provenance,
)
from megatron_longrope.integration.arguments import add_longrope_args
from megatron_longrope.integration.attention_choice import (
    OURS,
    attention_from_args,
    check_norms,
)
from megatron_longrope.integration.settings import (
    DocumentScale,
    LongRopeSettings,
    check_flags,
    check_spec,
    check_unused,
    config_from_args,
    settings_from_args,
)


@dataclass(frozen=True)
class Run:
    """What models that are built from now on use."""

    settings: LongRopeSettings | None = None
    """None leaves RoPE stock."""
    attention: str = "te"
    """`te`, `flash`, `sdpa` or `local`; see :func:`.attention_choice.attention_from_args`."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at the same time in the training loss; None leaves it stock."""

    @functools.cached_property
    def document_scale(self) -> DocumentScale | None:
        """What the run's rotary and attention modules share when documents differ in scale."""
        if self.settings is None or not self.settings.follows_documents:
            return None
        return DocumentScale(self.settings)

    def describe(self) -> str:
        """One line for the log that says what the plugin does in this run."""
        how = f"attention {self.attention}"
        if self.loss_chunk is not None:
            how += f"; loss in chunks of {self.loss_chunk} tokens"
        if self.settings is None:
            return f"> longrope: no --longrope-config, stock RoPE; {how}"
        selection = self.settings.selection
        lengths = ", ".join(str(item.max_length) for item in selection.config.factor_sets)
        return (
            f"> longrope: factor sets up to {lengths} tokens, mode {selection.mode}, attention "
            f"factor {self.settings.attention_factor:.6g} by {self.settings.carrier}; "
            f"{how}"
        )


_run: Run | None = None  # module state, because the symbols are global too
_saved_args: argparse.Namespace | None = None  # of the checkpoint that Megatron read while parsing
_compared: set[str | None] = set()  # checkpoint directories whose factors fit the run


def activate(run: Run | None) -> None:
    """Let models that are built from now on follow `run`; None makes every wrapper transparent."""
    global _run
    _run = run


def _settings() -> LongRopeSettings | None:
    return None if _run is None else _run.settings


def configure(args: argparse.Namespace) -> None:
    """Read the `--longrope-*` flags in `args`, which Megatron has validated, and activate them.

    Raises:
        SystemExit: A flag or the factor file is wrong; the message is one sentence.
    """
    global _saved_args
    activate(None)
    saved, _saved_args = _saved_args, None
    _compared.clear()
    if not hasattr(args, "longrope_config"):
        agreement.stop(
            "the arguments lack --longrope-config; parse them with "
            "extra_args_provider=add_longrope_args"
        )
    try:
        check_norms(args)
        loss_chunk = chunked_loss.chunk_tokens_from_args(args)
        check_spec(args)
        if args.longrope_config:
            check_flags(args)
    except ValueError as error:
        agreement.stop(str(error))
    settings = None
    try:
        attention = attention_from_args(args)
        is_restored = provenance.restore(args, saved)
        config = config_from_args(args)
        if config is None:
            check_unused(args)
        else:
            settings = settings_from_args(args, config, attention)
    except ValueError as error:
        # Perhaps only this rank's file or kernel is wrong: the others must hear before it ends.
        agreement.record(agreement.Finding(error=str(error)))
        agreement.settle()
        return
    agreement.record(agreement.Finding(fingerprint=_fingerprint(config), attention=attention))
    agreement.settle()
    if settings is not None:
        args.longrope_lineage = provenance.begin(args, settings)
    activate(Run(settings, attention, loss_chunk))
    if args.rank == 0:
        if is_restored:
            print("> longrope: factors restored from the checkpoint", flush=True)
        print(_run.describe(), flush=True)


def _fingerprint(config: LongRopeConfig | None) -> str | None:
    if config is None:
        return None
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def is_bound(symbol: Any) -> bool:
    """True when a wrapper surrounds `symbol`: a file of patches/ put it into Megatron's source."""
    while symbol is not None:
        if getattr(symbol, "__globals__", None) is globals():
            return True
        symbol = getattr(symbol, "__wrapped__", None)
    return False


# Arguments


def with_arguments(add_megatron_arguments: Callable) -> Callable:
    """Around Megatron's parser builder: the plugin's flags join."""

    @functools.wraps(add_megatron_arguments)
    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_longrope_args(add_megatron_arguments(parser))

    return add_arguments


def with_validation(validate_args: Callable) -> Callable:
    """Around Megatron's validation of its arguments: ours follows, and the run is configured."""

    @functools.wraps(validate_args)
    def validate(args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
        if getattr(args, "longrope_config", None) and args.seq_length:
            try:  # before Megatron's own assertion, which names no remedy
                check_divisible(args.seq_length, args.context_parallel_size)
            except ValueError as error:
                agreement.stop(str(error))
        result = validate_args(args, *rest, **options)
        configure(args)
        return result

    return validate


def with_agreement(initialize_distributed: Callable) -> Callable:
    """Around the creation of process groups: the ranks then compare their factors."""

    @functools.wraps(initialize_distributed)
    def initialize(*rest: Any, **options: Any) -> Any:
        result = initialize_distributed(*rest, **options)
        agreement.settle()
        if _run is None and (flag := _unread_flag()):
            agreement.stop(
                f"{flag} was given but Megatron did not validate its arguments (--yaml-cfg skips "
                "that); give all settings as flags"
            )
        return result

    return initialize


def _unread_flag() -> str | None:
    """A flag of the plugin that was given, or None; --yaml-cfg replaces all parsed arguments."""
    given = (word.partition("=")[0] for word in sys.argv if word.startswith("--longrope-"))
    setting = getattr(_megatron_args(), "longrope_config", None)
    return next(given, "--longrope-config" if setting else None)


def _megatron_args() -> argparse.Namespace:
    from megatron.training.global_vars import get_args

    return get_args()


# Checkpoints


def with_factor_check(load_base_checkpoint: Callable) -> Callable:
    """Around the reading of a checkpoint: its factors must be the run's."""

    @functools.wraps(load_base_checkpoint)
    def load(load_dir: str | None, args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
        result = load_base_checkpoint(load_dir, args, *rest, **options)
        # A teacher and the like come through here as well; they are not this run's past.
        if load_dir in (args.load, args.pretrained_checkpoint):
            _compare(args, load_dir, result[0] or {})
        return result

    return load


def _compare(args: argparse.Namespace, load_dir: str | None, state_dict: dict) -> None:
    global _saved_args
    saved = state_dict.get("args")
    if _run is None:  # --use-checkpoint-args: Megatron is still parsing
        _saved_args = saved or _saved_args
        return
    if load_dir in _compared:  # metadata first, then the tensors
        return
    error, verdict = None, None
    try:
        if state_dict:
            iteration = state_dict.get("iteration") or 0
            saved = saved or provenance.saved_args(load_dir, args)  # Megatron-Bridge stores a file
            if saved is None:
                verdict = provenance.unknown(args, _run.settings, iteration)
            else:
                verdict = provenance.check(args, saved, _run.settings, iteration)
    except ValueError as refusal:
        error = f"{load_dir}: {refusal}"
    agreement.decide(error)
    # Only the first checkpoint is the run's past: a reference model may be loaded after it.
    if verdict is not None and verdict.lineage and not _compared:
        args.longrope_lineage = verdict.lineage
    _compared.add(load_dir)
    if verdict is not None and verdict.remark and args.rank == 0:
        print(f"> longrope: {load_dir}: {verdict.remark}", flush=True)


# Models


def with_rotary(rotary_embedding: type) -> Callable:
    """In the place of `RotaryEmbedding` where a model builds it."""

    # `updated=()`: the __dict__ of a class would give this function all of its methods.
    @functools.wraps(rotary_embedding, updated=())
    def build(*rest: Any, **options: Any) -> Any:
        agreement.require()
        settings = _settings()
        if settings is None:
            return rotary_embedding(*rest, **options)
        from megatron_longrope.rotary import LongRopeRotaryEmbedding

        return LongRopeRotaryEmbedding(
            settings.config,
            *rest,
            mode=settings.selection.mode,
            run_length=settings.selection.run_length,
            hf_parity=settings.hf_parity,
            carried_attention_factor=settings.attention_factor,
            document_scale=_run.document_scale,
            factor_in_cos_sin=settings.carrier == "rope",
            **options,
        )

    return build


def with_core_attention(core_attention: Callable) -> Callable:
    """Around the local spec provider's choice of a core attention class."""

    @functools.wraps(core_attention)
    def choose(self: Any) -> type:
        if _run is None or _run.attention not in OURS:
            return core_attention(self)
        from megatron_longrope.attention import FlashCoreAttention, SdpaCoreAttention

        chosen = FlashCoreAttention if _run.attention == "flash" else SdpaCoreAttention
        if _run.document_scale is None:
            return chosen
        return type(chosen.__name__, (chosen,), {"document_scale": _run.document_scale})

    return choose


def with_concentration(concentration_factor: Callable) -> Callable:
    """Around the multiplier of cos and sin that attention reads from its config."""

    @functools.wraps(concentration_factor)
    def factor(config: Any) -> float:
        settings = _settings()
        if settings is None or settings.carrier != "rope":
            return concentration_factor(config)
        return settings.attention_factor

    return factor


def with_softmax_scale(attention_init: Callable) -> Callable:
    """Around `Attention.__init__`: dynamic inference asks the layer, not the config, for it.

    A config that does not carry the attention factor is refused. Where decoding asks nobody for
    the scale, and gives keys no multiplier of cos and sin either, it is refused, too.
    """

    @functools.wraps(attention_init)
    def init(self: Any, config: Any, *rest: Any, **options: Any) -> None:
        attention_init(self, config, *rest, **options)
        settings = _settings()
        if settings is None or settings.attention_factor == 1.0:
            return
        if settings.carrier == "softmax":
            # Every head dimension is rotated, or the carrier would be another.
            scale = softmax_scale(settings.attention_factor, settings.config.rotary_dim)
            if config.softmax_scale != scale:
                raise LongRopeError(
                    f"the model's TransformerConfig has softmax_scale {config.softmax_scale}, and "
                    f"the attention factor needs {scale:.6g}; give it softmax_scale="
                    "args.softmax_scale after enable(args), or build it with Megatron's "
                    "core_transformer_config_from_args(args)"
                )
            self.softmax_scale = config.softmax_scale
        if compat.decoding_drops_softmax_scale():
            self.flash_decode_and_prefill = _refuse_dynamic_inference

    return init


def _refuse_dynamic_inference(*_: Any, **__: Any) -> None:
    raise LongRopeError(
        f"megatron-core {compat.megatron_version()} drops the attention factor when it decodes in "
        "dynamic batches; use megatron-core 0.19 or a static inference context"
    )


def with_chunked_loss(setup_output_layer: Callable) -> Callable:
    """Around the last step of a language model's constructor: its loss may come in chunks."""

    @functools.wraps(setup_output_layer)
    def setup(self: Any) -> None:
        setup_output_layer(self)
        if _run is not None and _run.loss_chunk is not None and self.post_process:
            chunked_loss.defer(self, _run.loss_chunk)

    return setup


def with_model_check(setup_model_and_optimizer: Callable) -> Callable:
    """Around the building of models: a run with factors must have them in every chunk."""

    @functools.wraps(setup_model_and_optimizer)
    def setup(*rest: Any, **options: Any) -> Any:
        result = setup_model_and_optimizer(*rest, **options)
        if _run is not None:
            model_check.check_models(
                result[0],
                _run.attention,
                has_factors=_settings() is not None,
                loss_chunk=_run.loss_chunk,
            )
        return result

    return setup


# Batches


def with_document_shards(split_batch: Callable) -> Callable:
    """Around the context-parallel split of a batch: packed documents are each split by themselves.

    megatron-core 0.19 cuts a packed sample as a whole, while its attention and rotary code expect
    every document to be split; the split that does so needs Transformer Engine's CUDA extension.
    """

    @functools.wraps(split_batch)
    def split(batch: dict, cp_group: Any) -> dict:
        cu_seqlens = batch.get("cu_seqlens_padded")
        if cu_seqlens is None:
            cu_seqlens = batch.get("cu_seqlens")
        is_stock = _run is None or (_run.settings is None and _run.attention not in OURS)
        if is_stock or cu_seqlens is None or cp_group.size() == 1:
            return split_batch(batch, cp_group=cp_group)
        offsets = cu_seqlens[0].tolist()  # once: the host waits for the device here
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            if batch.get(key) is not None:
                batch[key] = shard_documents(
                    batch[key], offsets, cp_group.rank(), cp_group.size(), dim=1
                )
        return batch

    return split
