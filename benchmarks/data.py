"""Preparing data: tokens per second of `prepare` against Megatron's own per-document approach.

    python benchmarks/data.py            # 32 MB of text, two workers, three rounds
    python benchmarks/data.py --quick    # 8 MB, one round

Asked: what segments with BOS and EOS, resumption and a manifest cost beside the plain documents of
Megatron's `preprocess_data.py` at the same number of workers.

`ours` is `prepare` with fixed segments and packed tails. `megatron` is what that script does, which
is not part of the wheel: a pool of processes maps one line of JSON at a time (chunks of 32) to one
encode of the document and an EOD, and the main process appends each with
`IndexedDatasetBuilder.add_document`. Both read the same file with the same sentencepiece model and
pay for starting their workers; the script forks them, `prepare` forks them from a fresh process,
whose imports take seconds and weigh on the first round. Seconds are wall time. The two outputs are
checked to hold the same tokens but for BOS and EOS.

The text is Python's standard library, files joined to documents of at least 100,000 characters, as
in a corpus of long documents, repeated as often as it takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

import measure
import numpy as np
import torch
from train_tokenizer import train_sentencepiece

from megatron_longrope.data.documents import read_documents
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments
from megatron_longrope.data.tokenizer import Tokenizer, load_tokenizer

DOCUMENT_CHARACTERS = 100_000
SEGMENT_LENGTH = 4096
CHUNK = 32  # lines that a worker of the baseline takes at a time

_tokenizer: Tokenizer | None = None


def start_worker(path: str) -> None:
    """Load the tokenizer of a worker of the baseline."""
    global _tokenizer
    _tokenizer = load_tokenizer(path)


def encode_line(line: str) -> tuple[list[int], int]:
    """Token ids of one line of JSON, EOD behind them, and the bytes of the line."""
    assert _tokenizer is not None and _tokenizer.eos_id is not None
    ids = _tokenizer.encode(json.loads(line)["text"])
    return [*ids, _tokenizer.eos_id], len(line)


def prepare_as_megatron(corpus: Path, output: Path, tokenizer: Path, workers: int) -> None:
    """One encode per document in a pool, `add_document` in this process."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = load_tokenizer(tokenizer).vocab_size
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.Pool(workers, start_worker, (str(tokenizer),)) as pool,
    ):
        for ids, _ in pool.imap(encode_line, lines, CHUNK):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{output}.idx")


def documents(size: int) -> Iterator[str]:
    """About `size` characters of the standard library, in long documents."""
    parts: list[str] = []
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    written = 0
    for path in cycle(files):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, parts)) >= DOCUMENT_CHARACTERS:
            text = "\n".join(parts)
            written += len(text)
            # A number makes repetitions differ, so that no part is found again.
            yield f"# {written}\n{text}"
            parts = []
            if written >= size:
                return


def tokens_in(prefix: Path, special: Sequence[int | None]) -> np.ndarray:
    """All tokens of a set, special ones left out, sorted."""
    stored = np.concatenate(read_documents(prefix))
    return np.sort(stored[~np.isin(stored, special)])


def run(megabytes: float, workers: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Time both and compare what they wrote."""
    corpus, model = folder / "corpus.jsonl", folder / "x.model"
    with corpus.open("w", encoding="utf-8") as file:
        for text in documents(int(megabytes * 1e6)):
            file.write(json.dumps({"text": text}) + "\n")
    train_sentencepiece(islice(documents(10**6), 10), model, 8000)
    sets = {name: folder / name / "set" for name in ("ours", "megatron")}

    def clear() -> None:
        for prefix in sets.values():
            shutil.rmtree(prefix.parent, ignore_errors=True)
            prefix.parent.mkdir()

    def ours() -> None:
        recipe = FixedSegments(SEGMENT_LENGTH, "pack")
        prepare([corpus], sets["ours"], model, recipe, workers=workers)

    def megatron() -> None:
        prepare_as_megatron(corpus, sets["megatron"], model, workers)

    # Checked beside the clock, which also warms the page cache.
    clear()
    ours()
    megatron()
    tokenizer = load_tokenizer(model)
    special = (tokenizer.bos_id, tokenizer.eos_id)
    stored = {name: tokens_in(prefix, special) for name, prefix in sets.items()}
    if not np.array_equal(stored["ours"], stored["megatron"]):
        raise RuntimeError("the two ways hold different tokens; the comparison means nothing")

    arms = {"ours": ours, "megatron": megatron}
    seconds = measure.sample_interleaved(arms, repeats, warmup=0, prepare=clear)
    count = len(stored["ours"])
    return {
        "tokens": count,
        "seconds": seconds,
        "quartiles": measure.paired_ratios(seconds["ours"], seconds["megatron"]),
        "tokens_per_s": {name: count / float(np.median(seconds[name])) for name in arms},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="8 MB of text, one round")
    parser.add_argument("--megabytes", type=float, help="size of the text in MB")
    parser.add_argument("--workers", type=int, default=2, help="processes of both (default: 2)")
    parser.add_argument("--repeats", type=int, help="rounds that count")
    options = parser.parse_args()
    megabytes = options.megabytes or (8.0 if options.quick else 32.0)
    repeats = options.repeats or (1 if options.quick else 3)

    torch.set_num_threads(1)
    measure.print_environment()
    with tempfile.TemporaryDirectory() as folder:
        result = run(megabytes, options.workers, repeats, Path(folder))
    rate = result["tokens_per_s"]
    measure.print_table(
        ("", "seconds (median)", "tokens/s"),
        [
            (name, f"{np.median(result['seconds'][name]):.2f}", f"{rate[name]:,.0f}")
            for name in rate
        ],
    )
    measure.finish(
        "data",
        result["quartiles"][1],
        full_run=not (options.quick or options.megabytes or options.repeats)
        and options.workers == 2,
        ratio_of="wall seconds for the same text at equal workers, their start included",
        megabytes=megabytes,
        workers=options.workers,
        **result,
    )


if __name__ == "__main__":
    main()
