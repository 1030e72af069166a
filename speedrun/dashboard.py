"""The live view of a race: some lines of a terminal that are drawn over in place.

`view(run)` gives the view that RunLog takes, or None where stdout is no terminal: then there are plain lines now and
then. It shows what is filed and nothing else. Lines are cut to the terminal's width and to its height, whatever it is
by now; without UTF-8 they are ASCII, with NO_COLOR they are plain. The cursor is hidden only within one drawing and
rests below the last line, so nothing has to be put back, not even after SIGKILL. Refused: nothing.
"""

import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from time import monotonic
from typing import Any

from common.log import REDRAW_S, Pace, format_duration, live_terminal, read_jsonl
from common.results import device_name
from common.sparks import History, ascii_curve, bar, braille, heights, resampled, running, sparkline
from minigpt.train_config import plain
from speedrun.config import RaceConfig
from speedrun.presets import PRESETS
from speedrun.run_files import parts_of
from speedrun.schedule import plan
from speedrun.tracks import NATS, TRACKS, nats_per_bit, predicted

BEGIN, END = "\x1b[?2026h\x1b[?25l", "\x1b[?25h\x1b[?2026l"  # one drawing is one update, as far as terminals know that
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"
BOLD, DIM, CYAN, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
LABEL = 11  # columns of what a line is about
NARROW = 40  # columns: below, labels are as short as they can be, and there is no curve
CURVE = 3  # lines of the curve where there is room
KEPT = 512  # points of the curve in memory
IMPORTANCE = ("progress", "bits/byte", "loss", "speed", "title", "curve", "step", "schedule")
Line = list[tuple[str, str]]  # (text, style)


def view(run: Any, track: str = "") -> "Dashboard | None":
    """Of a run (speedrun.state.Run) that is about to go on; `track` is its track, "" for none. None without a live
    terminal."""
    if not live_terminal():
        return None
    config, world = run.config, run.world
    ranks = f"{world.world_size} rank{'s' * (world.world_size > 1)}"
    size = f"{run.model.num_parameters() / 1e6:,.1f} M parameters in {str(run.dtype).removeprefix('torch.')}"
    where = [f"preset {name}" for name, preset in PRESETS.items() if plain(preset) == plain(config)]
    where.append(f"track {track}" if track else f"corpus {config.corpus}")
    target = f"target {TRACKS[track].target:.2f} {TRACKS[track].unit}" if track else ""
    nats = nats_per_bit(predicted(run.data)) if track and TRACKS[track].unit == NATS else 0.0
    title = (f"{config.folder}", *where, size, f"{device_name(world.device)}, {ranks}")
    dashboard = Dashboard(title, config, run.step, run.seconds, target, nats)
    path = config.folder / "metrics.jsonl"
    for row in read_jsonl(path) if run.step and path.exists() else ():
        if row["step"] <= run.step:  # later ones are lost with the steps that a kill has undone
            dashboard.take(row["step"], row)
    return dashboard


