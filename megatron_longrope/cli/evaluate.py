"""`longrope eval`: perplexity and passkey retrieval of a checkpoint under factors."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_longrope.cli import options
from megatron_longrope.ranks import rank

_PPL_COLUMNS = (
    "label", "policy", "length", "protocol", "stride", "ppl_window_mean", "ppl_token_weighted",
    "num_windows", "num_tokens", "seconds",
)  # fmt: skip


def add_parser(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("eval", help="measure perplexity or passkey retrieval")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    ppl = kinds.add_parser(
        "ppl",
        help="perplexity at several lengths, for baselines and factor files",
        description="Perplexity by the paper's definition: BOS before every window, unweighted "
        "mean over windows; one window per document unless --stride is given.",
    )
    options.add_model(ppl)
    ppl.add_argument("--data", required=True, metavar="PREFIX", help="held-out documents")
    ppl.add_argument("--num-documents", type=int, default=10, metavar="K")
    ppl.add_argument(
        "--stride",
        type=_stride,
        metavar="S",
        help="slide by S tokens, or `disjoint`: windows side by side, so that every length scores "
        "the same tokens (default: one window per document)",
    )
    ppl.add_argument(
        "--baselines",
        type=options.choices("none", "pi", "ntk", "yarn"),
        default=[],
        metavar="LIST",
        help="published methods to measure: none,pi,ntk,yarn",
    )
    ppl.add_argument(
        "--attention-factor-policy",
        type=options.choices("su", "yarn", "none"),
        default=["none"],
        metavar="LIST",
        help="attention-factor policies of the baselines: su,yarn,none (default: none)",
    )
    _add_common(ppl)
    ppl.set_defaults(run=run_ppl)
    passkey = kinds.add_parser(
        "passkey",
        help="find a number hidden in filler text",
        description="The paper's passkey prompt, as long as fits into each length; one "
        "teacher-forced forward per trial.",
    )
    options.add_model(passkey)
    passkey.add_argument("--tokenizer", required=True, metavar="T", help="model's tokenizer")
    passkey.add_argument("--trials", type=int, default=10, help="trials per length")
    passkey.add_argument("--seed", type=int, default=42)
    _add_common(passkey)
    passkey.set_defaults(run=run_passkey)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--longrope-config",
        action="append",
        default=[],
        metavar="[LABEL=]F.json",
        help="factor file to measure; may be given several times",
    )
    parser.add_argument(
        "--lengths", required=True, type=options.lengths, metavar="LIST", help="4k,8k,... tokens"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for the results")
    parser.add_argument(
        "--original-length",
        type=options.length,
        metavar="N",
        help="pre-trained window in tokens (default: from the checkpoint)",
    )


def run_ppl(args: argparse.Namespace) -> None:
    """Run `longrope eval ppl`."""
    from megatron_longrope.evaluation.perplexity import perplexity
    from megatron_longrope.evaluation.records import Records, write_csv
    from megatron_longrope.progress import Progress

    files = _factor_files(args.longrope_config)
    if not files and not args.baselines:
        raise ValueError("nothing to measure; give --longrope-config and/or --baselines")
    if rank() == 0:
        print(f"lengths: {', '.join(map(str, args.lengths))} tokens", flush=True)
    documents, bos_id = options.read_samples(args.data, max(args.lengths), args.num_documents)
    engine = options.load_engine_from(args)
    records = Records(
        Path(args.output) / "ppl.jsonl",
        ("label", "policy", "config", "length", "requested_stride", "checkpoint", "sources"),
    )
    cells = list(_ppl_cells(args, files, engine))
    units = len(documents) if args.stride is None else 1
    with Progress(len(cells) * units, "perplexity", "windows") as progress:
        for cell, config in cells:
            if records.find(cell):
                progress.update("already measured", units)
                continue
            engine.set_config(config)
            note = f"{cell['label']} {cell['policy'] or ''} at {cell['length']}"
            result = perplexity(
                engine.nll,
                documents,
                bos_id,
                cell["length"],
                stride=args.stride,
                on_window=(lambda note=note: progress.update(note)) if units > 1 else None,
            )
            if units == 1:
                progress.update(note)
            if rank() == 0:
                records.append({**cell, **result.to_dict()})
    if rank() == 0:
        _print_table(records, cells)
        write_csv(Path(args.output) / "ppl.csv", records.rows, _PPL_COLUMNS)
        print(f"wrote {records.path} and ppl.csv beside it")


def run_passkey(args: argparse.Namespace) -> None:
    """Run `longrope eval passkey`."""
    import numpy as np
    import torch

    from megatron_longrope.config import LongRopeConfig
    from megatron_longrope.data.tokenizer import load_tokenizer
    from megatron_longrope.evaluation.passkey import is_retrieved, make_trial
    from megatron_longrope.evaluation.records import Records, write_csv
    from megatron_longrope.evaluation.statistics import wilson_interval
    from megatron_longrope.progress import Progress

    if args.trials < 1:
        raise ValueError(f"--trials {args.trials} must be at least 1")
    files = _factor_files(args.longrope_config) or {"checkpoint": None}
    tokenizer = load_tokenizer(args.tokenizer)
    engine = options.load_engine_from(args)
    own = engine.config
    key = ("label", "config", "length", "seed", "trial", "checkpoint")
    records = Records(Path(args.output) / "passkey.jsonl", key)
    summary = []
    with Progress(len(files) * len(args.lengths) * args.trials, "passkey", "trials") as progress:
        for label, path in files.items():
            config = LongRopeConfig.load(path) if path else own
            for length in args.lengths:
                config.factor_set_for(length)  # refuse before any work
                engine.set_config(config)
                rng = np.random.default_rng([args.seed, length])
                hits = 0
                for number in range(args.trials):
                    trial = make_trial(tokenizer, length, rng)
                    cell = {
                        "label": label,
                        "config": path,
                        "length": length,
                        "seed": args.seed,
                        "trial": number,
                        "checkpoint": args.load,
                    }
                    found = records.find(cell)
                    if found is None:
                        tokens = torch.tensor([trial.tokens])
                        start = tokens.shape[1] - trial.num_answer_tokens - 1
                        predictions = engine.predictions(tokens, start)[0, :-1]
                        found = {
                            **cell,
                            "correct": is_retrieved(predictions, trial),
                            "depth": trial.depth,
                            "key": trial.key,
                            "num_tokens": len(trial.tokens),
                        }
                        records.append(found)
                    hits += found["correct"]
                    progress.update(f"{label} at {length}: {hits}/{number + 1}")
                low, high = wilson_interval(hits / args.trials, args.trials)
                summary.append(
                    {
                        "label": label,
                        "length": length,
                        "trials": args.trials,
                        "accuracy": hits / args.trials,
                        "wilson_low": low,
                        "wilson_high": high,
                    }
                )
    for row in summary:
        print(
            f"{row['label']:16} {row['length']:>8} tokens: {row['accuracy']:.0%} of {args.trials} "
            f"(95 % interval {row['wilson_low']:.0%} to {row['wilson_high']:.0%})"
        )
    write_csv(Path(args.output) / "passkey.csv", summary, list(summary[0]))
    print(f"wrote {records.path} and passkey.csv beside it")


def _stride(text: str) -> int | str:
    return text if text == "disjoint" else options.length(text)


def _factor_files(items: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for item in items:
        label, separator, path = item.rpartition("=")
        label = label if separator else Path(path).stem
        if label in files:
            raise ValueError(f"label {label!r} stands for two factor files; give each its own")
        files[label] = path
    return files


def _ppl_cells(args: argparse.Namespace, files: dict[str, str], engine) -> Iterator[tuple]:
    """Every measurement with its configuration; lengths that a file does not cover are refused."""
    from megatron_longrope.baselines import baseline_config
    from megatron_longrope.config import LongRopeConfig

    common = {
        "checkpoint": args.load,
        "sources": f"{args.data}:{args.num_documents}",
        "protocol": "truncated" if args.stride is None else "sliding",
        "requested_stride": args.stride,
    }
    original = options.original_window(args, engine)
    for label, path in files.items():
        config = LongRopeConfig.load(path)
        for length in args.lengths:
            config.factor_set_for(length)
            cell = {"label": label, "policy": None, "config": path, "length": length}
            yield {**cell, **common}, config
    for method in args.baselines:
        for policy in args.attention_factor_policy:
            for length in args.lengths:
                # Within the original window every method is the model as it was trained.
                if length <= original and (method, policy) != (
                    args.baselines[0],
                    args.attention_factor_policy[0],
                ):
                    continue
                config = baseline_config(
                    method,
                    engine.shape.rotary_base,
                    engine.shape.rotary_dim,
                    original,
                    length,
                    policy,
                )
                cell = {"label": method, "policy": policy, "config": None, "length": length}
                yield {**cell, **common}, config


def _print_table(records, cells) -> None:
    """Both means: the paper's over windows, and the one over tokens."""
    print(f"{'':24}{'length':>9}{'window mean':>14}{'token mean':>14}  protocol")
    for cell, _ in cells:
        row = records.find(cell)
        policy = f" ({row['policy']})" if row["policy"] else ""
        print(
            f"{row['label'] + policy:24}{row['length']:>9}{row['ppl_window_mean']:14.4f}"
            f"{row['ppl_token_weighted']:14.4f}  {row['protocol']}, {row['num_windows']} windows"
        )
