"""Collect the quickstart's text: the Python standard library and its documentation texts.

    python examples/quickstart/collect_text.py --output build/quickstart/text

Real files that are on every machine with Python. Each file goes, by the hash of its name, to
exactly one of train, search and heldout, so that nothing that a search or an evaluation reads was
trained on. Only long files go to search and heldout, which need documents beyond the
longest window.
"""

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

# Tests and generated tables teach a language model little and are not installed everywhere.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "encodings"}
LONG = 40_000  # characters; about 10,000 tokens of the quickstart's vocabulary
MINIMUM = 200


def files(root):
    """Python sources below the standard library, sorted; skipping what no one should learn from."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED & set(relative.parts):
            yield relative, path


def part_of(name, text):
    """train, search or heldout; only long files leave the training part."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    if len(text) < LONG:
        return "train"
    return "search" if share < 0.25 else "heldout" if share < 0.5 else "train"


def main():
    """Write train.jsonl, search.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory")
    args = parser.parse_args()
    root = Path(sysconfig.get_path("stdlib"))
    documents = {"train": [], "search": [], "heldout": []}
    for relative, path in files(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        if relative.parts[0] == "pydoc_data":
            continue
        if len(text) >= MINIMUM:
            documents[part_of(str(relative), text)].append({"id": str(relative), "text": text})
    from pydoc_data.topics import topics  # the language reference, as prose

    for name, text in sorted(topics.items()):
        if len(text) >= MINIMUM:
            documents["train"].append({"id": f"pydoc_data/{name}", "text": text})
    args.output.mkdir(parents=True, exist_ok=True)
    for part, items in documents.items():
        path = args.output / f"{part}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        size = sum(len(item["text"]) for item in items)
        print(f"{path}: {len(items)} documents, {size / 1e6:.2f} million characters")


if __name__ == "__main__":
    main()