class Dashboard:
    """A common.log.View. `title`: what is said about the run, the most important first; `start` and `seconds`: steps
    and time on the clock before this sitting; `nats`: a token of held-out text for one bit per byte, where the target
    is in nats, else 0."""

    def __init__(
        self,
        title: Sequence[str],
        config: RaceConfig,
        start: int = 0,
        seconds: float = 0.0,
        target: str = "",
        nats: float = 0.0,
    ) -> None:
        self.title, self.config = [printable(part) for part in title], config
        self.target, self.nats = target, nats
        self.step, self.seconds = start, seconds
        self.latest: dict[str, Any] = {}  # of each name the value filed last
        self.look: tuple[int, str, float] | None = None  # the last look at held-out text: step, of what, bits per byte
        self.losses = History(KEPT)
        self.pace = Pace(config.steps, start)
        self.drawn: list[int] = []  # the length of each line on the screen
        self.drawn_at = -math.inf
        self.closed = False

    # ---- a View ----

    def filed(self, step: int, values: Mapping[str, Any]) -> None:
        self.take(step, values)
        self.seconds += values.get("step_ms", 0.0) / 1e3

    def show(self, step: int, shown: Mapping[str, Any]) -> None:
        """`shown` is for the plain lines: all of it is filed too."""
        now = monotonic()
        self.step = step
        if now - self.drawn_at >= REDRAW_S:
            self._draw()
        self.pace.reported(step, now)

    def message(self, text: str) -> None:
        self._draw(text.rstrip("\n") + "\n")

    def close(self) -> None:
        if not self.closed:
            self._draw()
        self.closed = True

    def take(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of that step, of this sitting or an earlier one."""
        self.latest |= values
        if "loss" in values:
            self.losses.add(float(values["loss"]))
        for name, what in (("held_out_look", f"at step {step}"), ("held_out_bits_per_byte", "on all of it")):
            if name in values:
                self.look = (step, what, float(values[name]))

    # ---- drawing ----

    def _draw(self, message: str = "") -> None:
        columns, rows = shutil.get_terminal_size()
        lines = self.frame(columns - 1, rows - 1, fancy())
        # A terminal that became narrower has broken the old lines: they take more rows than there were lines.
        above = sum(max(1, -(-length // columns)) for length in self.drawn)
        text = BEGIN + "\r" + (f"\x1b[{above}A" if above else "")
        text += CLEAR_BELOW + message if message else ""
        colour = not os.environ.get("NO_COLOR")
        text += "".join(painted(line, colour) + CLEAR_LINE + "\n" for line in lines) + CLEAR_BELOW + END
        sys.stdout.write(text)
        sys.stdout.flush()
        self.drawn, self.drawn_at = [width_of(line) for line in lines], monotonic()

    def frame(self, width: int, height: int, unicode: bool = True) -> list[Line]:
        """What is drawn, at most `height` lines of at most `width` characters: the more important parts first."""
        width, marks = max(width, 1), len(self.losses.values) > 1
        parts = {
            "title": [fitted("", self.title, width, BOLD)],
            "progress": [self._progress(width, unicode)],
            "loss": [self._loss(width, unicode)],
            "curve": curve_lines(self.losses, self._shown_loss(), width, unicode) if marks and width >= NARROW else [],
            "bits/byte": [fitted("bits/byte", self._bits(), width)],
            "speed": [fitted("speed", self._speed(), width)],
            "schedule": [fitted("schedule", self._schedule(), width)],
            "step": [fitted("a step", self._parts(width), width)],
        }
        kept, left = set(), max(height, 1)
        for name in IMPORTANCE:
            lines = [line for line in parts[name] if line]
            extra = len(lines) - (1 if name == "curve" else 0)  # the curve takes the place of the loss
            if lines and extra <= left:
                kept.add(name)
                left -= extra
        if "curve" in kept:
            kept.discard("loss")
        return [line for name, lines in parts.items() if name in kept for line in lines if line]

    def _progress(self, width: int, unicode: bool) -> Line:
        share = self.step / self.config.steps
        now = monotonic()
        fields = [f"{self.step}/{self.config.steps}", f"eta {format_duration(self.pace.left(self.step, now))}"]
        fields += [f"clock {format_duration(self.seconds)}"]
        if self.step == self.pace.began[0]:
            fields[1:] = ["the first step compiles" if self.config.compile else "the first step"]
        fields = [f"{share:4.0%}", *fields]
        while len("  ".join(fields)) > width and len(fields) > 1:
            fields.pop()
        text = "  ".join(fields)
        room = min(width - len(text) - 2, 40)
        if room < 4:
            return [(text if len(text) <= width else "", "")]
        return [(fields[0] + "  ", ""), (bar(share, room, unicode), CYAN), (text[len(fields[0]) :], "")]

    def _shown_loss(self) -> str:
        return f"{float(self.latest['loss']):.3f}" if "loss" in self.latest else ""

    def _loss(self, width: int, unicode: bool) -> Line:
        if not self.losses.values:
            return []
        start = fitted("loss", [self._shown_loss()], width)
        room = min(width - width_of(start) - 2, 60)
        return [*start, ("  " + sparkline(self.losses.values, room, unicode), CYAN)] if start and room >= 8 else start

    def _bits(self) -> list[str]:
        fields = [f"held out {self.look[2]:.4f} {self.look[1]}"] if self.look else []
        fields += [f"{self.look[2] * self.nats:.4f} nats per token"] if self.look and self.nats else []
        fields += [self.target] if self.target else []
        if "train_bits_per_byte" in self.latest:
            fields.append(f"train {float(self.latest['train_bits_per_byte']):.3f}")
        return fields

    def _speed(self) -> list[str]:
        units = (
            ("tokens_per_s", "{:,.0f} tokens/s", 1.0), ("mfu", "MFU {:.1%}", 1.0),
            ("step_ms", "{:,.0f} ms a step", 1.0), ("memory_bytes", "{:,.2f} GB", 1e-9),
        )  # fmt: skip
        return [text.format(float(self.latest[name]) * unit) for name, text, unit in units if name in self.latest]

    def _schedule(self) -> list[str]:
        now = plan(min(max(self.step - 1, 0), self.config.steps - 1), self.config)
        fields = [f"rate {float(self.latest.get('lr_share', now.lr_share)):.0%} of its peak"]
        fields.append(f"{now.rows} rows of {now.context} tokens")
        return fields + ([f"window {now.window}"] if now.window else [])

    def _parts(self, width: int) -> list[str]:
        """Shares of the last step's parts, and a bar of their first letters."""
        parts = {name: value for name, value in parts_of(self.latest).items() if value > 0}
        total = sum(parts.values())
        if not total > 0:
            return []
        fields = [f"{name} {value / total:.0%}" for name, value in parts.items()]
        room = min(width - LABEL - len("  ".join(fields)) - 2, 30)
        if room >= 2 * len(parts):
            edges = [round(room * share) for share in running(list(parts.values()), total)]
            letters = ["." if name == "other" else name[0].upper() for name in parts]
            fields.append("".join(c * (b - a) for c, (a, b) in zip(letters, pairwise(edges), strict=True)))
        return fields


# ---- pieces of a line ------------------------------------------------------------------------------------------------


def fancy() -> bool:
    """Whether blocks and braille arrive; the Linux console has no letters for them."""
    try:
        "█⣿".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return os.environ.get("TERM") != "linux"


def printable(text: str) -> str:
    """One column a character: what is wider, has no width, or moves the cursor becomes `?`."""
    return "".join(
        c if c.isprintable() and unicodedata.east_asian_width(c) not in "WF" and not unicodedata.combining(c) else "?"
        for c in text
    ).encode(sys.stdout.encoding or "ascii", "replace").decode(sys.stdout.encoding or "ascii")  # fmt: skip


def fitted(label: str, fields: Sequence[str], width: int, style: str = "") -> Line:
    """The label and as many fields as fit, none of them cut: half a number is a wrong one. Empty if none fits."""
    start = (label.ljust(LABEL) if width >= NARROW else f"{label} ") if label else ""
    count = next((n for n in range(len(fields), 0, -1) if len(start + "  ".join(fields[:n])) <= width), 0)
    return [(start, DIM), ("  ".join(fields[:count]), style)] if count else []


def width_of(line: Line) -> int:
    return sum(len(text) for text, _ in line)


def painted(line: Line, colour: bool) -> str:
    return "".join(f"{style}{text}{PLAIN}" if colour and style and text else text for text, style in line)


def curve_lines(losses: History, current: str, width: int, unicode: bool) -> list[Line]:
    """CURVE lines: label and last value, the ends of the scale, the curve over all steps so far."""
    start = LABEL + 8
    columns = min(width - start, 100)
    levels, low, high = heights(
        resampled(losses.values, columns * (2 if unicode else 1)), CURVE * (4 if unicode else 3)
    )
    drawn = braille(levels, CURVE) if unicode else ascii_curve(levels, CURVE)
    left = ("loss", f"now {current}", *[""] * (CURVE - 2))
    scale = (f"{high:.3f}", *[""] * (CURVE - 2), f"{low:.3f}")
    return [
        [(label.ljust(LABEL), DIM if label == "loss" else ""), (number.rjust(6)[:7].ljust(8), DIM), (text, CYAN)]
        for label, number, text in zip(left, scale, drawn, strict=True)
    ]
