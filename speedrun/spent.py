"""Where the time of a step goes: a stack of named parts, and a Comm whose calls are one of them.

Every moment belongs to the innermost part that is open, so parts never count twice and add up to the whole. On CUDA the
marks are events on the device's stream, which nothing waits for until the loop reads its losses: what shows is the
device's time, and a host that works ahead of it costs nothing. Refused: names that are no part, reading inside a part.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import plots
from parallel.comm import TorchComm, Work
from parallel.mesh import Group

PARTS = ("data", "forward", "backward", "optimizer", "communication")
OTHER = "other"  # what is in no part


class Spent:
    """`with spent("forward"): ...` between `begin` and `take`. Inside `with spent(None)` nothing counts at all.

    Communication is what calls and waits for collectives take on the thread that makes them: of a collective that
    overlaps with work only the wait that is left. Data is likewise the wait for a batch that a thread makes.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter):
        self.on_device, self.clock = torch.device(device).type == "cuda", clock
        self._open: list[str | None] = []
        self._marks: list[tuple[Any, str | None]] = []  # (moment, whose time begins there)

    @contextmanager
    def __call__(self, part: str | None) -> Iterator[None]:
        if part is not None and part not in PARTS:
            raise ValueError(f"part {part!r}: expected one of {', '.join(PARTS)}")
        outer = self._open[-1] if self._open else OTHER
        self._open.append(None if outer is None else part)
        self._mark(self._open[-1])
        try:
            yield
        finally:
            self._open.pop()
            self._mark(outer)

    def _mark(self, part: str | None) -> None:
        if self.on_device:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.clock()
        self._marks.append((moment, part))

    def begin(self) -> None:
        """Forgets what was."""
        assert not self._open, f"begin inside {self._open}"
        self._marks = []
        self._mark(OTHER)

    def take(self) -> dict[str, float]:
        """Seconds since `begin` by part, all of them and what is in none; on CUDA once the device is synchronised."""
        assert not self._open, f"take inside {self._open}"
        self._mark(OTHER)
        seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        if self.on_device:
            self._marks[-1][0].synchronize()
        for (start, part), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                seconds[part] += 1e-3 * start.elapsed_time(end) if self.on_device else end - start
        self.begin()
        return seconds


class TimedComm(TorchComm):
    """torch's collectives; the calls and the waits for them are spent on communication."""

    def __init__(self, group: Group, spent: Spent):
        super().__init__(group)
        self.spent = spent

    def _run(self, *arguments, **options) -> Work:
        if self.size == 1:
            return super()._run(*arguments, **options)
        with self.spent("communication"):
            work = super()._run(*arguments, **options)
        return Work(lambda: self._wait(work))

    def _wait(self, work: Work) -> None:
        with self.spent("communication"):
            work.wait()


# ---- of a finished run -----------------------------------------------------------------------------------------------


def mean_ms(timing: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean milliseconds of each part over the rows of a timing.jsonl."""
    return {part: statistics.fmean(row[f"{part}_ms"] for row in timing) for part in (*PARTS, OTHER)}


def parts_as_lines(parts: Mapping[str, float]) -> list[str]:
    """One line a part, with its share; shares add up to one."""
    whole = sum(parts.values())
    return [f"  {part:13}{ms:9.2f} ms  {ms / whole if whole else 0:6.1%}" for part, ms in parts.items()]


def draw(path: Path, parts: Mapping[str, float], title: str) -> Path:
    return plots.bars(path, list(parts), {"ms": list(parts.values())}, xlabel="ms a step", title=title)
