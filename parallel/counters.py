"""How many bytes each collective of each group moves: by the formulas, per step, as a table; and by the kernel.

    S  payload: bytes of the call's largest tensor      W  ranks of the group

The wire bytes of a call are what a mean rank of its group sends, by parallel/costs.py. Refused: to know by itself which
collectives are in use: that is the caller's `formula`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from parallel.comm import Call
from parallel.costs import bytes_sent
from parallel.waits import size

Formula = Callable[[str, int, int], float]  # (name, payload, W) -> bytes that a mean rank sends
TORCH: Formula = partial(bytes_sent, kind="torch")
OURS: Formula = partial(bytes_sent, kind="ours")


@dataclass(slots=True)
class Count:
    calls: int = 0
    payload: int = 0
    wire: float = 0.0

    def add(self, payload: int, wire: float) -> None:
        self.calls += 1
        self.payload += payload
        self.wire += wire


class Counters:
    """A Listener for every Comm of a rank; `counts` by (group, collective), since the start."""

    def __init__(self, formula: Formula = TORCH):
        self.formula = formula
        self.counts: dict[tuple[str, str], Count] = {}
        self.steps = 0

    def started(self, call: Call) -> None:
        count = self.counts.setdefault((call.group.label, call.name), Count())
        count.add(call.payload, self.formula(call.name, call.payload, call.group.size))

    def ended(self, call: Call) -> None:
        pass

    def step(self) -> None:
        """A step is over."""
        self.steps += 1

    def table(self) -> str:
        return table(self.counts, self.steps)


def table(counts: Mapping[tuple[str, str], Count], steps: int = 0) -> str:
    """One line a group and collective, and the sum; means of a step, or with 0 steps the totals."""
    per = max(1, steps)
    rows = [("group", "collective", "calls", "payload", "on the wire")]
    total = Count()
    for (group, name), count in sorted(counts.items()):
        rows.append((group, name, f"{count.calls / per:g}", size(count.payload / per), size(count.wire / per)))
        total = Count(total.calls + count.calls, total.payload + count.payload, total.wire + count.wire)
    rows.append(("all", "", f"{total.calls / per:g}", size(total.payload / per), size(total.wire / per)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{'mean of a step' if steps else 'in all'}, one rank"]
    for row in rows:
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        texts += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(texts))
    return "\n".join(lines)


def loopback_bytes(path: Path = Path("/proc/net/dev")) -> int:
    """All bytes that processes of this machine have sent each other, with the headers of TCP and IP: take differences.

    Raises OSError where there is no /proc, ValueError where there is no loopback.
    """
    for line in path.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])  # after eight numbers of what was received: bytes sent
    raise ValueError(f"{path}: expected a line for lo")
