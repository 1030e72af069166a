"""Charts as SVG inside a page of common.html: lines over linear or logarithmic axes, and stacked bars.

Colours are those of the page (classes s0, s1, ... for lines and f0, f1, ... for areas), so they follow light and dark.
Each has a title and a description for those who cannot see it. Refused: a chart without a finite point.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.html import LIGHT, element, escaped

WIDTH, HEIGHT = 720, 340  # of the whole, in its own units
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 20, 44  # around the axes
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # from the eighth series on, colours come again
BAR = 30  # height of a bar with its gap
LETTERS = 20  # of a bar's label, for which there is room


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dots: bool = False  # each point has a mark
    steps: bool = False  # a value holds until the next one


def colour_class(kind: str, number: int) -> str:
    return f"{kind}{number % len(LIGHT)}"


def dash(number: int) -> str | None:
    return DASHES[number // len(LIGHT) % len(DASHES)] or None


def line_chart(
    name: str,
    series: Sequence[Series],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    from_zero: bool = False,
    levels: Mapping[str, float] | None = None,
) -> str:
    """`name`: of the chart in its page. `log`: both axes are logarithmic; else the horizontal one begins at 0, and with
    `from_zero` the other one too. `levels` are horizontal lines with a name. Points that are not finite, and with log
    those not positive, are gaps. Raises ValueError without any point."""
    levels = {label: y for label, y in (levels or {}).items() if drawable(1, y, log)}
    points = [(x, y) for one in series for x, y in zip(one.x, one.y, strict=True) if drawable(x, y, log)]
    if not points:
        raise ValueError(f"{title}: no finite point in {len(series)} series")
    origin = [] if log else [0.0]
    x_axis = Axis([x for x, _ in points] + origin, LEFT, WIDTH - RIGHT, log)
    heights = [*(y for _, y in points), *levels.values(), *(origin if from_zero else [])]
    y_axis = Axis(heights, HEIGHT - BOTTOM, TOP, log)
    parts = [*grid(x_axis, y_axis), *labels(xlabel, ylabel), *level_lines(levels, y_axis)]
    for one in series:
        parts += drawn(one, x_axis, y_axis, log)
    return picture(name, title, "; ".join(map(described, series)), HEIGHT, parts)


def drawable(x: float, y: float, log: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (min(x, y) > 0 or not log)


def described(one: Series) -> str:
    """What a curve says, in words."""
    points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
    if not points:
        return f"{one.label}: nothing"
    (x0, y0), (x1, y1) = points[0], points[-1]
    return f"{one.label}: from {y0:.4g} at {x0:.4g} to {y1:.4g} at {x1:.4g}, lowest {min(y for _, y in points):.4g}"


class Axis:
    """Values to places in a picture, linear or logarithmic."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool) -> None:
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (at - low) / (high - low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers within: 1, 2, 5 times powers of ten; of a logarithmic axis that spans less, equal steps."""
        if self.log and self.high / self.low > 20:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 6
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(digit * unit for digit in (1, 2, 5, 10) if digit * unit >= rough * (1 - 1e-9))
            found = [
                step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            ]
        return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]


def short(value: float) -> str:
    """1500000 as 1.5M, 0.25 as it is."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        at = f"{y_axis.place(value):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", short(value), x=LEFT - 6, y=at, dy=4, text_anchor="end"))
    for value in x_axis.ticks():
        at = f"{x_axis.place(value):.1f}"
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        parts.append(element("text", short(value), x=at, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    return parts


def level_lines(levels: Mapping[str, float], y_axis: Axis) -> list[str]:
    """Names stand at the right end; one that would cover the name before it stands further left."""
    parts, before, shift = [], math.inf, 0
    for label, y in sorted(levels.items(), key=lambda level: level[1]):
        at = y_axis.place(y)
        shift = shift + 80 if before - at < 14 else 0
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="level"))
        parts.append(element("text", escaped(label), x=WIDTH - RIGHT - shift, y=f"{at - 3:.1f}", text_anchor="end"))
        before = at
    return parts


def labels(xlabel: str, ylabel: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        element("text", escaped(xlabel), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"),
        element(
            "text", escaped(ylabel), x=0, y=0, transform=f"translate(14 {middle}) rotate(-90)", text_anchor="middle"
        ),
    ]


def drawn(one: Series, x_axis: Axis, y_axis: Axis, log: bool) -> list[str]:
    """A path, with a gap where a point is missing, and marks."""
    path, places, pen = [], [], "M"
    for x, y in zip(one.x, one.y, strict=True):
        if not drawable(x, y, log):
            pen = "M"
            continue
        at = (x_axis.place(x), y_axis.place(y))
        corner = f"H{at[0]:.1f}V{at[1]:.1f}" if one.steps and pen == "L" else f"{pen}{at[0]:.1f} {at[1]:.1f}"
        path.append(corner)
        places.append(at)
        pen = "L"
    kind = f"line {colour_class('s', one.colour)}"
    parts = [element("path", d="".join(path), class_=kind, stroke_dasharray=dash(one.colour))]
    if one.dots or len(places) == 1:  # a line of one point is invisible
        mark = colour_class("f", one.colour)
        parts += [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=mark) for x, y in places]
    return parts


def stacked_bars(name: str, bars: Mapping[str, Mapping[str, float]], *, title: str) -> str:
    """One bar for each of `bars` {label: {part: value}}, as shares of its sum; parts have the same colour in each.
    Raises ValueError for a bar of nothing."""
    kinds = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    drawn_bars, told = [], []
    for row, (label, parts) in enumerate(bars.items()):
        total = math.fsum(parts.values())
        if not total > 0:
            raise ValueError(f"{title}: {label} has nothing to draw: expected parts that took time")
        edges = [math.fsum([*parts.values()][:n]) / total for n in range(len(parts) + 1)]
        top, left = row * BAR + 4, 160
        name_of_bar = label if len(label) <= LETTERS else f"…{label[1 - LETTERS :]}"  # ends tell runs apart
        drawn_bars.append(element("text", escaped(name_of_bar), x=left - 8, y=top + 16, text_anchor="end"))
        for part, (a, b) in zip(parts, pairwise(edges), strict=True):
            x, width = left + a * (WIDTH - RIGHT - left), (b - a) * (WIDTH - RIGHT - left)
            fill = colour_class("f", kinds.index(part) + 1)
            about = element("title", escaped(f"{label}: {part} {b - a:.1%}"))
            drawn_bars.append(
                element("rect", about, x=f"{x:.1f}", y=top, width=f"{width:.1f}", height=BAR - 8, class_=fill)
            )
        told.append(f"{label}: " + ", ".join(f"{part} {value / total:.1%}" for part, value in parts.items()))
    return picture(name, title, "; ".join(told), len(bars) * BAR + 4, drawn_bars)


def picture(name: str, title: str, description: str, height: int, parts: Sequence[str]) -> str:
    about = [element("title", escaped(title), id=f"{name}-t"), element("desc", escaped(description), id=f"{name}-d")]
    return element(
        "svg", *about, *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_labelledby=f"{name}-t {name}-d"
    )


def legend(names: Mapping[str, int], filled: bool = False) -> str:
    """{name: colour} as a list with swatches."""
    items = []
    for name, colour in names.items():
        if filled:
            mark = element("rect", x=4, y=0, width=12, height=8, class_=colour_class("f", colour))
        else:
            kind = f"line {colour_class('s', colour)}"
            mark = element("line", x1=0, x2=32, y1=5, y2=5, class_=kind, stroke_dasharray=dash(colour))
        swatch = element("svg", mark, viewBox="0 0 32 10", aria_hidden="true", class_="swatch")
        items.append(element("li", swatch, escaped(name)))
    return element("ul", *items, class_="legend")
