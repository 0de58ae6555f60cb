"""`longrope search`: find rescale factors for a longer (or, to recover, a short) window."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from megatron_longrope.cli import options
from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import rank

_HALVED_FROM = 512 * 1024  # tokens; section 4.1 of the paper

_EVOLUTION = {
    "population_size": "--population-size",
    "num_mutations": "--num-mutations",
    "num_crossovers": "--num-crossovers",
    "num_parents": "--num-parents",
    "max_iterations": "--iterations",
    "mutation_prob": "--mutation-prob",
}
_CMA = {"population_size": "--population-size", "initial_deviation": "--initial-deviation"}


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "search",
        help="search rescale factors for a target length",
        description="Search LongRoPE factors: a first search on a model with plain RoPE; on one "
        "with factors (its own, or --base-config) a second search beyond their window (factors "
        "multiply) or, for a length within it, a recovery search of that window. Under torchrun, "
        "ranks form replicas of TP x CP that score candidates in parallel.",
    )
    options.add_model(parser)
    parser.add_argument(
        "--attention",
        choices=("auto", "sdpa", "flash", "te"),
        default="auto",
        help="kernels: a flash-attention package, torch SDPA or Transformer Engine (default: auto, "
        "flash where one can run, else sdpa; `longrope doctor` says which)",
    )
    parser.add_argument(
        "--data", required=True, metavar="PREFIX", help="search documents (longrope data prepare)"
    )
    options.add_bos(parser)
    parser.add_argument(
        "--target-length", required=True, type=options.length, metavar="N", help="window in tokens"
    )
    parser.add_argument(
        "--output", required=True, metavar="F.json", help="LongRoPE config to write"
    )
    parser.add_argument(
        "--base-config",
        metavar="F.json",
        help="factors of the fine-tuned model (default: those that the model carries; `none` "
        "searches from plain RoPE all the same)",
    )
    parser.add_argument(
        "--original-length",
        type=options.length,
        metavar="N",
        help="pre-trained window in tokens (default: the checkpoint's max_position_embeddings)",
    )
    parser.add_argument(
        "--held-out", metavar="PREFIX", help="other documents, to compare the winner on at the end"
    )
    parser.add_argument(
        "--tensorboard-dir", metavar="DIR", help="write scalars while the search runs"
    )
    parser.add_argument("--no-figures", action="store_true", help="write no PNG and CSV files")
    _add_objective(parser)
    _add_space(parser)
    _add_algorithm(parser)
    _add_estimate(parser)
    attention = parser.add_mutually_exclusive_group()
    attention.add_argument(
        "--attention-factor-policy",
        choices=("auto", "su", "yarn", "none"),
        help="auto scores the seeds under su and none and keeps the better one's value for every "
        "window; su, yarn and none leave the original window at 1, which Hugging Face cannot hold "
        "(default: auto for a first search, else the base's)",
    )
    attention.add_argument(
        "--attention-factor",
        metavar="F",
        help="one value for every window; `longest` takes the base config's value at its largest "
        "window, which is what Hugging Face applies to both windows",
    )
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="continue from the journal if any")
    resume.add_argument("--overwrite", action="store_true", help="discard an existing journal")
    parser.set_defaults(run=run)


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        choices=("ppl", "needle", "joint"),
        default="ppl",
        help="ppl: perplexity of all tokens. needle: of a hidden number's tokens when it is asked "
        "for at the end (LongRoPE2). joint: the loss of the document's tokens plus "
        "--needle-weight x that of the number's, from one pass. The latter two need --tokenizer "
        "(default: ppl)",
    )
    group.add_argument(
        "--needle-weight",
        type=float,
        default=0.1,
        metavar="W",
        help="of the number's loss in the joint objective (default: 0.1)",
    )
    group.add_argument(
        "--num-samples", type=int, default=5, metavar="K", help="documents per evaluation"
    )
    group.add_argument(
        "--pool",
        type=int,
        metavar="N",
        help="documents that generations take in turn, K each, instead of the same K for all; a "
        "quarter is kept to choose among the best at the end (default: no rotation)",
    )
    group.add_argument(
        "--windows-per-document",
        type=int,
        default=1,
        metavar="W",
        help="consecutive windows per document; useful for short windows (default: 1)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="T",
        help="the data's tokenizer, to hide numbers in it (default, for the closing table only: "
        "where the data's manifest says)",
    )
    group.add_argument(
        "--needle-depths",
        metavar="LIST",
        help="where needles stand, from 0 (start; all of them in the LongRoPE2 paper) to 1, for "
        "example 0,0.5,1 (default: evenly spread over the documents)",
    )
    group.add_argument(
        "--tokens-per-forward",
        type=options.length,
        default=8192,
        metavar="N",
        help="shorter samples share a forward pass up to so many tokens (default: 8k)",
    )
    group.add_argument(
        "--retrieval-trials",
        type=int,
        default=3,
        metavar="N",
        help="numbers that the references and the winner are asked for at the end; a winner that "
        "finds fewer than the best reference gives way to the best that does not; 0 asks for none "
        "(default: 3)",
    )
    group.add_argument(
        "--accept-worse-retrieval",
        action="store_true",
        help="write the winner even so",
    )


def _add_space(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("space")
    group.add_argument(
        "--space",
        choices=("floored", "full", "critical"),
        default="floored",
        help="full: every factor in [1, 1.25 s] (LongRoPE). floored: the same, but at least s from "
        "the critical dimension on, the first that completes no period in the trained window; "
        "less is hardly seen by perplexity and loses retrieval. critical: factors in [s, 2 s] "
        "from the critical dimension up, NTK below (LongRoPE2) (default: floored)",
    )
    group.add_argument(
        "--critical-dimension",
        type=int,
        metavar="I",
        help="fix it, as an index of frequencies (default: floored: by the trained window; "
        "critical: searched)",
    )
    group.add_argument(
        "--start-tokens",
        default=None,
        metavar="LIST",
        help="choices of n_hat, for example 0,1,2,4, or `paper` for its fourteen; export to "
        "Hugging Face needs 0 (default: the base's, 0 for plain RoPE)",
    )
    group.add_argument(
        "--upper",
        type=float,
        help="largest factor (default: 1.25 s, critical: 2 s, recovery: max(3, 1 + s) or the "
        "base's largest)",
    )


def _add_algorithm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--algorithm",
        choices=("cma", "evolution"),
        default="cma",
        help="cma: CMA-ES with start tokens by successive halving and a coordinate polish. "
        "evolution: algorithm 1 of the paper with its numbers (default: cma)",
    )
    group.add_argument(
        "--max-evaluations",
        type=int,
        metavar="K",
        help="stop after so many candidates (default: cma 336, evolution 1344; half at 512k and "
        "above)",
    )
    group.add_argument(
        "--patience",
        type=int,
        metavar="K",
        help="stop when K evaluations in a row have not lowered the best score by more than 0.1 %% "
        "(default: use the whole budget)",
    )
    group.add_argument(
        "--warm-start",
        metavar="F.json",
        help="factors for a near window of the same model, such as another second search's "
        "result: one more starting point",
    )
    group.add_argument(
        "--population-size", type=int, metavar="P", help="evolution: 64; cma: 4 + 3 ln n"
    )
    group.add_argument("--num-mutations", type=int, metavar="N1", help="evolution: 16")
    group.add_argument("--num-crossovers", type=int, metavar="N2", help="evolution: 16")
    group.add_argument("--num-parents", type=int, metavar="K", help="evolution: top 32 kept")
    group.add_argument(
        "--iterations", dest="max_iterations", type=int, metavar="T", help="evolution: 40"
    )
    group.add_argument("--mutation-prob", type=float, metavar="p", help="evolution: 0.3 per gene")
    group.add_argument(
        "--initial-deviation",
        type=float,
        metavar="D",
        help="cma: of log factors, relative to the largest seed factor's (default: 0.1)",
    )
    group.add_argument(
        "--racing",
        choices=("exact", "paired", "off"),
        default="exact",
        help="when to stop scoring a candidate. exact: when it certainly cannot survive; the "
        "result stays the same. paired: also when a paired t-test says so (default: exact)",
    )
    group.add_argument(
        "--racing-significance", type=float, default=0.05, metavar="A", help="of the paired test"
    )
    group.add_argument(
        "--lookahead",
        type=int,
        default=0,
        metavar="G",
        help="generations that may start before an earlier one is complete, so that replicas do "
        "not wait for the slowest; 0 is the published algorithm (default: 0)",
    )
    group.add_argument("--seed", type=int, default=0)


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print FLOPs, memory and hours, and stop; loads no weights",
    )
    group.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="a100-80, h100, ... or TFLOPS:GIB, for --dry-run",
    )
    group.add_argument(
        "--num-gpus",
        type=int,
        metavar="G",
        help="GPUs of the job, for --dry-run (default: TP x CP, one replica)",
    )
    group.add_argument(
        "--mfu", type=float, default=0.4, metavar="U", help="part of the GPU's peak, for --dry-run"
    )


def run(args: argparse.Namespace) -> int | None:
    """Run the command."""
    from megatron_longrope.search import session

    plan = session.SearchPlan.from_options(args, parameters(args))
    if args.dry_run:
        for line in plan.estimate(args.gpu, args.num_gpus, args.mfu):
            print(line)
        return None
    # So ends torchrun the other ranks when one dies, and a batch system a job at its time limit.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        found = plan.run(
            options.load_engine_from(
                args, plan.checkpoint, plan.problem.base, attention=args.attention, replicas=True
            )
        )
        if found and not args.no_figures:
            _draw(Path(args.output), *found)
    except KeyboardInterrupt as stop:
        if rank() == 0:
            reason = str(stop) or "Ctrl-C"
            print(
                f"longrope search: stopped by {reason}; {plan.num_journaled()} evaluations are in "
                f"{plan.journal}: run the same command with --resume to go on",
                file=sys.stderr,
            )
        return 130
    return None


def _draw(path: Path, problem, outcome) -> None:
    """Draw the search into `F_figures` beside `F.json`."""
    from megatron_longrope.report.search_figures import draw_search_figures

    draw_search_figures(
        outcome.records,
        problem,
        outcome.candidate,
        path.with_name(f"{path.stem}_figures"),
        name=path.stem,
        seeds=outcome.seed_scores,
    )


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM (the job was cancelled, or another rank ended)")


def parameters(args: argparse.Namespace):
    """Sizes of the algorithm: the flags given, else the paper's, halved from 512k on.

    Raises:
        LongRopeError: A flag belongs to the other algorithm, or its value breaks a rule.
    """
    from megatron_longrope.search.cma import CmaParameters
    from megatron_longrope.search.evolution import EvolutionParameters

    ours, theirs = (_CMA, _EVOLUTION) if args.algorithm == "cma" else (_EVOLUTION, _CMA)
    for name in theirs.keys() - ours.keys():
        if getattr(args, name) is not None:
            raise LongRopeError(
                f"{theirs[name]} has no meaning with --algorithm {args.algorithm}; leave it out or "
                "choose the other algorithm"
            )
    given = {name: value for name in ours if (value := getattr(args, name)) is not None}
    halved = args.target_length >= _HALVED_FROM
    if args.algorithm == "cma":
        default = CmaParameters().max_evaluations // (2 if halved else 1)
        samples = args.num_samples * args.windows_per_document
        budget = default if args.max_evaluations is None else args.max_evaluations
        return CmaParameters(max_evaluations=budget, num_samples=max(samples, 1), **given)
    defaults = EvolutionParameters().halved() if halved else EvolutionParameters()
    values = {name: getattr(defaults, name) for name in _EVOLUTION}
    if "population_size" in given and "num_parents" not in given:
        values["num_parents"] = min(values["num_parents"], given["population_size"])
    return EvolutionParameters(**{**values, **given})
