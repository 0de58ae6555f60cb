"""Draw docs/figures/smollm2_135m_passkeys.png from docs/results/smollm2_135m/passkey.csv.

python examples/smollm2_135m/draw_passkeys.py
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {  # by length in tokens, the labels of the records and what they are called
    8192: {
        "none": "no extension",
        "yarn_32k": "YaRN, for 32k",
        "longrope_joint_32k": "LongRoPE, for 32k",  # by ppl it is the same
    },
    16384: {
        "none": "no extension",
        "pi": "PI",
        "ntk": "NTK",
        "yarn": "YaRN",
        "longrope_ppl_full": "LongRoPE by ppl, full",
        "longrope_by_perplexity": "LongRoPE by ppl",
        "longrope": "LongRoPE by joint",
        "longrope_joint_floored": "LongRoPE by joint, also from 2.5",
        "longrope_needle_critical": "LongRoPE by needle, critical",
        "longrope_joint_critical": "LongRoPE by joint, critical",
        "longrope_joint_critical_tuned": "the same, tuned for 10 steps",
        "yarn_32k": "YaRN, for 32k",
        "longrope_ppl_32k": "LongRoPE by ppl, for 32k",
        "longrope_joint_32k": "LongRoPE by joint, for 32k",
    },
    32768: {
        "none": "no extension",
        "pi": "PI",
        "ntk": "NTK",
        "yarn": "YaRN",
        "yarn_su": "YaRN, LongRoPE's attention factor",
        "longrope_ppl_32k": "LongRoPE by ppl",
        "longrope_joint_32k": "LongRoPE by joint",
    },
}

trials = {}
with (DOCS / "results" / "smollm2_135m" / "passkey.csv").open(newline="") as lines:
    for row in csv.DictReader(lines):
        place = int(row["length"]), row["label"], float(row["requested_depth"])
        trials[place] = float(row["answer_nll"]), float(row["accuracy"]) == 1
depths = sorted({depth for _, _, depth in trials})
panels = {
    length: [label for label in names if all((length, label, d) in trials for d in depths)]
    for length, names in ROWS.items()
}
panels = {length: labels for length, labels in panels.items() if labels}
heights = [len(labels) for labels in panels.values()]

figure, all_axes = plt.subplots(
    len(panels),
    figsize=(7.4, 1.0 + 0.4 * len(panels) + 0.36 * sum(heights)),
    gridspec_kw={"height_ratios": heights},
    layout="constrained",
    sharex=True,
    squeeze=False,
)
for axes, (length, labels) in zip(all_axes[:, 0], panels.items(), strict=True):
    losses = [[trials[length, label, depth][0] for depth in depths] for label in labels]
    axes.imshow(losses, norm=LogNorm(0.05, 5), cmap="YlGnBu", aspect="auto")
    for line, label in enumerate(labels):
        for column, depth in enumerate(depths):
            loss, found = trials[length, label, depth]
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
    axes.set_yticks(range(len(labels)), [ROWS[length][label] for label in labels])
    window = ", the model's own window" if length == min(ROWS) else ""
    axes.set_title(f"{length:,} tokens{window}", fontsize=9, loc="left")
all_axes[-1, 0].set_xlabel("Depth of the number in the text (0 % is the beginning)")
figure.suptitle("SmolLM2-135M: loss of a hidden number, nats per token (✓: found)", fontsize=10)
path = DOCS / "figures" / "smollm2_135m_passkeys.png"
figure.savefig(path, dpi=150)
print(f"wrote {path}")
