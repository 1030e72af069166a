"""The timeline of a pipeline as an SVG picture: one row a rank, one box a computation with its micro-batch's number.

The same timeline gives the same text, whatever the day and the machine. Refused: an empty timeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from parallel.schedules import Name, bubble, check, schedule
from parallel.simulate import Durations, Event, Timeline, simulate

NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
COLOURS = {"F": ("#9ecae1", "#4292c6"), "B": ("#a1d99b", "#41ab5d"), "I": ("#fdd0a2", "#fd8d3c"),
           "W": ("#dadaeb", "#807dba")}  # fmt: skip
# ...of a rank's first chunk and of its last; those between are mixed.
ROW, LEFT, TOP, WIDTH = 26, 64, 52, 1000  # pixels; WIDTH of the time axis


def svg(timeline: Timeline, title: str) -> str:
    if not any(timeline.events):
        raise ValueError("a timeline without events: expected at least one")
    stages = len(timeline.events)
    chunks = 1 + max(e.instruction.chunk for row in timeline.events for e in row) // stages
    begin = min(e.start for row in timeline.events for e in row)
    unit = WIDTH / (timeline.total or 1.0)
    height = TOP + stages * ROW + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 12} {height}" '
        f'font-family="sans-serif" font-size="11">',
        f"<title>{_escape(title)}</title>",
        f'<rect width="{LEFT + WIDTH + 12}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{_escape(title)}</text>',
        *_legend(timeline),
    ]
    for rank, row in enumerate(timeline.events):
        y = TOP + rank * ROW
        lines.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">rank {rank}</text>')
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW - 4}" fill="#f0f0f0"/>')
        for event in row:
            lines += _box(event, LEFT + (event.start - begin) * unit, y, unit, stages, chunks)
    return "\n".join([*lines, "</svg>", ""])


def _box(event: Event, x: float, y: int, unit: float, stages: int, chunks: int) -> list[str]:
    instruction, width = event.instruction, (event.end - event.start) * unit
    shade = instruction.chunk // stages / max(1, chunks - 1)
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 4}" '
        f'fill="{_mix(*COLOURS[instruction.kind], shade)}" stroke="#ffffff" stroke-width="0.7">'
        f"<title>{instruction}: {event.start:.6g} to {event.end:.6g}</title></rect>"
    )
    number = str(instruction.microbatch)
    if width < 6 * len(number):
        return [box]
    return [box, f'<text x="{x + width / 2:.2f}" y="{y + 15}" text-anchor="middle">{number}</text>']


def _legend(timeline: Timeline) -> list[str]:
    kinds = {e.instruction.kind for row in timeline.events for e in row}
    lines, x = [], LEFT
    for kind, name in NAMES.items():
        if kind in kinds:
            lines.append(f'<rect x="{x}" y="28" width="12" height="12" fill="{COLOURS[kind][0]}"/>')
            lines.append(f'<text x="{x + 17}" y="38">{name}</text>')
            x += 120
    return lines


def _mix(first: str, last: str, share: float) -> str:
    """Of two colours like #0088ff."""
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True, slots=True)
class Config:
    draw: Name = field(default="1f1b", metadata={"help": "the schedule"})
    stages: int = field(default=4, metadata={"help": "pipeline ranks"})
    microbatches: int = field(default=8, metadata={"help": "parts of the batch"})
    chunks: int = field(default=1, metadata={"help": "of the model, on each rank; interleaved-1f1b has 2 or more"})
    forward: float = field(default=1.0, metadata={"help": "time of one chunk's F"})
    input_gradient: float = field(default=1.0, metadata={"help": "time of I, the first part of B"})
    weight_gradient: float = field(default=1.0, metadata={"help": "time of W, the rest of B"})
    communication: float = field(default=0.0, metadata={"help": "time of a message"})
    out: Path | None = field(default=None, metadata={"help": "the SVG file; none is one in runs/"})

    def __post_init__(self) -> None:
        check(self.draw, self.stages, self.microbatches, self.chunks)
        _ = self.durations

    @property
    def durations(self) -> Durations:
        return Durations(self.forward, self.input_gradient, self.weight_gradient, self.communication)


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(Config, argv, prog=cli.program(), description="draw and time a pipeline schedule")
    shape = (config.stages, config.microbatches, config.chunks)
    timeline = simulate(schedule(config.draw, *shape), config.durations)
    name = "-".join([config.draw, "x".join(map(str, shape[: 3 if config.chunks > 1 else 2]))])
    of_chunks = f", {config.chunks} chunks a rank" if config.chunks > 1 else ""
    summary = f"{config.draw}, {config.stages} ranks, {config.microbatches} micro-batches{of_chunks}"
    share = f"bubble {timeline.bubble:.4f}"
    out = config.out or Path("runs") / f"pipeline-{name}.svg"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(svg(timeline, f"{summary}: {share}, {max(timeline.peaks)} activations at most"))
    print(summary)
    print(f"{share} (published, for F = I = W and no communication: {bubble(config.draw, *shape):.4f})")
    print(f"peak activations by rank: {' '.join(map(str, timeline.peaks))} (pairs of chunk and micro-batch)")
    print(out)
