"""Build Megatron .bin/.idx pairs and their manifests from text, as a stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from megatron_longrope.data.columns import source_size
from megatron_longrope.data.counts import Counts
from megatron_longrope.data.mix import Source
from megatron_longrope.data.parts import Encoder, parts_directory
from megatron_longrope.data.segments import FixedSegments, Packing, WholeDocuments
from megatron_longrope.data.sources import find_source_files
from megatron_longrope.data.stream import DocumentStream, Split
from megatron_longrope.data.tokenizer import Tokenizer, load_tokenizer
from megatron_longrope.data.writer import SetWriter, flush, output_paths, publish
from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import check_folder, read_json, refuse_existing

MANIFEST_SCHEMA = 1


def prepare(
    inputs: Iterable[str | Path | Source],
    output: str | Path,
    tokenizer: str | Path,
    packing: Packing,
    *,
    split: Split | None = None,
    bos: int | None = None,
    text_key: str = "text",
    on_error: str = "fail",
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `output`.bin, `output`.idx and the manifest `output`.json; return the manifest.

    The corpus passes through document by document, so memory does not grow with it, and the same
    inputs give the same bytes on any number of workers. The files appear together at the end, the
    manifest last. Tokens are kept in a hidden folder beside them until then: a run that was cut
    off finds what it had finished.

    Args:
        inputs (Iterable): Source files or directories, or a mix of named sources.
        output (Path): Prefix of the three files.
        tokenizer (Path): sentencepiece `.model` file or Hugging Face folder.
        packing (Packing): Fixed-length segments or whole documents.
        split (Split, optional): What goes to sets beside this one. Defaults to nothing.
        bos (int, optional): Token id that begins segments. Defaults to the tokenizer's, or none.
        text_key (str): Key of the text in JSON lines, or column, of the sources that name none.
            Defaults to "text".
        on_error (str): `fail` stops at an unreadable document, `skip` counts it and goes on.
        workers (int): Processes that tokenize. Defaults to 1, which is this one.
        overwrite (bool): Replace existing output.
        progress (Callable, optional): Is called with source bytes read and in all.

    Raises:
        LongRopeError: An input, the tokenizer or the output is unfit, or nothing is left to write.
    """
    split = split or Split()
    packings = _packings(packing, split)
    paths = {suffix: output_paths(f"{output}{suffix}") for suffix in packings}
    refuse_existing([path for each in paths.values() for path in each], overwrite)
    _refuse_left_beside(output, packings)
    check_folder(Path(output).parent)
    sources: list[Any] = list(inputs)
    if not any(isinstance(item, Source) for item in sources):
        sources = [Source("input", tuple(map(str, sources)))]
    unread: list[Path] = []
    files = [find_source_files(source.paths, unread.append) for source in sources]
    _refuse_shared(sources, files)
    loaded = _load_tokenizer(tokenizer, bos, packings)
    with ExitStack() as stack:
        directory = stack.enter_context(parts_directory(Path(output)))
        sizes = {path: source_size(path) for group in files for path in group}
        stream = DocumentStream(
            sources,
            files,
            Encoder(loaded),
            directory,
            split,
            sum(sizes.values()),
            progress or (lambda done, total: None),
        )
        staged = {key: [directory / f"{path.name}.tmp" for path in paths[key]] for key in paths}
        writers = {
            key: stack.enter_context(SetWriter(staged[key][0], loaded.vocab_size)) for key in paths
        }
        training = stream.training(writers, packings, text_key, on_error == "skip", workers)
        with closing(training):
            writers[""].extend(packing.arrange(training, loaded.bos_id, loaded.eos_id))  # type: ignore[arg-type]
        common = _manifest(loaded, split, stream.counts, unread, sizes)
        manifests = {
            suffix: _finish(writer, staged[suffix], packings[suffix], suffix, common, stream.counts)
            for suffix, writer in writers.items()
        }
        refuse_existing([path for each in paths.values() for path in each], overwrite)
        for files in staged.values():
            flush(files)
        _remove_sample_indices(f"{output}{suffix}" for suffix in packings)
        # Sets beside the main one are published first: its manifest says that all are there.
        publish([(staged[suffix], paths[suffix]) for suffix in reversed(paths)])
        # Those that a training on the old set has built meanwhile.
        _remove_sample_indices(f"{output}{suffix}" for suffix in packings)
    return manifests[""]


