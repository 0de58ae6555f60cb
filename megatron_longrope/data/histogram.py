"""The lengths of a set's source documents, as text and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.files import atomic_file, refuse_existing
from megatron_longrope.lengths import format_length


def source_histograms(manifest: dict[str, Any]) -> dict[str, dict[int, int]]:
    """Documents by the lower end of their class of lengths (a power of two), for every source."""
    return {
        source["name"]: {int(low): count for low, count in source["length_histogram"].items()}
        for source in manifest["sources"]
    }


def histogram_lines(histogram: dict[int, int], width: int = 40) -> list[str]:
    """One line for each class; the bar of the largest has `width` marks.

    Args:
        histogram (dict): Documents by the lower end of the class.
        width (int): Longest bar.
    """
    largest = max(histogram.values(), default=0)
    return [
        f"{_label(low):>15} {count:>9} {'#' * max(1, round(width * count / largest))}"
        for low, count in sorted(histogram.items())
    ]


def draw_histogram(manifest: dict[str, Any], path: Path, overwrite: bool = False) -> None:
    """Write a PNG: documents by length, a panel for each source.

    Args:
        manifest (dict): Of the set.
        path (Path): The figure.
        overwrite (bool): Replace an existing figure.

    Raises:
        LongRopeError: The path exists or has no .png suffix.
    """
    if path.suffix != ".png":
        raise LongRopeError(f"figure {path} must end in .png; give it that suffix")
    refuse_existing([path], overwrite)
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    histograms = source_histograms(manifest)
    classes = sorted({low for histogram in histograms.values() for low in histogram})
    figure = Figure(figsize=(1.5 + 0.6 * max(6, len(classes)), 0.8 + 2.2 * len(histograms)))
    panels = figure.subplots(len(histograms), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, histogram) in zip(panels, histograms.items(), strict=True):
        counts = [histogram.get(low, 0) for low in classes]
        panel.bar(range(len(classes)), counts, width=0.9, color="#4477aa")
        panel.set_title(f"{name}: {sum(counts):,} documents", fontsize=10, loc="left")
        panel.set_ylabel("documents")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(classes)), [_label(low) for low in classes], rotation=45)
    panels[-1].set_xlabel("length in tokens")
    figure.set_layout_engine("constrained")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _label(low: int) -> str:
    return f"{format_length(low)} to {format_length(2 * low)}" if low else "empty"
