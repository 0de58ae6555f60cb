"""How the figures of a report look: styles, the blank figure, lines, axes, labels.

Every line has a colour (Okabe and Ito's palette), a marker and a line style of its own, so that
the figures read in grey and with any colour vision. The few neutral colours stand in `NEUTRALS`, so
that a page can exchange them and one drawing serves light screens, dark screens and paper.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.optimize import isotonic_regression

from megatron_longrope.evaluation.series import Series
from megatron_longrope.evaluation.table import shorten
from megatron_longrope.files import write_bytes_atomic, write_text_atomic
from megatron_longrope.methods import METHODS

INK, MUTED, GRID, PAPER = "#1b1d21", "#5f6671", "#e3e6ea", "#fefefe"
NEUTRALS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
"""Colours that a page may replace on dark screens, with the CSS variable that does."""

_WIDTH = 7.4  # inches
_DPI = 200


class Style(NamedTuple):
    """The look of a line and what it is called."""

    label: str
    color: str
    marker: str
    dashes: Any


LOOKS = {
    "blue": ("#0072B2", "o", "-"),
    "vermilion": ("#D55E00", "v", (0, (5, 2))),
    "green": ("#009E73", "D", (0, (3, 1.5))),
    "purple": ("#CC79A7", "P", (0, (5, 1.5, 1, 1.5))),
    "orange": ("#E69F00", "s", (0, (8, 2))),
    "sky": ("#56B4E9", "^", (0, (1, 1))),
    "ink": (INK, "x", (0, (1, 1.6))),
}
"""Colour, marker and dashes by name; grey print tells them by marker and line."""

CYCLE = tuple(Style("", *look) for look in LOOKS.values())
"""Looks of things that have no house style, in order."""

LONGROPE = Style("LongRoPE", *LOOKS["blue"])

_STARTS = {
    **{name: Style(method.label, *LOOKS[method.look]) for name, method in METHODS.items()},
    "base": Style("Base factors", *LOOKS["vermilion"]),
    "longest": Style("Longest window's", *LOOKS["purple"]),
}
"""Starting points of searches: the published methods, and those of a recovery search."""


@dataclass(frozen=True)
class Drawing:
    """One finished figure."""

    name: str
    """File name without suffix."""
    title: str
    """What it shows, in a few words."""
    caption: str
    """How to read it."""
    png: bytes
    svg: str
    """`<svg>` element for inlining, with the width of its container."""
    csv: str
    """The data behind it."""

    def save(self, directory: str | Path, stem: str | None = None) -> list[Path]:
        """Write `<stem>.png` and `<stem>.csv`, each whole or not at all.

        Args:
            directory (str | Path): Made if it does not exist.
            stem (str, optional): File name without suffix. Defaults to the drawing's name.

        Returns:
            list[Path]: The image and the data.
        """
        directory = Path(directory)
        image, data = (directory / f"{stem or self.name}.{kind}" for kind in ("png", "csv"))
        write_bytes_atomic(image, self.png)
        write_text_atomic(data, self.csv)
        return [image, data]


def style_of(method: str) -> Style:
    """Return the style of a search's starting point; an unknown one keeps its name and gets grey.

    `near-pi`, the candidate of a narrower space nearest to PI, looks like PI.
    """
    if style := _STARTS.get(method.removeprefix("near-")):
        return style._replace(label=f"near {style.label}") if method not in _STARTS else style
    return Style(method, MUTED, "h", "-")


def has_style(method: str) -> bool:
    """Return whether the starting point has colours of its own."""
    return style_of(method).color != MUTED


def series_styles(every: Sequence[Series]) -> dict[Series, Style]:
    """Choose a colour, marker and line style for each series, the same in every figure.

    Beside a single model's factors the published methods keep the colours they have elsewhere.
    """
    single = len({series.identity.model for series in every}) == 1
    styles: dict[Series, Style] = {}
    named: set[str | None] = set()
    for series in every:
        label = series.identity.label
        if single and series.identity.is_method and label not in named:
            named.add(label)  # a second policy of the method gets another look
            styles[series] = style_of(label)._replace(label=series.name)
    used = {style.color for style in styles.values()}
    free = [style for style in CYCLE if style.color not in used] or list(CYCLE)
    others = [series for series in every if series not in styles]
    for number, series in enumerate(others):
        # Each round through the colours pairs them with other markers and dashes.
        style, turn = free[number % len(free)], number // len(free)
        place = CYCLE.index(style)
        styles[series] = Style(
            series.name, style.color, CYCLE[(place + turn) % len(CYCLE)].marker,
            CYCLE[(place + 2 * turn) % len(CYCLE)].dashes,
        )  # fmt: skip
    return {series: styles[series] for series in every}


def spread_labels(places: Sequence[float], gap: float) -> list[float]:
    """Move places in [0, 1] apart to at least `gap`, as little as possible, keeping their order."""
    if not len(places):
        return []
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    # Less its steps the order need only not fall.
    fitted = isotonic_regression(np.asarray(places, float)[order] - steps).x
    found = np.empty(len(places))
    found[order] = np.clip(fitted, 0, max(1 - steps[-1], 0)) + steps
    return found.tolist()


@contextmanager
def blank_figure(title: str, height: float) -> Iterator[Figure]:
    """Make a blank figure in the house style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False,
            "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED,
            "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
            "axes.facecolor": "none", "axes.grid": True, "axes.grid.axis": "y",
            "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
            "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
            "ytick.labelcolor": INK, "ytick.left": False, "axes.labelpad": 7,
            "lines.linewidth": 1.8, "lines.markersize": 5.5, "legend.handlelength": 2.6,
            "figure.facecolor": PAPER, "svg.fonttype": "path", "svg.hashsalt": "longrope",
        })  # fmt: skip
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, hspace=0.03, wspace=0.04)
        figure.suptitle(title, x=0.016, ha="left", fontsize=11.5, fontweight="bold")
        yield figure


