"""`longrope eval needle`: numbers hidden between the sentences of real documents."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_longrope.cli import evaluate, options
from megatron_longrope.ranks import rank

_TASKS = ("single", "multi_key", "multi_query")


def add_parser(kinds) -> None:
    """Register `eval needle`."""
    parser = kinds.add_parser(
        "needle",
        help="numbers hidden between the sentences of real documents",
        description="Retrieval in real text, in the manner of RULER: one needle, one among others, "
        "several asked for at once; with the perplexity of the answers alone (LongRoPE2). "
        "Sentence ends are learnt from the documents themselves; nothing is downloaded.",
    )
    evaluate.add_common(parser)
    group = parser.add_argument_group("needles")
    group.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="a .txt, .jsonl or .jsonl.gz file, or a directory of them",
    )
    evaluate.add_tokenizer(group)
    group.add_argument(
        "--tasks",
        type=options.choices(*_TASKS),
        default=list(_TASKS),
        metavar="LIST",
        help=f"{','.join(_TASKS)} (default: all)",
    )
    group.add_argument(
        "--num-documents",
        type=int,
        default=10,
        metavar="K",
        help="the first K documents that fill the longest length, in turn (default: 10)",
    )
    group.add_argument(
        "--num-needles",
        type=int,
        default=4,
        metavar="K",
        help="in multi_key and multi_query (default: 4)",
    )
    group.add_argument(
        "--num-queries",
        type=int,
        default=2,
        metavar="Q",
        help="asked for in multi_query (default: 2)",
    )
    evaluate.add_trials(group, "of each task, length and depth", depths="5")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.data.sentences import train_splitter
    from megatron_longrope.data.tokenizer import bos_name
    from megatron_longrope.evaluation import needle
    from megatron_longrope.evaluation.records import write_csv
    from megatron_longrope.evaluation.retrieval import needle_summary
    from megatron_longrope.evaluation.scored_documents import read_texts, tokenizer_for
    from megatron_longrope.evaluation.session import Cell
    from megatron_longrope.evaluation.subjects import check_tokenizer_fits

    evaluate.check_trials(args)
    if args.depths == [None]:
        raise ValueError("--depths random is for passkey; give a number of depths or a list")
    models, subjects = evaluate.open_subjects(args, args.lengths)
    tokenizer = tokenizer_for(evaluate.tokenizer_path(args), args.data, args.bos)
    check_tokenizer_fits(tokenizer.vocab_size, f"tokenizer {tokenizer.path}", models)
    texts = list(read_texts(args.data))
    documents = needle.prepare_documents(
        texts,
        train_splitter([document.text for document in texts]),
        tokenizer,
        args.lengths,
        tasks=args.tasks,
        num_needles=args.num_needles,
        num_queries=args.num_queries,
        limit=args.num_documents,
    )
    cells = [
        Cell(
            subject,
            {
                "task": task,
                "length": length,
                "requested_depth": depth,
                "seed": args.seed,
                "trial": trial,
                "num_needles": 1 if task == "single" else args.num_needles,
                "num_queries": args.num_queries if task == "multi_query" else 1,
                "document": documents[trial % len(documents)].name,
                "document_sha256": documents[trial % len(documents)].sha256(length),
                "tokenizer_sha256": tokenizer.sha256,
                "bos": bos_name(tokenizer.bos_id),
                "requested_bos": args.bos,
            },
            {length: 1},
        )
        for subject in subjects
        for length in args.lengths
        for task in args.tasks
        for depth in args.depths
        for trial in range(args.trials)
    ]

    def measure(engine, cell) -> dict:
        started, fields = time.perf_counter(), cell.fields
        sample = needle.make_sample(
            fields["task"],
            documents[fields["trial"] % len(documents)],
            tokenizer,
            fields["length"],
            bos_id=tokenizer.bos_id,
            depth=fields["requested_depth"],
            seed=args.seed,
            trial=fields["trial"],
            num_needles=args.num_needles,
            num_queries=args.num_queries,
        )
        answer = engine.answer(sample.tokens, sample.num_answer_tokens)
        score = needle.score(sample, answer.predicted, answer.nll)
        return {
            "depth": sample.depths[0],
            "depths": list(sample.depths),
            "recall": score.recall,
            "nll": score.nll,
            "num_tokens": sample.tokens.shape[1],
            "seconds": time.perf_counter() - started,
        }

    session = evaluate.open_session(args, "needle", "trials")
    session.run_shared(cells, measure)
    if rank() == 0:
        rows = needle_summary([session.records.find(cell.record) for cell in cells])
        for row in rows:
            print(
                f"{row['model']}: {row['label']}, {row['task']}, {row['length']} tokens: recall "
                f"{row['recall']:.0%} over {row['trials']} trials, needle perplexity "
                f"{row['needle_ppl']:.4g}"
            )
        everything = needle_summary(session.records.rows, by_depth=True)
        write_csv(Path(args.output) / "needle.csv", everything, list(everything[0]))
        print(f"wrote {session.records.path} and needle.csv beside it")
