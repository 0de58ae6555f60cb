"""Draw docs/figures/smollm2_135m_passkeys.png from docs/results/smollm2_135m/passkey.csv.

python examples/smollm2_135m/draw_passkeys.py
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {  # (label, length): what it is called
    ("none", 8192): "no extension, at 8k",
    ("none", 16384): "no extension",
    ("pi", 16384): "PI",
    ("ntk", 16384): "NTK",
    ("yarn", 16384): "YaRN",
    ("longrope_by_perplexity", 16384): "LongRoPE by perplexity",
    ("longrope", 16384): "LongRoPE by joint",
    ("longrope_joint_floored", 16384): "LongRoPE by joint, also from 2.5",
    ("longrope_needle_critical", 16384): "LongRoPE by needle, critical",
    ("longrope_joint_critical", 16384): "LongRoPE by joint, critical",
    ("longrope_joint_critical_tuned", 16384): "the same, tuned for 10 steps",
}

trials = {}
with (DOCS / "results" / "smollm2_135m" / "passkey.csv").open(newline="") as lines:
    for row in csv.DictReader(lines):
        place = (row["label"], int(row["length"])), float(row["requested_depth"])
        trials[place] = float(row["answer_nll"]), float(row["accuracy"]) == 1
depths = sorted({depth for _, depth in trials})
rows = {key: name for key, name in ROWS.items() if (key, 0.5) in trials}

figure, axes = plt.subplots(figsize=(7.4, 0.9 + 0.36 * len(rows)), layout="constrained")
losses = [[trials[key, depth][0] for depth in depths] for key in rows]
axes.imshow(losses, norm=LogNorm(0.05, 5), cmap="YlGnBu", aspect="auto")
for line, key in enumerate(rows):
    for column, depth in enumerate(depths):
        loss, found = trials[key, depth]
        axes.text(
            column,
            line,
            f"{loss:.2f}" + (" ✓" if found else ""),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if found else "normal",
            color="white" if loss > 1 else "black",
        )
axes.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
axes.set_yticks(range(len(rows)), rows.values())
axes.set_xlabel("Depth of the number in the text (0 % is the beginning), 16,384 tokens")
axes.set_title("SmolLM2-135M: loss of a hidden number, nats per token (✓: found)", fontsize=10)
path = DOCS / "figures" / "smollm2_135m_passkeys.png"
figure.savefig(path, dpi=150)
print(f"wrote {path}")
