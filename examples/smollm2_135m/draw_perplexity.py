"""Draw docs/figures/smollm2_135m_perplexity.png from docs/results/smollm2_135m/five_books.csv.

python examples/smollm2_135m/draw_perplexity.py
"""

import csv
from collections import defaultdict
from math import exp, log
from pathlib import Path
from statistics import fmean

from megatron_longrope.evaluation.figure import Lines
from megatron_longrope.evaluation.series import Identity, Series
from megatron_longrope.lengths import format_length
from megatron_longrope.report.figures import draw
from megatron_longrope.report.style import series_styles

DOCS = Path(__file__).parents[2] / "docs"
WINDOW, EXTENDED = 8192, 32768
NAMES = {  # labels of the records; those that reports know, for the colours; names
    "none": ("none", "No extension"),
    "yarn_32k": ("yarn", "YaRN"),
    "longrope_joint_32k": ("joint", "LongRoPE by joint"),
    "longrope_ppl_32k": ("longrope", "LongRoPE by perplexity"),
}
CEILING = 40  # beyond it the differences between the methods would be too small to see

losses = defaultdict(list)
with (DOCS / "results" / "smollm2_135m" / "five_books.csv").open(newline="") as lines:
    for row in csv.DictReader(lines):
        length = int(row["length"])
        label = row["factors"]
        if label == "yarn" and length == EXTENDED:  # as exported and in Megatron it is the same
            label = "yarn_32k"
        if label in NAMES and row["dtype"] == "bfloat16":
            losses[label, length].append(log(float(row["perplexity"])))
perplexities = {place: exp(fmean(books)) for place, books in sorted(losses.items())}

series = {}
for label, (method, name) in NAMES.items():
    beyond = [(n, v) for (owner, n), v in perplexities.items() if owner == label and v > CEILING]
    if beyond:
        name += f" ({beyond[0][1]:.0f} at {format_length(beyond[0][0])})"
    searched = f"{label}.json" if label.startswith("longrope") else None
    series[label] = Series(name, Identity("SmolLM2-135M", method, config=searched), WINDOW)
figure = Lines(
    "smollm2_135m_perplexity",
    "SmolLM2-135M extended to 32k: perplexity of five unseen books",
    "",
    {
        series[label]: {
            n: value
            for (owner, n), value in perplexities.items()
            if owner == label and value < CEILING
        }
        for label in NAMES
    },
    "Sequence length (tokens)",
    "Perplexity (lower is better)",
    lengths=True,
    window=WINDOW,
    header=(),
    data=(),
)
image = DOCS / "figures" / f"{figure.name}.png"
image.write_bytes(draw(figure, series_styles(list(series.values()))).png)
print(f"wrote {image}")
