"""Write the tables that docs/claims.md needs from what a run of `make claims` left.

python examples/claims/collect.py --run build/claims --output docs/results/claims
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def _write_csv(path: Path, lines: list[dict]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _records(run: Path, kind: str) -> Iterable[tuple[str, dict]]:
    for path in sorted(run.glob(f"records/*/{kind}.jsonl")):
        for line in path.read_text().splitlines():
            yield path.parent.name, json.loads(line)


def collect(run: Path, output: Path) -> None:
    """Write the tables that docs/claims.md needs from what a run left.

    Args:
        run (Path): Its folder.
        output (Path): Of the tables.
    """
    output.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict] = {"perplexity": {}, "passkey": defaultdict(dict)}
    for stage, row in _records(run, "ppl"):
        name = row["label"] if stage != "tuned" else row["model"]
        # Of windows side by side a document's last may hold four tokens.
        values = [f"{value:.6f}" for value in row["nll_per_document_token_weighted"]]
        cells["perplexity"][stage, row["model"], name, row["length"]] = values
    for stage, row in _records(run, "passkey"):
        name = row["label"] if stage != "tuned" else row["model"]
        trials = cells["passkey"][stage, row["model"], name, row["length"]]
        trials[row["trial"]] = str(int(row["correct"]))
    for kind, found in cells.items():
        lines = []
        for (stage, model, factors, length), values in found.items():
            if isinstance(values, dict):
                values = [values[trial] for trial in sorted(values)]
            cell = {"stage": stage, "model": model, "factors": factors, "length": length}
            lines.append(cell | {"values": " ".join(values)})
        _write_csv(output / f"{kind}.csv", lines)
    lines, versions, date = [], {}, ""
    for path in sorted((run / "factors").glob("*.json")):
        sets = json.loads(path.read_text())["factor_sets"]
        # A recovery's factors are the shortest set, and the others are those of earlier searches.
        origin = sets[0 if path.stem.startswith("recovered") else -1]["origin"]
        if "search_perplexity" not in origin and "evaluations" not in origin:
            continue
        line = {"name": path.stem, "evaluations": origin["evaluations"]}
        line |= {
            "sample_forwards": origin["sample_forwards"],
            "search": origin["search_perplexity"],
        }
        line |= {f"seed_{key}": value for key, value in origin["seed_perplexity"].items()}
        held_out = origin.get("held_out_perplexity") or {}
        line |= {f"held_out_{key}": value for key, value in held_out.items()}
        lines.append(line)
        versions, date = origin["versions"], max(date, origin["date"])
    _write_csv(output / "searches.csv", lines)
    versions = ", ".join(f"{name} {value}" for name, value in versions.items())
    tracker = run / "checkpoints/base/latest_checkpointed_iteration.txt"
    steps = tracker.read_text().strip()
    text = (
        f"It was trained for {steps} steps. Measured on {date}, {os.cpu_count()} CPU "
        f"cores, Python {sys.version.split()[0]}, {versions}, transformers "
        f"{importlib.metadata.version('transformers')}."
    )
    (output / "about.json").write_text(json.dumps({"text": text}, indent=1) + "\n")


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    args = parser.parse_args()
    collect(args.run, args.output)


if __name__ == "__main__":
    main()
