"""The picture of a trace: ranks below each other, in each of them a lane of computation and one a group.

Nested spans of computation stand on the one that holds them. Refused: a window without an event.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.log import atomic_write
from common.plots import STYLE
from parallel.trace import BLOCK, COMPUTE, RankTrace

HEIGHT = 0.8  # of a lane, whose distance is 1
RANK_GAP = 0.6
SPANS = {"forward": "#56B4E9", "backward": "#0072B2", "recompute": "#A9C7DD", "other": "#D9D9D9"}
CALLS = {
    "all_reduce": "#D55E00",
    "reduce_scatter": "#E69F00",
    "all_gather": "#009E73",
    "broadcast": "#F0E442",
    "all_to_all": "#882255",
    "send": "#CC79A7",
    "receive": "#F2D5E4",
    "barrier": "#000000",
}
DARK = {SPANS["backward"], CALLS["all_reduce"], CALLS["all_gather"], CALLS["all_to_all"], CALLS["barrier"]}


def draw(path: Path | str, traces: Sequence[RankTrace], start_ms: float = 0.0, stop_ms: float = math.inf) -> Path:
    """Writes a PNG. Raises ValueError when nothing happens between start_ms and stop_ms."""
    shown = [(trace, _within(trace.events, start_ms, stop_ms)) for trace in traces]
    ends = [1e3 * event["ended"] for _, events in shown for event in events]
    if not ends:
        raise ValueError(f"nothing to draw from {start_ms:g} to {stop_ms:g} ms")
    stop_ms = min(stop_ms, max(ends))
    rows: list[tuple[float, str]] = []
    with matplotlib.rc_context(STYLE):
        lanes = sum(_depth(events) + len(_calls(events)) for _, events in shown)
        figure = Figure(figsize=(10.0, 1.1 + 0.24 * (lanes + RANK_GAP * len(shown))), layout="constrained")
        axes = figure.add_subplot()
        y, used = 0.0, set()
        for trace, events in shown:
            y = _draw_rank(axes, trace, events, y, rows, used, stop_ms - start_ms) + RANK_GAP
        axes.set_xlim(start_ms, stop_ms)
        axes.set_ylim(y - RANK_GAP, -HEIGHT / 2 - 0.2)
        axes.set_yticks([place for place, _ in rows], [label for _, label in rows], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("ms")
        patches = [
            Patch(color=color, label=name.replace("_", "-")) for name, color in (SPANS | CALLS).items() if name in used
        ]
        figure.legend(handles=patches, loc="outside upper center", ncols=min(8, len(patches)), fontsize=8)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
        atomic_write(path, data.getvalue())
    return Path(path)


def _within(events: list[dict[str, Any]], start_ms: float, stop_ms: float) -> list[dict[str, Any]]:
    return [event for event in events if 1e3 * event["ended"] > start_ms and 1e3 * event["began"] < stop_ms]


def _calls(events: list[dict[str, Any]]) -> list[str]:
    return sorted({event["lane"] for event in events} - {COMPUTE})


def _levels(events: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Each span of computation with the number of those that hold it."""
    levels, holders = [], []
    for event in sorted((e for e in events if e["lane"] == COMPUTE), key=lambda e: (e["began"], -e["ended"])):
        while holders and holders[-1] <= event["began"]:
            holders.pop()
        levels.append((len(holders), event))
        holders.append(event["ended"])
    return levels


def _depth(events: list[dict[str, Any]]) -> int:
    return max((level + 1 for level, _ in _levels(events)), default=0)


def _draw_rank(axes: Axes, trace: RankTrace, events, y: float, rows, used: set[str], width_ms: float) -> float:
    """From y downwards; returns where the next rank may begin."""
    depth = _depth(events)
    for level, event in _levels(events):
        kind = event["args"].get(BLOCK, "other")
        _bar(
            axes,
            event,
            y + level,
            SPANS[kind],
            event["name"].removesuffix(f" {kind}").removeprefix("blocks."),
            width_ms,
        )
        used.add(kind)
    if depth:
        rows.append((y + (depth - 1) / 2, f"rank {trace.rank}  {COMPUTE}"))
    y += depth
    for lane in _calls(events):
        for event in events:
            if event["lane"] == lane:
                _bar(axes, event, y, CALLS[event["name"]], event["args"]["tag"], width_ms)
                used.add(event["name"])
        rows.append((y, lane if depth else f"rank {trace.rank}  {lane}"))
        y += 1
    return y


def _bar(axes: Axes, event: dict[str, Any], y: float, color: str, text: str, width_ms: float) -> None:
    began, ended = 1e3 * event["began"], 1e3 * event["ended"]
    axes.barh(y, ended - began, HEIGHT, began, color=color, edgecolor="white", linewidth=0.3)
    if (ended - began) / width_ms > 0.012 * (len(text) + 1):  # about a letter's width in the picture
        axes.text((began + ended) / 2, y, text, ha="center", va="center", fontsize=7, clip_on=True,
                  color="white" if color in DARK else "black")  # fmt: skip
