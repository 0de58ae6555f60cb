"""What the commands do, as functions of their options: the Python API."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import rank, require_alone

if TYPE_CHECKING:
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.conversion.from_hf import ImportReport
    from megatron_longrope.conversion.options import FromHfOptions, ToHfOptions, VerifyOptions
    from megatron_longrope.conversion.to_hf import ConversionReport
    from megatron_longrope.data.options import PrepareOptions
    from megatron_longrope.evaluation.kind import Kind
    from megatron_longrope.evaluation.options import EvaluationOptions
    from megatron_longrope.evaluation.series import Row
    from megatron_longrope.factor_search.options import SearchOptions

Progress = Callable[[int, int], None]
"""Is called with bytes done and bytes in all."""
Announce = Callable[[str], None]
"""Is called with what a verification takes, in words, right before it."""


def search(options: SearchOptions) -> LongRopeConfig | None:
    """Search rescale factors; write them, the journal and the figures beside `options.output`.

    Returns:
        LongRopeConfig: What was written; None on every rank but the first, and of a dry run.

    Raises:
        LongRopeError: An option contradicts another, the model or the data.
    """
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.engine.loading import load_engine_for
    from megatron_longrope.factor_search.session import SearchPlan

    plan = SearchPlan.from_options(options)
    if options.dry_run:
        print("\n".join(plan.estimate()))
        return None
    engine = load_engine_for(
        options, plan.checkpoint, plan.problem.base, attention=options.attention, replicas=True
    )
    if not plan.run(engine):
        return None
    if not options.no_figures:
        from megatron_longrope.report.search_figures import draw_search_figures

        draw_search_figures(options.output, options.journal, plan.problem.target_length)
    return LongRopeConfig.load(options.output)


def evaluate(options: EvaluationOptions) -> list[Row]:
    """Measure what is not measured yet; write `<kind>.jsonl` and `<kind>.csv`.

    Args:
        options (EvaluationOptions): Of one of the kinds, such as :class:`PerplexityOptions`.

    Returns:
        list[Row]: A record for each cell; none on any rank but the first.

    Raises:
        LongRopeError: An option contradicts another, a model or the data, or RANK is missing.
    """
    from megatron_longrope.engine import process_groups
    from megatron_longrope.engine.loading import load_engine_for
    from megatron_longrope.evaluation.records import Records, write_csv
    from megatron_longrope.evaluation.session import Session
    from megatron_longrope.evaluation.targets import open_models
    from megatron_longrope.files import check_folder, hold

    require_alone()  # before they wait for one another's lock
    kind = kind_of(options)
    output = Path(options.output)
    check_folder(output)
    models = open_models(
        options.load, options.hf, options.iteration, options.sliding_window, options.dtype
    )
    plan = kind.plan(options, models)
    with contextlib.ExitStack() as held:
        if rank() == 0:  # what another process adds meanwhile would be missing in the table
            output.mkdir(parents=True, exist_ok=True)
            what, remedy = f"{output / kind.name}.jsonl", "wait for it or give another --output"
            wait = 3.0  # seconds: workers of a run that was killed may still be ending
            held.callback(hold(output / f".{kind.name}.lock", what, remedy, wait).release)
        if "RANK" in os.environ:
            process_groups.initialize(
                options.tensor_model_parallel_size, options.context_parallel_size, replicas=True
            )
        session = Session(
            Records(output / f"{kind.name}.jsonl", kind.cell_fields, kind.check),
            lambda model: load_engine_for(options, model.checkpoint, replicas=True),
            kind.name,
            kind.unit,
            options.max_hours,
            options.yes,
        )
        session.run(plan)
        if rank() != 0:
            return []
        summary = kind.summary(session.records.rows)
        write_csv(output / f"{kind.name}.csv", summary, list(summary[0]))
        return [session.records.find(cell.record) or {} for cell in plan.cells]


def kind_of(options: EvaluationOptions) -> Kind:
    """Return the kind of evaluation that the options are of."""
    from megatron_longrope.evaluation.kinds import KINDS

    for kind in KINDS.values():
        if type(options) is kind.options:
            return kind
    names = ", ".join(kind.options.__name__ for kind in KINDS.values())
    raise LongRopeError(f"{type(options).__name__} are no options of an evaluation; give {names}")


def convert_to_hf(
    options: ToHfOptions, progress: Progress | None = None, announce: Announce | None = None
) -> ConversionReport:
    """Convert a Megatron checkpoint to a Hugging Face folder, and compare their logits.

    Raises:
        LongRopeError: The checkpoint, the factors or the tokenizer does not fit, the logits differ,
            or the disk is full; the output is as it was.
    """
    from megatron_longrope.checkpoint.folders import iteration_directory
    from megatron_longrope.checkpoint.hf.families import dtype_named
    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.conversion.staging import check_apart
    from megatron_longrope.conversion.to_hf import write_hf_folder
    from megatron_longrope.conversion.verify import verify

    # A training may save a later iteration meanwhile.
    load = str(iteration_directory(Path(options.load), options.iteration))
    factors = options.longrope_config or ""  # may be the name of published ones
    # The one file of an earlier export that is read now and written again.
    again = Path(factors) == Path(options.output, "longrope.json")
    others = None if again or not os.path.exists(factors) else factors
    check_apart(options.output, [others])
    config, _ = exported_factors(replace(options, load=load))
    lengths: dict[str, Any] = {
        "short_length": options.short_length,
        "target_length": options.target_length,
    }

    def check(folder: Path) -> Any:
        exported = LongRopeConfig.load(folder / "longrope.json") if config else None
        return verify(
            load,
            folder,
            longrope_config=exported,
            tolerance=options.tolerance,
            remedy="nothing was written",
            announce=announce,
            **lengths,
        )

    return write_hf_folder(
        load,
        options.output,
        longrope_config=config,
        tokenizer=options.tokenizer,
        without_start_tokens=options.drop_start_tokens,
        dtype=None if options.dtype == "keep" else dtype_named(options.dtype),
        family=options.family,
        overwrite=options.overwrite,
        check=None if options.no_verify else check,
        progress=progress,
        **lengths,
    )


def exported_factors(
    options: ToHfOptions | VerifyOptions, hf: str | None = None, sliding_window: str = "refuse"
) -> tuple[LongRopeConfig | None, str]:
    """Return the factors that a conversion exports, and where they come from, in words.

    Args:
        hf (str, optional): The Hugging Face folder, of a verification without a checkpoint.
        sliding_window (str): Of that folder; see :func:`.hf.source.open_folder`.

    Raises:
        LongRopeError: There are none, and an option is about them; or they cannot be read.
    """
    from megatron_longrope.checkpoint.opening import open_checkpoint
    from megatron_longrope.config import LongRopeConfig

    if options.longrope_config is not None:
        return LongRopeConfig.load(options.longrope_config), options.longrope_config
    folder = None if options.load else hf
    config = open_checkpoint(options.load, folder, options.iteration, sliding_window).longrope
    where = "in the folder" if folder else "in the checkpoint"
    if config is not None:
        return config, f"stored {where}, up to {config.max_length} tokens"
    for name in ("drop_start_tokens", "short_length", "target_length"):
        if getattr(options, name):
            raise LongRopeError(
                f"--{name.replace('_', '-')} is about factors, and none are stored {where}; give a "
                "file with --longrope-config or leave the flag out"
            )
    return None, f"none stored {where}, plain RoPE"


def convert_from_hf(
    options: FromHfOptions, progress: Progress | None = None, announce: Announce | None = None
) -> ImportReport:
    """Convert a Hugging Face folder to a Megatron checkpoint, and compare their logits.

    Raises:
        LongRopeError: The folder is damaged or of a model that is not supported, the logits differ,
            or the disk is full; nothing is written then.
    """
    from megatron_longrope.checkpoint.hf.families import dtype_named
    from megatron_longrope.conversion.from_hf import write_checkpoint
    from megatron_longrope.conversion.verify import verify_import

    def check(directory: Path) -> Any:
        return verify_import(
            directory,
            options.hf,
            tolerance=options.tolerance,
            sliding_window=options.sliding_window,
            announce=announce,
        )

    return write_checkpoint(
        options.hf,
        options.output,
        dtype=None if options.dtype == "keep" else dtype_named(options.dtype),
        make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        sliding_window=options.sliding_window,
        check=None if options.no_verify else check,
        progress=progress,
    )


def prepare_data(options: PrepareOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenize text into `output`.bin, `output`.idx and the manifest `output`.json.

    With several workers, which import the calling script, call it under
    `if __name__ == "__main__":`.

    Returns:
        dict[str, Any]: The manifest.

    Raises:
        LongRopeError: An input, the tokenizer or the output is unfit, or nothing is left to write.
    """
    from megatron_longrope.data.prepare import prepare

    return prepare(
        options.sources(),
        options.output,
        options.tokenizer,
        options.packing(),
        split=options.split(),
        bos=options.bos,
        text_key=options.text_key,
        on_error=options.on_error,
        workers=options.workers,
        overwrite=options.overwrite,
        progress=progress,
    )
