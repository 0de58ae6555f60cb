"""`longrope eval passkey`: find a number hidden in filler text."""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

from megatron_longrope.cli import evaluate
from megatron_longrope.ranks import rank

SCORINGS = ("teacher-forced", "generate")


def add_parser(kinds) -> None:
    """Register `eval passkey`."""
    parser = kinds.add_parser(
        "passkey",
        help="find a number hidden in filler text, at any length",
        description="The prompt of the paper's code at exactly each length. One teacher-forced "
        "forward per trial, which is passed when greedy decoding would write the number and stop; "
        "--scoring generate decodes instead.",
    )
    evaluate.add_common(parser)
    group = parser.add_argument_group("passkey")
    evaluate.add_tokenizer(group)
    evaluate.add_trials(group, "of each length and depth", depths="random")
    group.add_argument(
        "--scoring",
        choices=SCORINGS,
        default=SCORINGS[0],
        help="teacher-forced (default), or generate: greedy decoding of ten tokens with a KV "
        "cache, of which the first number counts, as in the paper's code",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.data.tokenizer import bos_name, load_tokenizer
    from megatron_longrope.evaluation import passkey
    from megatron_longrope.evaluation.records import write_csv
    from megatron_longrope.evaluation.retrieval import passkey_summary
    from megatron_longrope.evaluation.session import Cell
    from megatron_longrope.evaluation.subjects import check_tokenizer_fits

    evaluate.check_trials(args)
    models, subjects = evaluate.open_subjects(args, args.lengths)
    tokenizer = load_tokenizer(evaluate.tokenizer_path(args), args.bos)
    check_tokenizer_fits(tokenizer.vocab_size, f"tokenizer {tokenizer.path}", models)
    report = passkey.check_tokenizer(tokenizer)
    # Ten new tokens must fit behind a prompt that is to be continued.
    spare = passkey.MAX_NEW_TOKENS - 1 if args.scoring == "generate" else 0

    @functools.lru_cache(maxsize=4)  # several subjects are asked one after the other
    def make_trial(length: int, depth: float | None, trial: int):
        return passkey.make_trial(
            tokenizer, length, depth=depth, seed=args.seed, trial=trial, spare=spare
        )

    make_trial(min(args.lengths), 0.0, 0)
    if rank() == 0:
        print(f"tokenizer: {report.describe()}", flush=True)
    cells = [
        Cell(
            subject,
            {
                "length": length,
                "requested_depth": depth,
                "seed": args.seed,
                "trial": trial,
                "scoring": args.scoring,
                "tokenizer_sha256": tokenizer.sha256,
                "bos": bos_name(tokenizer.bos_id),
                "requested_bos": args.bos,
            },
            {length: 1},
        )
        for model in models
        for length in args.lengths
        for depth in args.depths
        for trial in range(args.trials)
        for subject in subjects
        if subject.model is model
    ]

    def measure(engine, cell) -> dict:
        started, fields = time.perf_counter(), cell.fields
        trial = make_trial(fields["length"], fields["requested_depth"], fields["trial"])
        score = _teacher_forced if args.scoring == "teacher-forced" else _generated
        return {
            "depth": trial.depth,
            "key": trial.key,
            "num_tokens": len(trial.tokens),
            "num_answer_tokens": trial.num_answer_tokens,
            **score(engine, trial, tokenizer),
            "seconds": time.perf_counter() - started,
        }

    session = evaluate.open_session(args, "passkey", "trials")
    session.run_shared(cells, measure)
    if rank() == 0:
        rows = passkey_summary([session.records.find(cell.record) for cell in cells])
        for row in rows:
            print(
                f"{row['model']}: {row['label']}, {row['length']} tokens: {row['accuracy']:.0%} of "
                f"{row['trials']} (95 % interval {row['wilson_low']:.0%} to "
                f"{row['wilson_high']:.0%})"
            )
        everything = passkey_summary(session.records.rows, by_depth=True)
        write_csv(Path(args.output) / "passkey.csv", everything, list(everything[0]))
        print(f"wrote {session.records.path} and passkey.csv beside it")


def _teacher_forced(engine, trial, tokenizer) -> dict:
    import torch

    from megatron_longrope.evaluation.passkey import is_retrieved

    answer = engine.answer(torch.tensor([trial.tokens]), trial.num_answer_tokens)
    return {
        "correct": is_retrieved(answer.predicted, trial, tokenizer),
        "nll": sum(answer.nll) / len(answer.nll),
    }


def _generated(engine, trial, tokenizer) -> dict:
    import torch

    from megatron_longrope.engine.generation import generate
    from megatron_longrope.evaluation.passkey import MAX_NEW_TOKENS, parse_answer

    (new,) = generate(engine, torch.tensor([trial.prompt_tokens]), MAX_NEW_TOKENS)
    known = [token for token in new if token < tokenizer.vocab_size]
    text = tokenizer.decode(known)
    return {"correct": parse_answer(text) == trial.key, "nll": None, "text": text}
