"""Every GPU part, each in a process of its own with a time limit; results are written as they come.

    python benchmarks/gpu/run.py OUT [--quick] [--only PART ...]

run.sh calls it after it has put the wheels that lie beside it on the path. OUT gets PART.jsonl,
PART.log and summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Script and arguments, and seconds that it may take on one H200: 8 minutes in all.
PARTS = {
    "kernels": (("kernels.py",), 45),
    "evaluation": (("engine.py", "evaluation"), 90),
    "train_step": (("train_step.py",), 210),
    "plan_peaks": (("plan_peaks.py",), 60),
    "passkey": (("engine.py", "passkey"), 70),
}
# Not among them: a call of its own with one step.
EXTRA = {
    "train_256k": (("train_step.py", "--lengths", "256k", "--steps", "1", "--warm-up", "0"), 300)
}


def run_part(name: str, output: Path, quick: bool) -> dict:
    """Run one part; says how it ended, in seconds and results."""
    (script, *arguments), limit = (PARTS | EXTRA)[name]
    results = output / f"{name}.jsonl"
    command = [sys.executable, str(HERE / script), *arguments, "--output", str(results)]
    if quick:
        command += ["--quick"]
    started = time.monotonic()
    with (output / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=None if quick else limit
            ).returncode
            ended = "done" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {limit} s"
    count = len(results.read_text().splitlines()) if results.exists() else 0
    seconds = round(time.monotonic() - started, 1)
    return {"part": name, "ended": ended, "seconds": seconds, "results": count}


def main() -> int:
    """Run the parts; 0 when all are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="toy sizes, on the CPU if need be")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *EXTRA], default=list(PARTS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    summary = []
    for name in options.only:
        summary.append(run_part(name, options.output, options.quick))
        print(json.dumps(summary[-1]), flush=True)
        (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if all(part["ended"] == "done" for part in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
