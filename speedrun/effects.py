"""Effects of switches: paired differences with Student's t, ratios of step times, Holm's correction, the chart.

The sign is always "on minus off" and "on over off": below 0, or below 1, the switch helps. Refused: unpaired values,
fewer than two of them, values that are not finite, a chart of nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE

from common.plots import PALETTE, STYLE, save_figure
from speedrun.record_log import student_tail

LEVEL = 0.95
HELPS, HURTS, UNCLEAR = PALETTE[3], PALETTE[4], "#888888"


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean or median, the interval around it, and the two-sided p-value against "no effect" (nan for a median)."""

    value: float
    low: float
    high: float
    p_value: float = math.nan


# ---- bits per byte ---------------------------------------------------------------------------------------------------


def paired_effect(on: Sequence[float], off: Sequence[float], level: float = LEVEL) -> Effect:
    """Mean of on - off over seeds, with Student's interval and two-sided p (Student 1908).

    Both sides of a pair have the same seed: the same data in the same order and the same first weights, unless the
    switch changes these; what they have in common cancels. The interval is of what other seeds would change, on this
    text and machine. Raises ValueError for lists of unequal length, of fewer than two, or not finite.
    """
    if len(on) != len(off) or len(on) < 2:
        raise ValueError(f"{len(on)} and {len(off)} values: expected as many, at least 2 seeds for an interval")
    if not all(map(math.isfinite, [*on, *off])):
        raise ValueError(f"{[*on, *off]}: expected finite numbers")
    differences = [a - b for a, b in zip(on, off, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = student_quantile((1 + level) / 2, n - 1) * error
    return Effect(mean, mean - reach, mean + reach, 2 * student_tail(abs(mean) / error, n - 1))


def student_quantile(share: float, freedom: int) -> float:
    """t with P(T <= t) = share, 0.5 to less than 1, by bisection."""
    if not (0.5 <= share < 1):
        raise ValueError(f"share {share}: expected 0.5 to less than 1")
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - share else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the same order (Holm 1979): below 0.05 for any of them is wrong with 5% at most, however
    many there are. The smallest of m counts m times, the next m - 1 times, ...; none less than one before it."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


# ---- time ------------------------------------------------------------------------------------------------------------


def median_effect(ratios: Sequence[float], level: float = LEVEL) -> Effect:
    """Median and its distribution-free interval: the k-th smallest and k-th largest of n.

    The true median lies outside with the probability that a fair coin thrown n times shows fewer than k heads, or fewer
    than k tails; k is the largest for which that is at most 1 - level. Raises ValueError for fewer than 6 at 95%, of
    which not even the whole range is as sure, and for ratios that are not positive.
    """
    n, values = len(ratios), sorted(ratios)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"{list(ratios)}: expected positive finite ratios")
    k, below = 0, 1 / 2**n
    while 2 * below <= 1 - level:
        k += 1
        below += math.comb(n, k) / 2**n
    if k == 0:
        raise ValueError(f"{n} ratios: expected more for an interval of the median at {level:.0%}")
    return Effect(statistics.median(values), values[k - 1], values[n - k])


def slope_of(whole: Sequence[float], half: Sequence[float], steps: int) -> tuple[float, float]:
    """(bits per byte for an e-fold of steps, bits between the two lengths), of a recipe with `steps` and with
    steps // 2, seed by seed; nan without runs, or where one is nan."""
    gained = statistics.fmean([a - b for a, b in zip(whole, half, strict=True)] or [math.nan])
    return gained / math.log(steps / (steps // 2)), abs(gained)


def to_same_loss(bits: Effect, time: Effect, slope: float, reach: float) -> Effect | None:
    """Seconds with the switch over seconds without it, to the loss that the run without it ends at.

    The base loses `slope` bits per byte (below 0) with each e-fold of steps, each number of steps with a schedule of
    its own. If the switch only shifts that line, it needs exp(effect / -slope) times as many steps. None where the
    interval of the effect goes further than `reach`, the bits that lie between the measured lengths of the base: beyond
    it the line is a guess. The interval takes the corners of the two intervals; what is uncertain in `slope` itself is
    not in it.
    """
    if not (slope < 0) or not (max(abs(bits.low), abs(bits.high)) <= reach):
        return None
    return Effect(*(math.exp(b / -slope) * t for b, t in
                    ((bits.value, time.value), (bits.low, time.low), (bits.high, time.high))))  # fmt: skip


def judge(rows: Sequence[dict[str, Any]], slope: float, reach: float) -> None:
    """Adds Holm's p-values over all switches that were compared, and seconds to the same loss where they follow."""
    compared = [row for row in rows if row["bits"]]
    for row, adjusted in zip(compared, holm([row["bits"].p_value for row in compared]), strict=True):
        row["holm"] = adjusted
        if row["time"]:
            row["to_same_loss"] = to_same_loss(row["bits"], row["time"], slope, reach)


def survives(row: Mapping[str, Any]) -> bool:
    """Whether an effect is left after Holm's correction."""
    return row["holm"] is not None and row["holm"] < 1 - LEVEL


# ---- the table -------------------------------------------------------------------------------------------------------


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row, in the order given, and what chance alone would make of so many comparisons."""
    lines = [f"{'switch':17} {'bits per byte, on - off':28} {'p (Holm)':>9}  {'step time, on / off':22} "
             f"{'time to the same loss':21}"]  # fmt: skip
    for row in rows:
        bits, times, seconds = row["bits"], row["time"], row["to_same_loss"]
        cells = [
            f"{bits.value:+.4f} [{bits.low:+.4f}, {bits.high:+.4f}]" if bits else "",
            f"{row['holm']:.3f}{'*' if survives(row) else ' '}" if bits else "",
            f"{times.value:.3f} [{times.low:.3f}, {times.high:.3f}]" if times else "",
            f"{seconds.value:.2f} [{seconds.low:.2f}, {seconds.high:.2f}]" if seconds else "",
        ]
        text = f"{row['switch']:17} {cells[0]:28} {cells[1]:>9}  {cells[2]:22} {cells[3]:21}"
        lines.append(f"{text if bits or times else row['switch'].ljust(17)} {row['reason']}".rstrip())
    count = sum(row["bits"] is not None for row in rows)
    outside = sum(row["bits"] is not None and not row["bits"].low <= 0 <= row["bits"].high for row in rows)
    sure = sum(map(survives, rows))
    chance = (1 - LEVEL) * count
    lines.append(f"{outside} of {count} intervals do not hold 0, where chance alone would make {chance:.1f} if no "
                 f"switch did anything; * {sure} survive Holm's correction for {count} comparisons")  # fmt: skip
    return "\n".join(lines)


# ---- the chart -------------------------------------------------------------------------------------------------------


def chart(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path:
    """Dots with intervals, the most helpful on top: bits per byte on the left, time of a step on the right.

    Each row has `switch`, `holm` (adjusted p or None), and `bits`, `time`: an Effect or None. Filled dots are those
    that survive Holm's correction, and of times those whose interval does not hold 1. Raises ValueError without rows.
    """
    shown = sorted((row for row in rows if row["bits"] or row["time"]), key=place)
    if not shown:
        raise ValueError("no switch was measured: nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.5 + 0.27 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for y, row in enumerate(shown):
            if bits := row["bits"]:
                draw(left, y, bits, 0.0, sure=survives(row))
            if time := row["time"]:
                draw(right, y, time, 1.0, sure=not time.low <= 1 <= time.high)
        left.axvline(0, color="#666666", linewidth=1, zorder=0)
        right.axvline(1, color="#666666", linewidth=1, zorder=0)
        left.set_yticks(range(len(shown)), [row["switch"] for row in shown])
        left.set_ylim(len(shown) - 0.4, -0.6)
        zoom(left, [row["bits"] for row in shown], 0.0)
        zoom(right, [row["time"] for row in shown], 1.0)
        left.set(xlabel="bits per byte at equal steps, on - off: left of 0 the switch helps\n"
                        "(filled: survives Holm; arrow: goes on)")  # fmt: skip
        right.set(xlabel="time of a step, on / off: left of 1\nit saves time (filled: not 1)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        return save_figure(figure, path)


def place(row: Mapping[str, Any]) -> tuple[bool, float]:
    """By bits; below them what has times alone."""
    effect = row["bits"] or row["time"]
    return row["bits"] is None, effect.value


def draw(axes: Any, y: int, effect: Effect, neutral: float, sure: bool) -> None:
    color = UNCLEAR if not sure else HELPS if effect.value < neutral else HURTS
    axes.plot([effect.low, effect.high], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
    axes.plot(effect.value, y, "o", color=color, markersize=5, markerfacecolor=color if sure else "white")


def zoom(axes: Any, effects: Sequence[Effect | None], neutral: float) -> None:
    """All dots are in sight; an interval of few seeds may be so wide that it would flatten the others: it is cut, and
    an arrow says so. `effects`: one a line, from above."""
    known = [effect for effect in effects if effect]
    furthest = max((abs(effect.value - neutral) for effect in known), default=0.0)
    low = min((effect.low for effect in known), default=neutral)
    high = max((effect.high for effect in known), default=neutral)
    room = 1.6 * furthest or 0.01
    left, right = max(low, neutral - room), min(high, neutral + room)
    margin = 0.05 * (right - left) or 0.01
    left, right = min(left, neutral) - margin, max(right, neutral) + margin
    axes.set_xlim(left, right)
    for y, effect in enumerate(effects):
        if effect is not None:
            if effect.low < left:
                axes.plot(left, y, marker=CARETLEFTBASE, color="black", markersize=4, clip_on=False)
            if effect.high > right:
                axes.plot(right, y, marker=CARETRIGHTBASE, color="black", markersize=4, clip_on=False)
