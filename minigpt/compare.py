"""Draws runs together: `python -m minigpt.compare runs/first runs/second [--out compare.png]`.

Of one run, bits per byte of its training batches, smoothed, and what held-out text showed; of several, the latter only.
Over steps, tokens or seconds. Refused: a folder without the metrics of a run of ours.
"""

import argparse
import math
from itertools import accumulate
from pathlib import Path

from common import cli, plots
from common.log import read_jsonl

PICTURE = "loss.png"
COLUMNS = ("step", "loss", "train_bits_per_byte")
AXES = ("step", "tokens", "seconds")
LOOKS = (("held-out text, a few windows", "held_out_look"), ("all of it", "held_out_bits_per_byte"))


def read_run(folder: Path) -> tuple[list[dict], list[dict]]:
    """(metrics, timing) of a run. Raises ValueError naming the folder when it holds no run."""
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder}: no metrics.jsonl: expected the folder of a run")
    rows = read_jsonl(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{folder}: metrics.jsonl is empty: expected a run of at least one step")
    if missing := [name for name in COLUMNS if name not in rows[0]]:
        raise ValueError(f"{folder}: metrics.jsonl has no {missing[0]}: expected the metrics of minigpt.train")
    timing = folder / "timing.jsonl"
    return rows, read_jsonl(timing) if timing.exists() else []


def smoothed(values: list[float], share: float = 0.05) -> list[float]:
    """An exponential moving average that begins at the first value."""
    return list(accumulate(values, lambda mean, value: mean + (value - mean) * share))


def positions(rows: list[dict], timing: list[dict], axis: str) -> dict[int, float]:
    """Where each logged step stands on the axis."""
    steps = [row["step"] for row in rows]
    if axis == "step":
        return {step: step for step in steps}
    taken = {row["step"]: row["step_ms"] / 1e3 for row in timing}
    if axis == "tokens":  # not by the config: a batch may grow on the way
        taken = {row["step"]: round(row["tokens_per_s"] * taken[row["step"]]) for row in timing}
    if missing := [step for step in steps if step not in taken]:
        raise ValueError(f"step {missing[0]} is not in timing.jsonl: expected a time for each step of metrics.jsonl")
    return dict(zip(steps, accumulate(taken[step] for step in steps), strict=True))


def series_of(folder: Path, axis: str = "step", prefix: str = "") -> dict[str, tuple[list, list]]:
    """The curves of one run, for `common.plots.curve`."""
    rows, timing = read_run(folder)
    place = positions(rows, timing, axis)
    series = {
        f"{prefix}training batches (smoothed)": (
            [place[row["step"]] for row in rows],
            smoothed([row["train_bits_per_byte"] for row in rows]),
        )
    }
    # Apart: a look is at few windows, so it may lie above or below the whole text.
    for label, name in LOOKS:
        if points := [(place[row["step"]], row[name]) for row in rows if name in row]:
            series[prefix + label] = tuple(zip(*points, strict=True))
    return series


def plot_run(folder: Path, reference: dict[str, float] | None = None) -> Path:
    """Draws loss.png of one run, with horizontal lines for `reference`."""
    path, series = folder / PICTURE, series_of(folder)
    plots.curve(path, series, xlabel="step", ylabel="bits per byte", title=folder.name, reference=reference)
    return path


def plot_runs(folders: list[Path], out: Path, axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"axis {axis!r}: expected one of {', '.join(AXES)}")
    series: dict[str, tuple[list, list]] = {}
    unique = len({folder.name for folder in folders}) == len(folders)
    for folder in folders:
        curves = series_of(folder, axis, prefix=f"{folder.name if unique else folder}: ")
        held_out = {name: curve for name, curve in curves.items() if any(label in name for label, _ in LOOKS)}
        series |= held_out if held_out and len(folders) > 1 else curves
    label = {"step": "step", "tokens": "tokens", "seconds": "seconds in training steps"}[axis]
    plots.curve(out, series, xlabel=label, ylabel="bits per byte", title=" beside ".join(f.name for f in folders))


def table(folders: list[Path]) -> str:
    lines = [f"{'run':24} {'steps':>7} {'last look':>10} {'all held out':>13} {'tokens/s':>10}"]
    for folder in folders:
        rows, timing = read_run(folder)
        look = [row["held_out_look"] for row in rows if "held_out_look" in row]
        final = [row["held_out_bits_per_byte"] for row in rows if "held_out_bits_per_byte" in row]
        speeds = sorted(row["tokens_per_s"] for row in timing)
        cells = (values[-1] if values else math.nan for values in (look, final))
        middle = speeds[len(speeds) // 2] if speeds else math.nan
        lines.append(
            f"{folder.name:24} {rows[-1]['step']:7} " + "{:10.4f} {:13.4f} ".format(*cells) + f"{middle:10,.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog=cli.program(), description="draw runs together", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="the picture")
    parser.add_argument("--axis", choices=AXES, default="step", help="the horizontal axis")
    arguments = parser.parse_args()
    plot_runs(arguments.runs, arguments.out, arguments.axis)
    print(table(arguments.runs))
    print(arguments.out)


if __name__ == "__main__":
    cli.run(main)