@contextmanager
def panels(
    title: str,
    count: int,
    xlabel: str,
    ylabel: str = "",
    *,
    columns: int | None = None,
    high: float = 2.9,
    head: float = 0.9,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Make a blank figure with `count` axes, named along the outer edges.

    Args:
        title (str): Of the figure.
        count (int): How many axes.
        xlabel (str): What is to the right.
        ylabel (str): What is upwards. Defaults to nothing.
        columns (int, optional): Axes side by side. Defaults to two, of one axes to one.
        high (float): Inches of an axes, its title included.
        head (float): Inches above and below all of them.
    """
    columns = columns or min(2, count)
    lines = math.ceil(count / columns)
    with blank_figure(title, head + high * lines) as figure:
        grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
        for index, axes in enumerate(grid):
            axes.set_visible(index < count)
            if index + columns >= count:
                axes.set_xlabel(xlabel)
            if ylabel and index % columns == 0:
                axes.set_ylabel(ylabel)
        yield figure, grid[:count]


def finish(
    figure: Figure, name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]
) -> Drawing:
    """Render the figure, and its data under `header`, in every format."""
    title = figure.get_suptitle()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI, metadata={"Title": title})
    figure.suptitle("").set_in_layout(False)  # the page has its own headings
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    data = io.StringIO()
    csv.writer(data, lineterminator="\n").writerows([header, *rows])
    svg = _inline_svg(drawing.getvalue(), name)
    return Drawing(name, title, caption, image.getvalue(), svg, data.getvalue())


def _inline_svg(text: str, name: str) -> str:
    """Return the bare element, with ids of its own and a flexible size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#|url\(#', lambda match: f"{match[0]}{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title"', 1).strip()


def plot_line(axes: Axes, xs: Any, ys: Any, style: Style, **options: Any) -> None:
    """Draw a line in a style; `options` override it."""
    _, color, marker, dashes = style
    edge = {} if marker == "x" else {"markeredgecolor": PAPER, "markeredgewidth": 0.7}
    axes.plot(xs, ys, color=color, marker=marker, linestyle=dashes, **(edge | options))


def swatch(style: Style) -> Line2D:
    """Return a legend entry."""
    edge = {} if style.marker == "x" else {"markeredgecolor": PAPER, "markeredgewidth": 0.7}
    return Line2D(
        [], [], color=style.color, marker=style.marker, linestyle=style.dashes, markersize=5, **edge
    )


def score_axis(
    axes: Axes,
    values: Sequence[float],
    around: Sequence[float] | None = None,
    bottom: float = 0.0,
) -> None:
    """Set limits with some air, logarithmic where positive values span more than a factor of ten.

    Args:
        values (Sequence[float]): All of them are within the frame.
        around (Sequence[float], optional): Only the lowest of these need be.
        bottom (float): Further room below, as a part of the span.
    """
    low, high = min([*values, *(around or [])]), max(values)
    if high > 10 * low > 0:
        axes.set_yscale("log")
        air = (high / low) ** 0.05
        axes.set_ylim(low / air / (high / low) ** bottom, high * air)
        subs = (1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        air = max((high - low) * 0.07, high * 0.002) or 0.1
        axes.set_ylim(low - air - bottom * (high - low), high + air)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: Any) -> str:
    return f"{value:.0e}" if value >= 1e6 else f"{value:,.10g}"


def label_ends(axes: Axes, ends: Sequence[tuple[float, Style, str, bool]]) -> None:
    """Name each line in the right margin at its last value; (value, style, text, has a leader)."""
    to_axes = axes.transScale + axes.transLimits
    wanted = [float(to_axes.transform((1.0, value))[1]) for value, *_ in ends]
    rows = axes.get_subplotspec().get_gridspec().nrows
    height = axes.figure.get_figheight() / rows * 0.72 * 72  # points, roughly
    for (_, style, text, leader), there, here in zip(
        ends, wanted, spread_labels(wanted, 13.5 / height), strict=True
    ):
        margin = {"transform": axes.transAxes, "clip_on": False, "color": style.color}
        if leader:
            axes.plot([1.0, 1.03], [there, here], linewidth=0.8, **margin)
        axes.plot([1.03, 1.055, 1.08], [here] * 3, linestyle=style.dashes, marker=style.marker,
                  markevery=[1], markersize=4.8, linewidth=1.6, **margin)  # fmt: skip
        axes.text(
            1.095, here, shorten(text, 26), transform=axes.transAxes, va="center", fontsize=8.5
        )
