"""Gather what the quickstart's stages measured.

    python examples/quickstart/results.py parity --log build/quickstart/logs/parity.log \
        --output build/quickstart/parity.json
    python examples/quickstart/results.py collect --directory build/quickstart --original 256 \
        --seed 0 --output build/quickstart/results.json
"""

import argparse
import json
import platform
import re
from importlib import metadata
from pathlib import Path

from megatron_longrope import __version__
from megatron_longrope.files import read_json, write_json_atomic

# Windows lie side by side and the last of a document may hold a few tokens only, which an
# unweighted mean over windows would count as much as thousands.
PERPLEXITY = "ppl_token_weighted"
BASELINES = ("none", "pi", "ntk", "yarn")


def read_lines(path: Path) -> list[dict]:
    """Records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def perplexities(output: Path, original: int) -> tuple[dict, dict]:
    """Perplexity by method and length, and the attention-factor policy behind each kept value.

    Baselines were measured under several policies: the better one is kept, for each method and
    length.
    """
    table: dict[str, dict[str, float]] = {}
    policies: dict[str, dict[str, str]] = {}
    for row in read_lines(output / "baselines/ppl.jsonl"):
        # Within the original window all methods are the unchanged model, measured once.
        methods = BASELINES if row["length"] <= original else (row["label"],)
        for method in methods:
            cells, length = table.setdefault(method, {}), str(row["length"])
            if row[PERPLEXITY] < cells.get(length, float("inf")):
                cells[length] = row[PERPLEXITY]
                if row["length"] > original:
                    policies.setdefault(method, {})[length] = row["policy"]
    for name in ("searched", "finetuned"):
        for row in read_lines(output / name / "ppl.jsonl"):
            table.setdefault(row["label"], {})[str(row["length"])] = row[PERPLEXITY]
    return table, policies


def passkey(output: Path) -> dict[str, float]:
    """Share of trials that were right, by length."""
    trials: dict[str, list[bool]] = {}
    for row in read_lines(output / "passkey/passkey.jsonl"):
        trials.setdefault(str(row["length"]), []).append(row["correct"])
    return {length: sum(hits) / len(hits) for length, hits in trials.items()}


def parity(log: Path) -> dict[str, float]:
    """Loss after one optimizer step, with context parallel 1 and 2: the last two runs of a log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    losses = re.findall(r"iteration +2/ .*?lm loss: ([0-9.E+-]+)", text)
    return {"cp1_loss": float(losses[-2]), "cp2_loss": float(losses[-1])}


def seconds(output: Path) -> dict[str, float]:
    """How long the finished stages took, in the order in which they ended; this one not."""
    states = {path.stem: read_json(path) for path in (output / ".recipe/stages").glob("*.json")}
    ended = {
        name: state
        for name, state in states.items()
        if state["finished"] and name not in ("results", "report")
    }
    return {
        name: state["seconds"]
        for name, state in sorted(ended.items(), key=lambda item: item[1]["ended"])
    }


def versions() -> dict[str, str]:
    """What ran."""
    packages = ("megatron-core", "torch", "transformers", "numpy", "sentencepiece")
    return {
        "megatron_longrope": __version__,
        **{name.replace("-", "_"): metadata.version(name) for name in packages},
        "python": platform.python_version(),
    }


def collect(output: Path, original: int, seed: int) -> dict:
    """All results; nothing in them is computed here but the choice of the better policy."""
    table, policies = perplexities(output, original)
    found = passkey(output)
    return {
        "original_length": original,
        "perplexity": table,
        "attention_factor_policy": policies,
        "passkey": found,
        "passkey_trials": len(read_lines(output / "passkey/passkey.jsonl")) // len(found),
        "conversion": read_json(output / "huggingface.json"),
        "cp_parity": read_json(output / "parity.json"),
        "seconds": seconds(output),
        "versions": versions(),
        "seed": seed,
    }


def main() -> None:
    """Write one of the two files."""
    parser = argparse.ArgumentParser(description="Gather what the quickstart's stages measured.")
    actions = parser.add_subparsers(dest="action", required=True)
    loss = actions.add_parser("parity", help="losses of the two runs in a log")
    loss.add_argument("--log", type=Path, required=True)
    everything = actions.add_parser("collect", help="all results")
    everything.add_argument("--directory", type=Path, required=True, help="the recipe's output")
    everything.add_argument("--original", type=int, required=True, help="window in tokens")
    everything.add_argument("--seed", type=int, required=True)
    for action in (loss, everything):
        action.add_argument("--output", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    if args.action == "parity":
        write_json_atomic(args.output, parity(args.log))
    else:
        write_json_atomic(args.output, collect(args.directory, args.original, args.seed))


if __name__ == "__main__":
    main()
