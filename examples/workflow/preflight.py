"""Name in a minute what would stop a recipe after days: data, tasks, disk, memory, kernels.

    make preflight RECIPE=llama2_7b
    snakemake -s examples/llama3_8b/Snakefile --cores 1 preflight

Reads the commands of all rules, as plan.py does, and looks at what they will need. Run it where the
recipe will run: files, free space, kernels and GPUs are those of this machine.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plan

from megatron_longrope.cli.flags import read_flags
from megatron_longrope.data.options import PrepareOptions
from megatron_longrope.data.sources import SkippedDocument
from megatron_longrope.data.tokenization import Skips
from megatron_longrope.errors import LongRopeError
from megatron_longrope.lengths import format_length, parse_length
from megatron_longrope.plan import NotCoveredError
from megatron_longrope.plan.flags import parse
from megatron_longrope.plan.hardware import GIB

SECONDS_PER_SET = 10  # of reading text, until enough long documents were seen
MOST_SKIPS = 1000  # documents of a source that cannot be read, before the first that can
SAMPLE = 20  # documents whose tokens are counted, to know the characters of a token
BYTES_PER_PARAMETER = 14  # of a checkpoint: the weights in bf16, in fp32, and Adam's two moments


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    verdict: str
    """`ok`, `look` (it may work) or `FAIL`."""
    subject: str
    """The rule or the file."""
    text: str
    """What was found, and what helps."""


def examine(commands: Sequence[plan.Command], config: dict[str, Any]) -> Iterator[Finding]:
    """Look at everything that the commands of a recipe need.

    Args:
        commands (Sequence[plan.Command]): Of all rules.
        config (dict): The recipe's whole configuration.
    """
    for command in commands:
        words = command.words
        if words[1:3] == ("convert", "from-hf"):
            yield from _model(Path(words[words.index("--hf") + 1]))
        elif words[1:3] == ("data", "prepare"):
            yield _texts(command, commands)
        elif words[1:3] == ("eval", "short"):
            yield _tasks(command)
        elif words[1] == "pretrain":
            found = Path(words[2]).is_file()
            yield Finding(
                "ok" if found else "FAIL",
                command.rule,
                f"script {words[2]}"
                if found
                else f"`script` of the settings does not exist: {words[2]}; it is "
                "pretrain_gpt.py of a Megatron-LM checkout",
            )
    yield from _memory(commands, config.get("gpu", "h100"))
    yield _disk(commands, Path(config["output"]))
    yield from _kernels(config)


def _model(folder: Path) -> Iterator[Finding]:
    if not (folder / "config.json").is_file():
        text = f"`hf` of the settings is the base model's folder; {folder} is none"
        yield Finding("FAIL", "hf", text)
        return
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    size = sum(path.stat().st_size for path in weights) / GIB
    if weights:
        yield Finding("ok", "hf", f"{folder}: {len(weights)} files of weights, {size:.1f} GiB")
    else:
        yield Finding("FAIL", "hf", f"{folder} has no weights; download the whole repository")
    from megatron_longrope.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        yield Finding("FAIL", "hf", f"tokenizer: {error}")
    else:
        yield Finding("ok", "hf", f"tokenizer of {tokenizer.vocab_size} tokens")


def _texts(command: plan.Command, commands: Sequence[plan.Command]) -> Finding:
    """Whether the sources have enough documents of the lengths that are read, or enough tokens."""
    from megatron_longrope.data.sources import find_source_files, iterate_documents
    from megatron_longrope.data.tokenizer import load_tokenizer

    options = read_flags(PrepareOptions, command.args)
    needs = _documents_of(options, commands) if options.whole_documents else {}
    # With --short-window two sets come of the same texts.
    sets = (options.output, f"{options.output}_short")
    wanted_tokens = 0 if options.whole_documents else sum(_tokens_of(x, commands) for x in sets)
    documents, tokens, read = dict.fromkeys(needs, 0), 0.0, 0
    ends, per_token, sampled = time.monotonic() + SECONDS_PER_SET, 4.0, [0, 0]
    complete, skips = True, Skips()

    def skip(item: SkippedDocument) -> None:
        skips.add(item)
        if in_source == 0 and skips.count >= MOST_SKIPS:
            raise LongRopeError(f"source {source.name!r}: {_unread(skips)}")

    def enough() -> bool:
        return wanted_tokens <= tokens and all(documents[size] >= needs[size] for size in needs)

    try:
        tokenizer = load_tokenizer(options.tokenizer)
        for source in options.sources():
            in_source, skips = 0, Skips()
            for document in iterate_documents(
                find_source_files(source.paths),
                source.text_key or options.text_key,
                on_skip=skip if options.on_error == "skip" else None,
            ):
                in_source, read = in_source + 1, read + 1
                if read <= SAMPLE:
                    head = document.text[:20_000]  # all of a book takes longer and says no more
                    sampled[0] += len(head)
                    sampled[1] += len(tokenizer.encode(head))
                    per_token = sampled[0] / max(sampled[1], 1)
                length = len(document.text) / per_token
                tokens += length
                for size in needs:
                    documents[size] += length >= size
                complete = time.monotonic() <= ends
                if enough() or not complete:  # of the other sources one document each
                    break
            if not in_source:
                return Finding("FAIL", command.rule, f"source {source.name!r}: {_unread(skips)}")
    except (ValueError, OSError) as error:
        return Finding("FAIL", command.rule, str(error))
    if options.whole_documents:
        # Of several lengths the one that most is missing of.
        size = min(needs, key=lambda size: documents[size] - needs[size])
        seen = f"{documents[size]} documents of about {format_length(size)} tokens or more"
        want = f"{needs[size]} are needed"
    else:
        seen, want = f"about {tokens:.3g} tokens", f"training reads {wanted_tokens:.3g}"
    if enough():
        return Finding("ok", command.rule, f"{seen} seen, {want}")
    if not complete:
        return Finding(
            "look", command.rule, f"{seen} in the first {SECONDS_PER_SET} s of reading; {want}"
        )
    if options.whole_documents:
        return Finding("FAIL", command.rule, f"{seen}, {want}; add longer ones (docs/datasets.md)")
    return Finding("look", command.rule, f"{seen}, {want}: it will see them several times")


def _unread(skips: Skips) -> str:
    if not skips.count:
        return "it holds no document"
    return f"none of {skips.count} documents can be read, such as {skips.listed[0]}"


def _documents_of(options: PrepareOptions, commands: Sequence[plan.Command]) -> dict[int, int]:
    """The most documents that a search or an evaluation takes from a set, by their least length."""
    shortest = options.min_length or 1
    counts = {shortest: 0}
    for command in commands:
        if command.words[1] not in ("search", "eval") or command.words[2] == "short":
            continue
        args = command.args
        if options.output in (getattr(args, "data", None), getattr(args, "held_out", None)):
            if command.words[1] == "search":
                length = args.target_length * args.windows_per_document
                count = args.num_samples
            else:
                length, count = max(args.lengths), args.num_documents
            length = max(length, shortest)
            counts[length] = max(counts.get(length, 0), count)
    return counts


def _tokens_of(prefix: str, commands: Sequence[plan.Command]) -> float:
    """Tokens that the trainings on a set read."""
    total = 0.0
    for command in commands:
        words = command.words
        if command.words[1] == "pretrain" and prefix in words:
            steps, batch, length = (
                parse_length(words[len(words) - 1 - words[::-1].index(flag) + 1])
                for flag in ("--train-iters", "--global-batch-size", "--seq-length")
            )
            before = words[words.index(prefix) - 1]  # a blend gives each set a share
            share = float(before) if before.replace(".", "", 1).isdigit() else 1.0
            total += share * steps * batch * length
    return total


def _tasks(command: plan.Command) -> Finding:
    from megatron_longrope.evaluation.harness_tasks import check_tasks, parse_tasks

    try:
        specs = parse_tasks(command.args.tasks)
        loaded = check_tasks(specs, include_path=command.args.include_path)
    except ValueError as error:
        return Finding("FAIL", command.rule, str(error))
    names = ", ".join(task.spec.name for task in loaded)
    return Finding("ok", command.rule, f"{names}: found, with their data")


def _memory(commands: Sequence[plan.Command], gpu: str) -> Iterator[Finding]:
    for command in commands:
        if estimate := plan.ESTIMATES.get(command.words[1]):
            try:
                cost = estimate(command, gpu, commands)
            except ValueError as error:
                if command.words[1] != "eval":
                    verdict = "look" if isinstance(error, NotCoveredError) else "FAIL"
                    yield Finding(verdict, command.rule, str(error))
                continue
            if not cost.fits:
                yield Finding(
                    "FAIL",
                    command.rule,
                    f"{cost.peak_bytes / GIB:.1f} GiB a {gpu} ({cost.note}) do not fit; "
                    "`longrope plan` says what would",
                )


def _disk(commands: Sequence[plan.Command], output: Path) -> Finding:
    """Checkpoints are nearly all that a recipe writes."""
    size = largest = 0
    for command in commands:
        words = command.words
        if words[1] != "pretrain":
            continue
        try:
            model, _, _ = parse(words, command.gpus)
        except NotCoveredError as error:
            return Finding("look", "disk", f"the size of checkpoints is unknown: {error}")
        steps = int(words[words.index("--train-iters") + 1])
        flag = "--save-retain-interval" if "--save-retain-interval" in words else "--save-interval"
        kept = steps // int(words[words.index(flag) + 1]) + 2  # the last, and one being written
        size += kept * BYTES_PER_PARAMETER * model.parameters
        largest = 6 * model.parameters  # the base as a checkpoint, and the export
    size += largest
    folder = output
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = (
        f"checkpoints of about {size / 1e12:.2g} TB; {free / 1e12:.2g} TB are free below {folder}"
    )
    if size <= free:
        return Finding("ok", "disk", text)
    return Finding("FAIL", "disk", f"{text}; raise --save-retain-interval or move `output`")


def _kernels(config: dict[str, Any]) -> Iterator[Finding]:
    from megatron_longrope.checkup import examine as examine_machine

    found = examine_machine()
    for problem in found.problems:
        yield Finding("FAIL", "doctor", problem)
    if config.get("device") == "--cpu":
        return
    if not found.gpu:
        yield Finding("look", "doctor", "no GPU here; run this on a node that has the GPUs")
    else:
        choices = ", ".join(f"{where}: {choice}" for where, choice in found.attention.items())
        yield Finding("ok", "doctor", f"{found.gpu}; attention {choices}")


def main() -> int:
    """Print what was found; 1 if the recipe would fail."""
    snakefile, config = sys.argv[1], json.loads(sys.argv[2])
    commands = plan.list_commands(snakefile, config)
    verdicts = []
    for finding in examine(commands, config):
        print(f"{finding.verdict:<5} {finding.subject:<20} {finding.text}", flush=True)
        verdicts.append(finding.verdict)
    failed = verdicts.count("FAIL")
    print(f"\n{failed} would stop the recipe" if failed else "\nnothing would stop the recipe")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.pop("SNAKEMAKE_PROFILE", None)  # the one of the outer Snakemake must not count
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"preflight: error: {error}")