def _finish(
    writer: SetWriter,
    staged: Sequence[Path],
    packing: Packing,
    suffix: str,
    common: dict[str, Any],
    counts: Counts,
) -> dict[str, Any]:
    """Complete a set and write its manifest."""
    if not writer.entries:
        raise LongRopeError(_nothing_left(packing, suffix, counts))
    manifest = {
        "schema": MANIFEST_SCHEMA,
        **packing.describe(),
        **common,
        **writer.finish(staged[1]),
    }
    staged[2].write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _packings(packing: Packing, split: Split) -> dict[str, Packing]:
    """How each set is made, by the suffix of its name."""
    packings: dict[str, Packing] = {"": packing}
    if split.held_out:
        packings["_heldout"] = WholeDocuments()
    if split.short is not None:
        if not isinstance(packing, FixedSegments):
            raise LongRopeError(
                "a short window divides training data; it goes with segments, not whole documents"
            )
        packings["_short"] = split.short
    return packings


def _load_tokenizer(
    path: str | Path, bos: int | None, packings: Mapping[str, Packing]
) -> Tokenizer:
    """Load the tokenizer; refuse one that cannot end segments where these packings need it."""
    loaded = load_tokenizer(path, bos)
    if loaded.eos_id is None and any(packing.needs_special_tokens for packing in packings.values()):
        raise LongRopeError(
            f"tokenizer {path} has no EOS token, which ends every segment; name one in its "
            "tokenizer_config.json (eos_token)"
        )
    return loaded


def _manifest(
    loaded: Tokenizer,
    split: Split,
    counts: Counts,
    unread: Sequence[Path],
    files: Mapping[Path, int],
) -> dict[str, Any]:
    """Return what the manifests of all sets say.

    Args:
        unread (Sequence[Path]): What was passed over: hidden files, and those of other kinds.
        files (Mapping[Path, int]): Bytes of the files that were read.
    """
    hidden = sum(path.name.startswith(".") for path in unread)
    return {
        "tokenizer": loaded.path,
        "tokenizer_sha256": loaded.sha256,
        "vocab_size": loaded.vocab_size,
        "bos_id": loaded.bos_id,
        "eos_id": loaded.eos_id,
        "seed": split.seed,
        "held_out": split.held_out,
        "short_window": split.short.window if split.short else None,
        **counts.to_manifest(),
        "hidden_skipped": hidden,
        "other_files": len(unread) - hidden,
        "source_files": [{"path": str(path), "bytes": size} for path, size in files.items()],
    }


def _refuse_shared(sources: Sequence[Source], files: Sequence[Sequence[Path]]) -> None:
    owner: dict[Path, str] = {}
    for source, group in zip(sources, files, strict=True):
        for path in group:
            first = owner.setdefault(path.resolve(), source.name)
            if first != source.name:
                raise LongRopeError(
                    f"{path} belongs to the sources {first!r} and {source.name!r}; put it in one "
                    "of them and repeat it by weight"
                )


def _refuse_left_beside(output: str | Path, packings: Mapping[str, Packing]) -> None:
    """Refuse to write a set beside what an earlier run kept out of it and this one does not."""
    for suffix, key in (("_heldout", "held_out"), ("_short", "short_window")):
        files = output_paths(f"{output}{suffix}")
        if suffix in packings or not all(path.exists() for path in files):
            continue
        # A set of this name that was made by itself holds nothing out.
        content = read_json(files[2])
        if isinstance(content, dict) and content.get(key):
            raise LongRopeError(
                f"{files[2]} and its set are of an earlier run, whose documents would now stand in "
                f"{output} too; remove that set, pass --{key.replace('_', '-')} again, or choose "
                "another name"
            )


def _remove_sample_indices(prefixes: Iterable[str]) -> None:
    """Which tokens make a sample, as trainings on earlier sets of these names left them.

    Megatron finds them by the set's path, whatever is in it, and would cut the new tokens where
    those of another set ended. They go before the new set is in place, so that none is left where
    a run is cut off in between.
    """
    for prefix in prefixes:
        for folder in Path(prefix, "cache").glob("*_indices"):  # of a dataset class each
            shutil.rmtree(folder)


def _nothing_left(packing: Packing, suffix: str, counts: Counts) -> str:
    total = counts.total()
    read = f"none of the {total.documents} documents read"
    longest = f"the longest has {total.longest_document} tokens"
    if suffix == "_heldout":
        return f"{read} is held out; raise --held-out, or leave it out and give a set of its own"
    if packing.mode == "short":
        return f"{read} fits the short window of {packing.window} tokens; raise --short-window"
    if packing.mode == "whole":
        return f"{read} has {packing.min_length} tokens, {longest}; lower --min-length"
    joined = f", {packing.joined} of them joined" if packing.joined > 1 else ""
    return (
        f"{read} fills a segment of {packing.segment_length} tokens{joined}, {longest}; "
        "lower --segment-length, or keep tails with --tail pack"
    )
