"""`longrope eval ppl`: perplexity of models under baselines and factor files."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_longrope.cli import evaluate, options
from megatron_longrope.ranks import rank

_COLUMNS = (
    "model", "label", "policy", "length", "protocol", "stride", "ppl_window_mean",
    "ppl_token_weighted", "num_windows", "num_tokens", "sha256", "seconds",
)  # fmt: skip


def add_parser(kinds) -> None:
    """Register `eval ppl`."""
    parser = kinds.add_parser(
        "ppl",
        help="perplexity at several lengths, for baselines and factor files",
        description="Perplexity by the paper's definition: BOS (where the tokenizer has one) "
        "before every window, unweighted "
        "mean over windows; the token-weighted mean is given beside it. One window per document "
        "(`truncated`) unless --stride is given.",
    )
    evaluate.add_common(parser)
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--data",
        required=True,
        metavar="PREFIX|TEXT",
        help="held-out documents: a prepared set, or a .txt, .jsonl or .jsonl.gz file or directory",
    )
    evaluate.add_tokenizer(group)
    group.add_argument(
        "--num-documents",
        type=int,
        default=10,
        metavar="K",
        help="the first K documents that fill the longest window (default: 10)",
    )
    group.add_argument(
        "--stride",
        type=_stride,
        metavar="S",
        help="slide by S tokens (`sliding`; beyond the window `sampled`), or `disjoint`: windows "
        "side by side, so that every length scores the same tokens (default: one window per "
        "document, `truncated`)",
    )
    group.add_argument(
        "--baselines",
        # Those of frequencies.METHODS, which would import torch to print a help text.
        type=options.choices("none", "pi", "ntk", "yarn", "dynamic-ntk", "base-ntk"),
        default=[],
        metavar="LIST",
        help="published methods to measure: none,pi,ntk,yarn,dynamic-ntk,base-ntk; on a model with "
        "factors they multiply those of its longest window",
    )
    group.add_argument(
        "--attention-factor-policy",
        type=options.choices("su", "yarn", "none"),
        metavar="LIST",
        help="attention-factor policies of the baselines: su,yarn,none (default: each method's "
        "own, yarn for YaRN and none for the others, on top of what the model has)",
    )
    group.add_argument(
        "--original-length",
        type=options.length,
        metavar="N",
        help="pre-trained window of the baselines in tokens (default: from the checkpoint)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from megatron_longrope.evaluation.perplexity import perplexity
    from megatron_longrope.evaluation.records import write_csv
    from megatron_longrope.evaluation.scored_documents import is_prepared, read_scored_documents
    from megatron_longrope.evaluation.subjects import check_tokenizer_fits, open_models

    models = open_models(args.load, args.hf, args.iteration, args.sliding_window)
    subjects = [item for model in models for item in _subjects(args, model)]
    # A prepared set knows its tokenizer; a model's folder may hold the same one in another form.
    tokenizer = args.tokenizer if is_prepared(args.data) else evaluate.own_tokenizer_path(args)
    documents = read_scored_documents(
        args.data, tokenizer, max(args.lengths), args.num_documents, args.bos
    )
    check_tokenizer_fits(documents.vocab_size, f"the tokenizer of {args.data}", models)
    cells = [_cell(args, length, subject, documents) for length, subject in subjects]
    session = evaluate.open_session(args, "ppl", "windows")
    if rank() == 0:
        print(f"lengths: {', '.join(map(str, args.lengths))} tokens", flush=True)

    def measure(engine, cell, on_window) -> dict:
        length = cell.fields["length"]
        result = perplexity(
            engine.nll,
            documents.tokens,
            documents.bos_id,
            length,
            stride=_stride_at(args, length),
            on_window=on_window,
        )
        return result.to_dict()

    session.run_each(cells, measure)
    if rank() == 0:
        _print_table([session.records.find(cell.record) for cell in cells])
        write_csv(Path(args.output) / "ppl.csv", session.records.rows, _COLUMNS)
        print(f"wrote {session.records.path} and ppl.csv beside it")


def _stride(text: str) -> int | str:
    return text if text == "disjoint" else options.length(text)


def _stride_at(args: argparse.Namespace, length: int) -> int | None:
    return length - 1 if args.stride == "disjoint" else args.stride


def _subjects(args: argparse.Namespace, model) -> Iterator[tuple[int, object]]:
    """(length, subject) of one model; lengths that its factors do not cover are refused."""
    from megatron_longrope.baselines import OWN_POLICIES, extended_config
    from megatron_longrope.evaluation.subjects import Subject, subjects_of

    if args.longrope_config or not args.baselines:
        for subject in subjects_of(model, args.longrope_config):
            subject.check_lengths(args.lengths)
            for length in args.lengths:
                yield length, subject
    if not args.baselines:
        return
    base = _base(args, model)
    plain = base.max_length == base.original_max_position_embeddings
    if not plain and rank() == 0:
        print(f"{model.label}: baselines multiply its factors for {base.max_length} tokens")
    first = True
    for method in args.baselines:
        for policy in args.attention_factor_policy or [None]:
            name = policy or (OWN_POLICIES.get(method, "none") if plain else None)
            for length in args.lengths:
                # Within the base's window every method is the model as it was trained.
                if length > base.max_length or first:
                    config = extended_config(method, base, length, name)
                    yield length, Subject(model, method, config, policy=name)
            first = False


def _base(args: argparse.Namespace, model):
    """What the baselines extend: the model's factors, or its pre-trained window.

    Raises:
        ValueError: --original-length contradicts the model's factors.
    """
    from megatron_longrope.config import identity_config

    base, shape = model.config(), model.checkpoint.shape
    original = args.original_length or base.original_max_position_embeddings
    if model.checkpoint.longrope is None:
        return identity_config(shape.rotary_base, shape.rotary_dim, original)
    if original != base.original_max_position_embeddings:
        raise ValueError(
            f"--original-length {original} contradicts the factors of {model.path}, which were "
            f"made for {base.original_max_position_embeddings}; leave it out"
        )
    return base


def _cell(args: argparse.Namespace, length: int, subject, documents):
    from megatron_longrope.data.tokenizer import bos_name, bos_prefix
    from megatron_longrope.evaluation.perplexity import planned_windows, protocol_of
    from megatron_longrope.evaluation.session import Cell

    stride = _stride_at(args, length)
    front = len(bos_prefix(documents.bos_id))
    lengths = [len(tokens) for tokens in documents.tokens]
    spans = planned_windows(lengths, length, stride, bos=bool(front))
    return Cell(
        subject,
        {
            "length": length,
            "protocol": protocol_of(length, stride),
            "requested_stride": args.stride,
            "sources": f"{documents.source}:{len(documents.tokens)}",
            "documents_sha256": documents.sha256,
            "bos": bos_name(documents.bos_id),
            "requested_bos": args.bos,
        },
        Counter(span.end - span.start + front for _, span in spans),
    )


def _print_table(rows) -> None:
    """Both means: the paper's over windows, and the one over tokens."""
    names = [_name(row) for row in rows]
    width = max(map(len, names)) + 2
    print(f"{'':{width}}{'length':>9}{'window mean':>14}{'token mean':>14}  protocol")
    for name, row in zip(names, rows, strict=True):
        print(
            f"{name:{width}}{row['length']:>9}{_shown(row['ppl_window_mean'])}"
            f"{_shown(row['ppl_token_weighted'])}  {row['protocol']}, {row['num_windows']} windows"
        )


def _name(row) -> str:
    policy = f" ({row['policy']})" if row["policy"] else ""
    return f"{row['model']}: {row['label']}{policy}"


def _shown(value: float | None) -> str:
    return f"{'not finite':>14}" if value is None else f"{value:14.4f}"
