"""Draw docs/figures/smollm2_135m_perplexity.png from docs/results/smollm2_135m/perplexity.csv.

python examples/smollm2_135m/draw_perplexity.py
"""

import csv
from pathlib import Path

from megatron_longrope.evaluation.figure import Lines
from megatron_longrope.evaluation.series import Identity, Series
from megatron_longrope.report.figures import draw
from megatron_longrope.report.style import series_styles

DOCS = Path(__file__).parents[2] / "docs"
WINDOW = 8192
NAMES = {"none": "No extension", "yarn": "YaRN", "longrope": "LongRoPE"}

points: dict[str, dict[int, float]] = {label: {} for label in NAMES}
with (DOCS / "results" / "smollm2_135m" / "perplexity.csv").open(newline="") as lines:
    for row in csv.DictReader(lines):
        # As exported; at 16k YaRN is the same in Megatron.
        label = {"checkpoint": "none", "yarn_exported": "yarn"}.get(row["label"], row["label"])
        if label in points:
            points[label][int(row["length"])] = float(row["ppl_token_weighted"])

series = {
    label: Series(NAMES[label], Identity("SmolLM2-135M", label, config=config), WINDOW)
    for label, config in (("none", None), ("yarn", None), ("longrope", "longrope_16k.json"))
}
figure = Lines(
    "smollm2_135m_perplexity",
    "SmolLM2-135M as exported: perplexity of two unseen books",
    "",
    {series[label]: dict(sorted(line.items())) for label, line in points.items()},
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
