"""`longrope eval short`: benchmarks within the original window, through lm-evaluation-harness."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_longrope.cli import evaluate, options
from megatron_longrope.ranks import rank

_COLUMNS = (
    "model", "label", "task", "num_fewshot", "metric", "value", "stderr", "samples", "limit",
    "max_length", "lm_eval_version", "seconds",
)  # fmt: skip


def add_parser(kinds) -> None:
    """Register `eval short`."""
    parser = kinds.add_parser(
        "short",
        help="short benchmarks through lm-evaluation-harness",
        description="The paper's Open LLM leaderboard tasks, or any other of "
        "lm-evaluation-harness (pip install lm-eval), scored by the engine with the factors of the "
        "original window. Nothing is downloaded unless --allow-download is given.",
    )
    evaluate.add_common(parser, lengths=False)
    group = parser.add_argument_group("benchmarks")
    group.add_argument("--tokenizer", metavar="T", help="the models' tokenizer (default: of --hf)")
    group.add_argument(
        "--tasks",
        default="paper",
        metavar="LIST",
        help="NAME[:SHOTS[:METRIC]],... of lm-evaluation-harness or --include-path; `paper` is "
        "arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:acc (default)",
    )
    group.add_argument(
        "--include-path", metavar="DIR", help="directory with YAML files of tasks of your own"
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="K",
        help="only the first K questions of each task, or a share below 1: for trials, no result",
    )
    group.add_argument(
        "--max-length",
        type=options.length,
        metavar="N",
        help="longest prompt in tokens, at most and by default the original window; longer ones "
        "lose their beginning, are counted and reported",
    )
    group.add_argument("--batch-size", type=int, default=8, metavar="B", help="default: 8")
    group.add_argument("--seed", type=int, default=1234, help="of few-shot examples")
    group.add_argument(
        "--allow-download", action="store_true", help="let data sets be fetched from the Hub"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.data.tokenizer import load_tokenizer
    from megatron_longrope.evaluation.harness import (
        check_original_factors,
        check_tasks,
        harness_lm,
        parse_tasks,
        run_tasks,
    )
    from megatron_longrope.evaluation.records import write_csv
    from megatron_longrope.evaluation.session import Cell
    from megatron_longrope.evaluation.subjects import check_tokenizer_fits

    specs = parse_tasks(args.tasks)
    models, subjects = evaluate.open_subjects(args)
    for subject in subjects:
        check_original_factors(subject.config, args.max_length)
    tokenizer = load_tokenizer(evaluate.tokenizer_path(args))
    check_tokenizer_fits(tokenizer.vocab_size, f"tokenizer {tokenizer.path}", models)
    loaded = check_tasks(specs, include_path=args.include_path, allow_download=args.allow_download)
    tasks = {task.spec.name: task for task in loaded}
    cells = [
        Cell(
            subject,
            {
                "task": task.spec.name,
                "num_fewshot": task.spec.num_fewshot,
                "metric": task.spec.metric,
                "limit": args.limit,
                "max_length": args.max_length or subject.config.original_max_position_embeddings,
                "seed": args.seed,
                "tokenizer_sha256": tokenizer.sha256,
            },
        )
        for subject in subjects
        for task in loaded
    ]

    def measure(engine, cell, on_task) -> dict:
        lm = harness_lm(
            engine,
            tokenizer,
            max_length=cell.fields["max_length"],
            batch_size=args.batch_size,
        )
        (record,) = run_tasks(
            lm,
            [tasks[cell.fields["task"]]],
            limit=args.limit,
            seed=args.seed,
            allow_download=args.allow_download,
        )
        on_task()
        return record

    session = evaluate.open_session(args, "short", "tasks")
    session.run_each(cells, measure)
    if rank() == 0:
        for row in (session.records.find(cell.record) for cell in cells):
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            print(
                f"{row['model']}: {row['label']}, {row['task']} ({row['num_fewshot']} shots): "
                f"{row['metric']} {row['value']:.4f}{error} over {row['samples']} questions"
            )
        write_csv(Path(args.output) / "short.csv", session.records.rows, _COLUMNS)
        print(f"wrote {session.records.path} and short.csv beside it")
