"""`longrope search`: find rescale factors for a longer (or, to recover, a short) window."""

from __future__ import annotations

import argparse

from megatron_longrope.cli import options
from megatron_longrope.ranks import rank


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "search",
        help="search rescale factors for a target length",
        description="Search LongRoPE factors. Without --base-config: a first search on the base "
        "model. With it: a second search beyond its window (factors multiply) or, for a length "
        "within it, a recovery search of that window.",
    )
    options.add_model(parser)
    parser.add_argument(
        "--data", required=True, metavar="PREFIX", help="search documents (longrope data prepare)"
    )
    parser.add_argument(
        "--target-length", required=True, type=options.length, metavar="N", help="window in tokens"
    )
    parser.add_argument(
        "--output", required=True, metavar="F.json", help="LongRoPE config to write"
    )
    parser.add_argument("--base-config", metavar="F.json", help="factors of the fine-tuned model")
    parser.add_argument(
        "--original-length",
        type=options.length,
        metavar="N",
        help="pre-trained window in tokens (default: the checkpoint's max_position_embeddings)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=5, metavar="K", help="documents per evaluation"
    )
    parser.add_argument(
        "--windows-per-document",
        type=int,
        default=1,
        metavar="W",
        help="consecutive windows per document; useful for short windows (default: 1)",
    )
    parser.add_argument(
        "--held-out", metavar="PREFIX", help="other documents, to compare the winner on at the end"
    )
    algorithm = parser.add_argument_group("algorithm (defaults are the paper's)")
    algorithm.add_argument("--algorithm", choices=("evolution",), default="evolution")
    algorithm.add_argument("--population-size", type=int, default=64, metavar="P")
    algorithm.add_argument("--num-mutations", type=int, default=16, metavar="N1")
    algorithm.add_argument("--num-crossovers", type=int, default=16, metavar="N2")
    algorithm.add_argument("--num-parents", type=int, default=32, metavar="K", help="top-k kept")
    algorithm.add_argument("--iterations", type=int, default=40, metavar="T")
    algorithm.add_argument("--mutation-prob", type=float, default=0.3, metavar="p", help="per gene")
    algorithm.add_argument(
        "--max-evaluations", type=int, metavar="K", help="stop after so many candidates"
    )
    algorithm.add_argument(
        "--start-tokens",
        default=None,
        metavar="LIST",
        help="choices of n_hat, for example 0,1,2,4 (default: the paper's 14; 0 switches them off, "
        "which export to Hugging Face needs)",
    )
    algorithm.add_argument(
        "--upper", type=float, help="largest factor (default: 1.25 s; recovery: max(3, 1 + s))"
    )
    algorithm.add_argument("--seed", type=int, default=0)
    attention = parser.add_mutually_exclusive_group()
    attention.add_argument(
        "--attention-factor-policy",
        choices=("auto", "su", "yarn", "none"),
        help="auto scores the seeds under su and none and keeps the better (default: auto, or the "
        "base config's)",
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


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from megatron_longrope.config import LongRopeConfig, identity_config
    from megatron_longrope.search.problem import make_problem
    from megatron_longrope.search.runner import run_evolution
    from megatron_longrope.search.space import START_TOKENS

    parameters = _parameters(args)
    start_tokens = _start_tokens(args.start_tokens) or START_TOKENS
    base = LongRopeConfig.load(args.base_config) if args.base_config else None
    if min(args.num_samples, args.windows_per_document) < 1:
        raise ValueError("--num-samples and --windows-per-document must be at least 1")
    engine = options.load_engine_from(args, base)
    if base is None:
        shape = engine.shape
        base = identity_config(
            shape.rotary_base, shape.rotary_dim, options.original_window(args, engine)
        )
    problem = make_problem(base, args.target_length, upper=args.upper, start_tokens=start_tokens)
    objective = _objective(args, args.data, engine)
    settings = _settings(args, problem, parameters, start_tokens)
    journal_path = Path(args.output).with_suffix(".journal.jsonl")
    problem, policy_scores = _with_attention(
        args, problem, objective, journal_path, {**settings, "attention": "per seed"}
    )
    settings["attention"] = [problem.base.attention_factor, problem.base.attention_factor_policy]
    outcome = run_evolution(
        problem,
        parameters,
        objective,
        journal_path,
        settings,
        seed=args.seed,
        max_evaluations=args.max_evaluations,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    origin = {
        "method": f"longrope-{args.algorithm}",
        "stage": problem.stage,
        "scale": problem.space.scale,
        "search_perplexity": outcome.score,
        "seed_perplexity": outcome.seed_scores,
        "policy_perplexity": policy_scores,
        "evaluations": outcome.num_evaluations,
        **{key: settings[key] for key in ("data_sha256", "num_samples", "seed", "checkpoint")},
        "versions": _versions(),
    }
    config = problem.config(outcome.candidate, origin)
    if rank() == 0:
        config.save(args.output)
        _print_summary(args, problem, outcome, config, engine)


def _objective(args: argparse.Namespace, prefix: str, engine):
    """The score of a configuration on the documents of a set."""
    from megatron_longrope.search.objective import PerplexityObjective

    windows = args.windows_per_document
    documents, bos_id = options.read_samples(prefix, args.target_length, args.num_samples, windows)
    return PerplexityObjective(engine, documents, bos_id, args.target_length, windows)


def _parameters(args: argparse.Namespace):
    from megatron_longrope.search.evolution import EvolutionParameters

    return EvolutionParameters(
        population_size=args.population_size,
        num_mutations=args.num_mutations,
        num_crossovers=args.num_crossovers,
        mutation_prob=args.mutation_prob,
        max_iterations=args.iterations,
        num_parents=args.num_parents,
    )


def _start_tokens(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--start-tokens {text!r} must be integers, for example 0,2,4") from None


def _settings(args: argparse.Namespace, problem, parameters, start_tokens) -> dict:
    """What a resumed search must agree on."""
    from dataclasses import asdict

    from megatron_longrope.checkpoint.reader import MegatronCheckpoint
    from megatron_longrope.data.documents import read_manifest

    return {
        "algorithm": args.algorithm,
        "stage": problem.stage,
        "target_length": args.target_length,
        "base": problem.base.to_dict(),
        "parameters": asdict(parameters),
        "start_tokens": list(start_tokens),
        "upper": problem.space.max_step,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "windows_per_document": args.windows_per_document,
        "data_sha256": read_manifest(args.data)["token_sha256"],
        "checkpoint": str(MegatronCheckpoint.open(args.load, args.iteration).directory),
        "dtype": args.dtype,
    }


def _with_attention(args: argparse.Namespace, problem, objective, journal_path, settings):
    """Settle the attention factor of the search; scores the seeds when it is left open."""
    from megatron_longrope.search.runner import choose_policy

    base = problem.base
    if args.attention_factor == "longest":
        return problem.with_attention(
            base.attention_factor_for(base.max_length), base.attention_factor_policy
        ), {}
    if args.attention_factor is not None:
        try:
            value = float(args.attention_factor)
        except ValueError:
            raise ValueError(
                f"--attention-factor {args.attention_factor!r} must be a number or `longest`"
            ) from None
        return problem.with_attention(value, base.attention_factor_policy), {}
    policy = args.attention_factor_policy or ("auto" if args.base_config is None else None)
    if policy is None:
        return problem, {}
    if policy != "auto":
        return problem.with_attention(None, policy), {}
    policy, table = choose_policy(
        problem,
        ("su", "none"),
        objective,
        journal_path,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    return problem.with_attention(None, policy), table


def _print_summary(args, problem, outcome, config, engine) -> None:
    factor_set = config.factor_set_for(args.target_length)
    factor = config.attention_factor_for(args.target_length)
    print(
        f"{problem.stage} search to {args.target_length} tokens: perplexity {outcome.score:.4f} "
        f"after {outcome.num_evaluations} evaluations, {factor_set.num_start_tokens} start tokens, "
        f"attention factor {factor:.6g}"
    )
    rows = {**outcome.seed_scores, "longrope": outcome.score}
    held_out = _held_out(args, problem, outcome, engine) if args.held_out else {}
    print(
        f"{'':10}{'search text':>14}{'held-out text':>16}" if held_out else f"{'':10}{'search':>14}"
    )
    for name, score in rows.items():
        other = f"{held_out[name]:16.4f}" if held_out else ""
        print(f"{name:10}{score:14.4f}{other}")
    print(f"wrote {args.output}")


def _held_out(args, problem, outcome, engine) -> dict[str, float]:
    objective = _objective(args, args.held_out, engine)
    candidates = {**problem.seeds, "longrope": outcome.candidate}
    return {name: objective(problem.config(item)).score for name, item in candidates.items()}


def _versions() -> dict[str, str]:
    import torch

    from megatron_longrope import __version__
    from megatron_longrope.integration.compat import megatron_version

    return {
        "megatron_longrope": __version__,
        "megatron_core": megatron_version(),
        "torch": torch.__version__,
    }
