"""Gather what the quickstart's stages measured into results.json."""

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


def parity(output: Path) -> dict[str, float]:
    """Loss after one optimizer step, with context parallel 1 and 2."""
    log = (output / "logs/parity.log").read_text(encoding="utf-8", errors="replace")
    losses = re.findall(r"iteration +2/ .*?lm loss: ([0-9.E+-]+)", log)
    return {"cp1_loss": float(losses[-2]), "cp2_loss": float(losses[-1])}


def versions() -> dict[str, str]:
    """What ran."""
    packages = ("megatron-core", "torch", "transformers", "numpy", "sentencepiece")
    return {
        "megatron_longrope": __version__,
        **{name.replace("-", "_"): metadata.version(name) for name in packages},
        "python": platform.python_version(),
    }


def write_results(output: Path, original: int, seed: int, seconds: dict[str, float]) -> None:
    """Write results.json; nothing in it is computed here but the choice of the better policy."""
    table, policies = perplexities(output, original)
    found = passkey(output)
    write_json_atomic(
        output / "results.json",
        {
            "original_length": original,
            "perplexity": table,
            "attention_factor_policy": policies,
            "passkey": found,
            "passkey_trials": len(read_lines(output / "passkey/passkey.jsonl")) // len(found),
            "conversion": read_json(output / "huggingface.json"),
            "cp_parity": parity(output),
            "seconds": seconds,
            "versions": versions(),
            "seed": seed,
        },
    )
