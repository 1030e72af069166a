"""One house style for every picture: curves, grouped horizontal bars, grids of images; readable at README size.

Draws on matplotlib's Figure directly (Agg or SVG, no window, no pyplot state), the same bytes for the same data, and
writes the file atomically. Refused: data that would draw an empty or a misleading picture, suffixes but .png and .svg.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from common.log import atomic_write

# Okabe and Ito, Color Universal Design (2008), black first: told apart by readers with any colour vision.
PALETTE = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
DASHES = ("-", "--", ":", "-.")  # a second cue, and the eighth curve differs from the first
STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "groundup",  # else each run names its clip paths anew
    "savefig.facecolor": "white",  # transparent would vanish on a dark page
}


def curve(
    path: Path | str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Lines of `series` {label: (x, y)}, both of shape (N,), and a dotted horizontal line for each `reference`.

    `points` {label: (x, y)} are markers in the colour of the series of that label, or in one of their own: what was
    measured beside what was fitted. NaN and inf in y leave a gap. Raises ValueError for no series, for x and y of
    different length, for a series without a finite point, and with `log_y` for values that are not positive.
    """
    lines = {label: _line(label, x, y) for label, (x, y) in series.items()}
    markers = {label: _line(label, x, y) for label, (x, y) in (points or {}).items()}
    heights = [y for _, y in (*lines.values(), *markers.values())]
    heights += [np.array([height]) for height in (reference or {}).values()]
    if not lines:
        raise ValueError("series is empty: expected {label: (x, y)}")
    if log_y and any((y[np.isfinite(y)] <= 0).any() for y in heights):
        raise ValueError("log_y needs positive values, got one that is zero or negative")
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.4, 3.6)
        for index, (label, (x, y)) in enumerate(lines.items()):
            marker = "o" if len(x) == 1 else None  # a line of one point is invisible
            dash = DASHES[index // len(PALETTE) % len(DASHES)]
            axes.plot(x, y, dash, color=PALETTE[index % len(PALETTE)], marker=marker, linewidth=1.5, label=label)
        for label, (x, y) in markers.items():
            index = [*lines, *(name for name in markers if name not in lines)].index(label)
            named = None if label in lines else label
            axes.plot(x, y, "o", color=PALETTE[index % len(PALETTE)], markersize=5, label=named)
        for label, height in (reference or {}).items():
            axes.axhline(height, color="#666666", linestyle=":", linewidth=1)
            axes.annotate(label, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # 4 rather than 4 x 10^0
            axes.yaxis.set_minor_formatter(LogFormatter())
            axes.grid(True, which="both")
        if len(lines) > 1 or markers:
            axes.legend()
        return save_figure(figure, path)


def bars(
    path: Path | str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    title: str,
    log_x: bool = False,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Grouped horizontal bars: `series` {label: one value a group}, each value written at its bar's end.

    None and NaN leave a gap marked "n/a". `reference` draws vertical lines. Raises ValueError for no groups or series,
    lengths that differ, a negative or infinite value, and with `log_x` for zero.
    """
    values = {label: _bar_lengths(label, row, len(groups), log_x) for label, row in series.items()}
    if not groups or not values:
        raise ValueError(f"expected at least one group and one series, got {len(groups)} and {len(values)}")
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.4, 1.2 + 0.28 * len(groups) * (len(values) + 0.6))
        for index, (label, row) in enumerate(values.items()):
            _draw_bars(axes, index, len(values), label, row)
        for label, place in (reference or {}).items():
            axes.axvline(place, color="#666666", linestyle=":", linewidth=1)
            axes.annotate(label, (place, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8)
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()  # the first group on top, as in a table
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)  # room for the values
        axes.set(xlabel=xlabel)
        axes.set_title(title, pad=18 if reference else None)
        if log_x:
            axes.set_xscale("log")
        if len(values) > 1:
            axes.legend()
        return save_figure(figure, path)


def image_grid(
    path: Path | str, images: Sequence[Any], titles: Sequence[str], *, columns: int = 8, title: str = ""
) -> Path:
    """Images of shape (H, W), drawn grey from their least to their greatest value, or (H, W, 3) with values in 0..1,
    row by row under their titles. Raises ValueError for no images, other shapes, or as many titles as images."""
    arrays = [np.asarray(image) for image in images]
    if not arrays or len(arrays) != len(titles):
        raise ValueError(
            f"expected one title an image and at least one, got {len(arrays)} images, {len(titles)} titles"
        )
    for array in arrays:
        if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
            raise ValueError(f"expected an image of shape (H, W) or (H, W, 3), got {array.shape}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(arrays))
    rows = math.ceil(len(arrays) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.1 * columns, 1.3 * rows + 0.3 * bool(title)), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).flat
        for cell in cells:
            cell.axis("off")
        for cell, array, text in zip(figure.axes, arrays, titles, strict=False):  # the last row may have empty cells
            cell.imshow(array, cmap="gray", interpolation="nearest")
            cell.set_title(text, fontsize=8, loc="center")
        if title:
            figure.suptitle(title, fontsize=11)
        return save_figure(figure, path)


def _line(label: str, x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ValueError(f"series {label!r}: expected x and y of one shape (N,), got {xs.shape} and {ys.shape}")
    if not np.isfinite(ys).any():
        raise ValueError(f"series {label!r}: no finite value among {len(ys)}")
    return xs, ys


def _bar_lengths(label: str, row: Sequence[float | None], count: int, log_x: bool) -> np.ndarray:
    lengths = np.array([math.nan if value is None else value for value in row], dtype=float)
    if len(lengths) != count:
        raise ValueError(f"series {label!r}: expected {count} values, one a group, got {len(lengths)}")
    known = lengths[~np.isnan(lengths)]
    if not (np.isfinite(known).all() and (known > 0 if log_x else known >= 0).all()):
        raise ValueError(f"series {label!r}: expected {'positive' if log_x else 'non-negative'} values, got {row}")
    return lengths


def _draw_bars(axes: Axes, index: int, count: int, label: str, row: np.ndarray) -> None:
    """The bars of series number `index` of `count`, one in each group, with their values."""
    thickness = 0.8 / count
    places = np.arange(len(row)) + (index - (count - 1) / 2) * thickness
    color = PALETTE[(index + 2) % len(PALETTE)]  # blue first: black bars would outshine the text
    drawn = axes.barh(places, np.nan_to_num(row), thickness * 0.9, color=color, label=label)
    axes.bar_label(drawn, ["" if math.isnan(value) else f"{value:.3g}" for value in row], padding=3, fontsize=8)
    for place in places[np.isnan(row)]:
        axes.annotate("n/a", (0.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Writes .png or .svg, atomically, the same bytes for the same picture. Raises ValueError for another suffix."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"expected a .png or .svg file, got {path.name!r}")
    data = io.BytesIO()
    # No date and no version in the file: a picture that did not change must not change in git.
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(data, format=path.suffix[1:], metadata=metadata)
    atomic_write(path, data.getvalue())
    return path
