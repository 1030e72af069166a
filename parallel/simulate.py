"""When each instruction of a pipeline schedule begins and ends, were all ranks as fast as told: the same lists that
pipeline.py runs, executed on paper.

A message takes its time without keeping the sender busy. Refused: schedules that deadlock (see schedules.execution).
"""

import math
from collections import defaultdict, deque
from dataclasses import dataclass, fields

from parallel.schedules import Instruction, Lists, execution, peak, with_communication


@dataclass(frozen=True, slots=True)
class Durations:
    """Of one chunk and micro-batch, in any unit of time. B takes I and W together."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    communication: float = 0.0  # from the end of one chunk to the start of the next, on another rank

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (0 <= getattr(self, field.name) < math.inf):
                raise ValueError(f"{field.name} {getattr(self, field.name)}: expected a number of at least 0")

    def of(self, x: Instruction) -> float:
        half = {"F": self.forward, "I": self.input_gradient, "W": self.weight_gradient}
        return half["I"] + half["W"] if x.kind == "B" else half.get(x.kind, 0.0)


@dataclass(frozen=True, slots=True)
class Event:
    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What each rank computes, in order, and how many activations it has at most."""

    events: list[list[Event]]
    peaks: list[int]

    @property
    def total(self) -> float:
        """From the first start to the last end."""
        return max(e.end for row in self.events for e in row) - min(e.start for row in self.events for e in row)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        busy = math.fsum(e.end - e.start for row in self.events for e in row)
        return 1 - busy / (self.total * len(self.events)) if self.total else 0.0


def simulate(lists: Lists, durations: Durations | None = None) -> Timeline:
    """Of computing instructions by rank. Raises ValueError when they deadlock."""
    durations = durations or Durations()
    stages = len(lists)
    clock = [0.0] * stages
    arrivals: dict[tuple[int, int], deque[float]] = defaultdict(deque)
    events: list[list[Event]] = [[] for _ in lists]
    for rank, x in execution(with_communication(lists)):
        if x.kind.startswith("SEND"):
            target = x.chunk + 1 if x.kind == "SEND_F" else x.chunk - 1
            arrivals[rank, target % stages].append(clock[rank] + durations.communication)
        elif x.kind.startswith("RECV"):
            source = x.chunk - 1 if x.kind == "RECV_F" else x.chunk + 1
            clock[rank] = max(clock[rank], arrivals[source % stages, rank].popleft())
        else:
            start, clock[rank] = clock[rank], clock[rank] + durations.of(x)
            events[rank].append(Event(x, start, clock[rank]))
    return Timeline(events, [peak(instructions) for instructions in lists])
