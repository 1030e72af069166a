"""The pictures of a report: curves of several runs over steps, tokens and seconds, what the schedule did, where the
time of a step went.

A long curve is drawn in POINTS means. Refused: nothing; what a run does not have is said in its place.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

from common.html import chooser, element, escaped, number, table
from common.svg import Series, legend, line_chart, stacked_bars
from minigpt.compare import smoothed
from speedrun.run_files import AXES, RunFiles
from speedrun.schedule import plan

POINTS = 400
XLABELS = {"steps": "step", "tokens": "tokens read", "seconds": "seconds on the clock"}
CHOICES = [*product(range(len(AXES)), range(2)), *((i,) for i in range(len(AXES)))]  # for common.html.page


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about POINTS points: means of y over equal pieces, each at its last x."""
    size = max(1, math.ceil(len(x) / POINTS))
    starts = range(0, len(x), size)
    return [x[min(i + size, len(x)) - 1] for i in starts], [
        math.fsum(y[i : i + size]) / len(y[i : i + size]) for i in starts
    ]


def training(run: RunFiles, axis: dict[int, float]) -> tuple[list[float], list[float]]:
    """Smoothed bits per byte of the training batches."""
    rows = [row for row in run.metrics if "train_bits_per_byte" in row and row["step"] in axis]
    values = [float(row["train_bits_per_byte"]) for row in rows]
    return thinned([axis[row["step"]] for row in rows], smoothed(values))


def held_out(run: RunFiles, axis: dict[int, float]) -> tuple[list[float], list[float]]:
    points = [(axis[step], value) for step, value in run.looks() if step in axis]
    return [x for x, _ in points], [y for _, y in points]


def speed(run: RunFiles, axis: dict[int, float]) -> tuple[list[float], list[float]]:
    rows = [row for row in run.timing if "tokens_per_s" in row]
    return thinned([axis[row["step"]] for row in rows], [float(row["tokens_per_s"]) for row in rows])


def curves(
    name: str,
    runs: Sequence[RunFiles],
    values: Callable[[RunFiles, dict[int, float]], tuple[list[float], list[float]]],
    *,
    title: str,
    ylabel: str,
    note: str,
    levels: dict[str, float] | None = None,
    dots: bool = False,
    logarithmic: bool = True,
) -> str:
    """One chart of all runs over each axis; with `logarithmic` both of its axes can be so too."""
    panels, places = {}, {run.label: run.places() for run in runs}
    for a, axis in enumerate(AXES):
        series = [Series(run.label, *values(run, places[run.label][axis]), i, dots) for i, run in enumerate(runs)]
        if not any(one.x for one in series):
            return element("p", f"{escaped(title)}: nothing on file yet.", class_="soft")
        for log in range(1 + logarithmic):
            panels[(a, log) if logarithmic else (a,)] = line_chart(
                f"{name}-{a}{log}", series, title=f"{title} over {XLABELS[axis]}", xlabel=XLABELS[axis],
                ylabel=ylabel, log=bool(log), from_zero=not logarithmic, levels=levels,
            )  # fmt: skip
    groups = {"over": AXES} | ({"scale": ("linear", "logarithmic")} if logarithmic else {})
    missing = [run.label for run, one in zip(runs, series, strict=True) if not one.x]
    note += f" Nothing on file yet: {', '.join(missing)}." if missing else ""
    names = legend({run.label: i for i, run in enumerate(runs)}) if len(runs) > 1 else ""
    return element("figure", names, chooser(name, groups, panels), element("figcaption", escaped(note)))


def schedule(runs: Sequence[RunFiles]) -> str:
    """The learning rate as it was filed, and rows, context and window as the config orders them, where they change."""
    series = [
        Series(run.label, *thinned(*zip(*points, strict=True)), i)
        for i, run in enumerate(runs)
        if (points := [(row["step"], float(row["lr_share"])) for row in run.metrics if "lr_share" in row])
    ]
    names = {run.label: i for i, run in enumerate(runs)}
    parts = [legend(names)] if len(runs) > 1 else []
    if series:
        options = {"title": "Learning rate", "xlabel": "step", "ylabel": "share of the peak", "from_zero": True}
        parts.append(element("figure", line_chart("rate", series, **options)))
    constant, orders = {}, [ordered(run) for run in runs]
    for what, unit in (("rows", "windows in a step"), ("context", "tokens in a window"), ("window", "tokens seen")):
        if any(order and len({*order[what]}) > 1 for order in orders):
            series = [
                changes(Series(run.label, range(1, len(order[what]) + 1), shown(order, what), i, steps=True))
                for i, (run, order) in enumerate(zip(runs, orders, strict=True))
                if order
            ]
            options = {"title": f"{what}: {unit}", "xlabel": "step", "ylabel": unit, "from_zero": True}
            parts.append(element("figure", line_chart(what, series, **options)))
        else:
            for run, order in zip(runs, orders, strict=True):
                if order:
                    constant.setdefault(run.label, []).append(f"{what} {order[what][0] or 'as wide as the context'}")
    told = "; ".join(f"{label}: {', '.join(values)}" for label, values in constant.items())
    parts.append(element("p", f"The same throughout. {escaped(told)}.") if told else "")
    if old := [run.label for run, order in zip(runs, orders, strict=True) if not order]:
        parts.append(
            element("p", f"Of another program, so without its schedule: {escaped(', '.join(old))}.", class_="soft")
        )
    return "".join(parts)


def ordered(run: RunFiles) -> dict[str, list[int]] | None:
    """{rows, context, window: one value a step} of the whole run."""
    config = run.race_config()
    if config is None:
        return None
    plans = [plan(step, config) for step in range(config.steps)]
    return {what: [getattr(each, what) for each in plans] for what in ("rows", "context", "window")}


def shown(order: dict[str, list[int]], what: str) -> list[int]:
    """A window of 0 is none: a layer sees the context."""
    return [value or context for value, context in zip(order[what], order["context"], strict=True)]


def changes(one: Series) -> Series:
    """Without the points inside a stretch of equal values."""
    last = len(one.y) - 1
    kept = [i for i in range(last + 1) if i in (0, last) or one.y[i] != one.y[i - 1]]
    return Series(one.label, [one.x[i] for i in kept], [one.y[i] for i in kept], one.colour, steps=True)


def breakdown(runs: Sequence[RunFiles]) -> str:
    """Where the time of a step goes: a bar a run, and the same as numbers."""
    parts = {run.label: run.parts() for run in runs}
    parts = {label: spent for label, spent in parts.items() if sum(spent.values()) > 0}
    without = [run.label for run in runs if run.label not in parts]
    note = element("p", f"Not on file: {escaped(', '.join(without))}.", class_="soft") if without else ""
    if not parts:
        return note
    kinds = list(dict.fromkeys(name for spent in parts.values() for name in spent))
    full = {label: {name: spent.get(name, 0.0) for name in kinds} for label, spent in parts.items()}
    rows = []
    for label, spent in full.items():
        total = math.fsum(spent.values())
        rows.append([escaped(label), *(number(ms, f"{ms:,.2f} ms, {ms / total:.1%}") for ms in spent.values())])
    bars = stacked_bars("parts", full, title="Where the time of a step goes")
    colours = {name: i + 1 for i, name in enumerate(kinds)}
    return element("figure", legend(colours, filled=True), bars) + table(["run", *map(escaped, kinds)], rows) + note
