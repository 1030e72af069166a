"""Curves and bars made of characters, for a terminal: blocks and braille where it has them, ASCII where not.

All take plain lists of numbers. Refused: nothing; NaN and inf are the caller's to leave out.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, from above


class History:
    """A curve in at most `limit` points: of a long run each is the mean of as many values."""

    def __init__(self, limit: int) -> None:
        self.limit, self.per = limit, 1
        self.values: list[float] = []
        self.pending: list[float] = []

    def add(self, value: float) -> None:
        self.pending.append(value)
        if len(self.pending) == self.per:
            self.values.append(math.fsum(self.pending) / self.per)
            self.pending = []
        if len(self.values) == self.limit:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.per *= 2


def bar(share: float, width: int, unicode: bool) -> str:
    """Of `width` characters, the ASCII one's brackets included."""
    room = width if unicode else width - 2
    full = round(room * min(max(share, 0.0), 1.0))
    return "█" * full + "░" * (room - full) if unicode else f"[{'=' * full}{'.' * (room - full)}]"


def running(values: Sequence[float], total: float) -> list[float]:
    """0, and the share of the total after each value; the last is 1."""
    return [math.fsum(values[:count]) / total for count in range(len(values) + 1)]


def resampled(values: Sequence[float], points: int) -> list[float]:
    """Means of equal pieces; values are repeated where there are fewer of them than points."""
    edges = [i * len(values) // points for i in range(points + 1)]
    pieces = [values[a : max(a + 1, b)] for a, b in pairwise(edges)]
    return [math.fsum(piece) / len(piece) for piece in pieces]


def heights(values: Sequence[float], levels: int) -> tuple[list[int], float, float]:
    """(0 to levels - 1 for each value, what the lowest and the highest level stand for). The first tenth, which is
    far above the rest, does not count for the scale and may touch its top."""
    counted = values[len(values) // 10 :]
    low, high = min(counted), max(counted)
    scale = (levels - 1) / (high - low) if high > low else 0.0
    return [round((min(value, high) - low) * scale) if value > low else 0 for value in values], low, high


def sparkline(values: Sequence[float], width: int, unicode: bool) -> str:
    levels = "▁▂▃▄▅▆▇█" if unicode else "_.-=*#"
    return "".join(levels[height] for height in heights(resampled(values, width), len(levels))[0])


def braille(levels: Sequence[int], rows: int) -> list[str]:
    """`rows` lines, from above, of levels 0 to 4 rows - 1: two a character, joined by dots from one to the next."""
    cells = [[0] * ((len(levels) + 1) // 2) for _ in range(rows)]
    for x, level in enumerate(levels):
        before = levels[x - 1] if x else level
        for dot in range(min(level, before + 1), max(level, before - 1) + 1):
            row, part = divmod(4 * rows - 1 - dot, 4)
            cells[row][x // 2] |= DOTS[part][x % 2]
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def ascii_curve(levels: Sequence[int], rows: int) -> list[str]:
    """`rows` lines, from above, of levels 0 to 3 rows - 1: one a character."""
    return ["".join(".-'"[v % 3] if v // 3 == rows - 1 - row else " " for v in levels) for row in range(rows)]
