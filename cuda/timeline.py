"""Draws the pipelines of the attention ladder: `python -m cuda.timeline`.

Each step runs one block on the CPU model with its trace on; cuda/replay.py puts costs to it. One panel a step: when
loads arrive, when each warpgroup's products run and when its softmax. A model of time, not a measurement; the share of
time in which the tensor cores work is printed beside each name. Refused: steps that take more than one block.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common import cli
from common.plots import save_figure
from cuda import modules
from cuda.attention_ops import EVERYTHING, FORWARD
from cuda.replay import Interval, Replay, busy

COLORS = {"load": "#9aa5b1", "scores": "#2f6db3", "values": "#7fb2e5", "softmax": "#e08a3c", "wait": "#e6e6e6"}
WORDS = {"load": "K or V arrives", "scores": "Q K'", "values": "P V", "softmax": "softmax", "wait": "waits"}


@dataclass(frozen=True, slots=True)
class Config:
    steps: str = field(default="4,5,6,7,8", metadata={"help": "of the forward ladder, by number"})
    head_dim: int = field(default=128, metadata={"help": "elements of a head"})
    keys: int = field(default=1024, metadata={"help": "keys; the queries are one block's"})
    out: Path = field(default=Path("results/cuda/attention_timeline.png"), metadata={"help": "the picture"})

    def __post_init__(self) -> None:
        for step in self.steps.split(","):
            if not step.isdigit() or not 4 <= int(step) <= len(FORWARD):
                raise ValueError(f"steps {self.steps!r}: expected numbers from 4 to {len(FORWARD)}, as 4,5,6,7")
        if not 64 <= self.keys <= 8192:
            raise ValueError(f"keys {self.keys}: expected 64 to 8192")


def record(step: str, queries: int, keys: int, head_dim: int) -> list[tuple]:
    """The trace of one block: one head, `queries` queries."""
    module = modules.load("_simt")
    q, k, v = (torch.randn(1, 1, rows, head_dim).bfloat16() for rows in (queries, keys, keys))
    o, lse = torch.empty_like(q), torch.empty(1, 1, queries)
    with module.options(trace=True, multiprocessors=1):
        module.run(
            "attention_forward", step=step, q=q, k=k, v=v, o=o, lse=lse, scale=head_dim**-0.5, softcap=0.0,
            left=EVERYTHING, right=EVERYTHING,
        )  # fmt: skip
    return module.take_trace()


def queries_of_a_block(step: str, head_dim: int) -> int:
    """As many as one block takes; of a persistent step two tiles, to see the second begin while the first ends."""
    if step in FORWARD[7:]:
        return 256
    for queries in (192, 128, 64):
        if len({event[0] for event in record(step, queries, 64, head_dim)}) == 1:
            return queries
    raise ValueError(f"step {step}: takes more than one block for 64 queries")


def play(step: str, config: Config) -> tuple[list[Interval], float]:
    """What a block does, and the share of its time in which the tensor cores work."""
    queries = queries_of_a_block(step, config.head_dim)
    intervals = Replay(record(step, queries, config.keys, config.head_dim)).run()
    return intervals, busy(intervals, "scores", "values") / max(interval.end for interval in intervals)


def draw(played: dict[str, tuple[list[Interval], float]], path: Path) -> None:
    figure = Figure(figsize=(11, 1.9 * len(played)), layout="constrained")
    panels = figure.subplots(len(played), 1, sharex=True, squeeze=False)
    for panel, (step, (intervals, share)) in zip(panels[:, 0], played.items(), strict=True):
        groups = sorted({i.row for i in intervals if isinstance(i.row, int) and i.kind != "wait"})
        rows = [("loads", ("load",), "loads")]
        for n, group in enumerate(groups, start=1):
            rows += [(group, ("scores", "values"), f"tensor cores, {n}"), (group, ("softmax",), f"softmax, {n}")]
        for y, (row, kinds, _) in enumerate(rows):
            for kind in kinds:
                bars = [(i.start, i.end - i.start) for i in intervals if i.row == row and i.kind == kind]
                panel.broken_barh(bars, (-y - 0.4, 0.8), color=COLORS[kind], linewidth=0)
        panel.set_yticks([-y for y in range(len(rows))], [name for *_, name in rows], fontsize=8)
        panel.set_title(f"{step}: tensor cores busy {share:.0%} of the block's time", fontsize=9, loc="left")
    panels[-1, 0].set_xlabel("clocks of the model in cuda/replay.py, which is not a measurement")
    kinds = ("load", "scores", "values", "softmax")
    figure.legend(
        handles=[Patch(color=COLORS[k], label=WORDS[k]) for k in kinds], ncols=4, loc="upper right", fontsize=8
    )
    save_figure(figure, path)


def main() -> None:
    config = cli.parse(Config, prog=cli.program(), description="pipelines of the attention ladder, by a model of time")
    played = {}
    for number in map(int, config.steps.split(",")):
        step = FORWARD[number - 1]
        played[step] = play(step, config)
        intervals, share = played[step]
        end = max(interval.end for interval in intervals)
        print(
            f"{step}: {end:,.0f} clocks, tensor cores busy {share:.0%}, softmax {busy(intervals, 'softmax') / end:.0%}"
        )
    draw(played, config.out)
    print(config.out)


if __name__ == "__main__":
    cli.run(main)
