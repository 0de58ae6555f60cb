"""Gather what the quickstart measured beside its evaluations, for the end of the report.

    python examples/quickstart/facts.py parity --log build/quickstart/logs/parity.log \
        --output build/quickstart/parity.json
    python examples/quickstart/facts.py collect --directory build/quickstart --seed 0 \
        --output build/quickstart/facts.json
"""

import argparse
import platform
import re
from importlib import metadata
from pathlib import Path

from megatron_longrope import __version__
from megatron_longrope.files import read_json, write_json_atomic

NAMES = {
    "max_abs_logit_diff_short": "Largest logit difference, short window",
    "max_abs_logit_diff_long": "Largest logit difference, long window",
    "perplexity_transformers": "Perplexity in transformers",
    "perplexity_megatron": "Perplexity in Megatron",
    "greedy_agreement_across_switch": "Greedy tokens equal across the switch of windows",
    "generated_across_switch": "Text across the switch of windows",
    "cp1_loss": "Loss on 1 context-parallel rank",
    "cp2_loss": "Loss on 2 context-parallel ranks",
}
PACKAGES = ("megatron-core", "torch", "transformers", "numpy", "sentencepiece")


def parity(log: Path) -> dict[str, float]:
    """Loss after one optimizer step, with context parallel 1 and 2: the last two runs of a log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    losses = re.findall(r"iteration +2/ .*?lm loss: ([0-9.E+-]+)", text)
    return {"cp1_loss": float(losses[-2]), "cp2_loss": float(losses[-1])}


def named(path: Path) -> dict:
    """A JSON file with its keys in words."""
    return {NAMES[key]: value for key, value in read_json(path).items()}


def collect(output: Path, seed: int) -> dict:
    """Facts by title, as `longrope report` reads them."""
    return {
        "Export to Hugging Face": named(output / "huggingface.json"),
        "Context parallelism": named(output / "parity.json"),
        "Versions and seed": {
            "megatron-longrope": __version__,
            **{name: metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "seed": seed,
        },
    }


def main() -> None:
    """Write one of the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    loss = actions.add_parser("parity", help="losses of the two runs in a log")
    loss.add_argument("--log", type=Path, required=True)
    everything = actions.add_parser("collect", help="all facts")
    everything.add_argument("--directory", type=Path, required=True, help="the walk's output")
    everything.add_argument("--seed", type=int, required=True)
    for action in (loss, everything):
        action.add_argument("--output", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    if args.action == "parity":
        write_json_atomic(args.output, parity(args.log))
    else:
        write_json_atomic(args.output, collect(args.directory, args.seed))


if __name__ == "__main__":
    main()
