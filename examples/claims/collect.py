"""Write the tables that docs/claims.md needs from what a run of `make claims` left.

python examples/claims/collect.py --run build/claims --output docs/results/claims

With `--stages second` the tables keep what they have of other stages, which another run measured.
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


def _read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _records(run: Path, kind: str) -> Iterable[tuple[str, dict]]:
    for path in sorted(run.glob(f"records/*/{kind}.jsonl")):
        for line in path.read_text().splitlines():
            yield path.parent.name, json.loads(line)


def _stage_of_search(name: str) -> str:
    return "second" if name.startswith(("second", "recovered")) else "first"


def collect(run: Path, output: Path, stages: list[str]) -> None:
    """Write the tables that docs/claims.md needs from what a run left.

    Args:
        run (Path): Its folder.
        output (Path): Of the tables.
        stages (list[str]): Folders of records to be taken from it; the tables keep what they have
            of the others. All of them where this is empty.
    """
    output.mkdir(parents=True, exist_ok=True)

    def is_taken(stage: str) -> bool:
        return not stages or stage in stages

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
        lines = _read_csv(output / f"{kind}.csv")
        lines = [line for line in lines if not is_taken(line["stage"])]
        for (stage, model, factors, length), values in found.items():
            if not is_taken(stage):
                continue
            if isinstance(values, dict):
                values = [values[trial] for trial in sorted(values)]
            cell = {"stage": stage, "model": model, "factors": factors, "length": length}
            lines.append(cell | {"values": " ".join(values)})
        _write_csv(output / f"{kind}.csv", lines)
    lines, versions, date = _read_csv(output / "searches.csv"), {}, ""
    lines = [line for line in lines if not is_taken(_stage_of_search(line["name"]))]
    for path in sorted((run / "factors").glob("*.json")):
        if not is_taken(_stage_of_search(path.stem)):
            continue
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
    path = output / "about.json"
    about = json.loads(path.read_text()) if stages else {"text": text}
    about |= {stage: text for stage in stages}
    path.write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--stages", nargs="+", default=[], help="only these (default: all)")
    args = parser.parse_args()
    collect(args.run, args.output, args.stages)


if __name__ == "__main__":
    main()
