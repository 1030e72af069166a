"""What each rank was doing when a run broke, and the one report made of it: pure functions of plain data.

A Status is what a rank says of itself. Ranks that died come first in the report, then errors, then who waits for whom;
what follows from something above it is cut to a line. Errors that all ranks have alike are told once.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

from common.cli import program
from parallel.comm import Call
from parallel.processes import State

Kind = Literal["user", "bug"]  # one line for the user; a traceback
INNERMOST = 6  # frames of a stack in the merged report; the rank's own status has all


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """A call that has begun and is not known to be over."""

    name: str
    group: str
    ranks: tuple[int, ...]  # in the world
    number: int
    dtype: str
    payload: int
    peer: int | None  # in the world
    tag: str
    seconds: float

    @classmethod
    def of(cls, call: Call, now: float) -> "Waiting":
        peer = None if call.peer is None else call.group.ranks[call.peer]
        dtype = "" if call.dtype is None else str(call.dtype).removeprefix("torch.")
        return cls(call.name, call.group.label, call.group.ranks, call.number, dtype, call.payload, peer, call.tag,
                   now - call.started)  # fmt: skip

    def __str__(self) -> str:
        """`all_reduce no 17 of tp (ranks 2, 3; 64 KiB float32; grads of blocks.1)`."""
        peer = {"send": " to rank {}", "receive": " from rank {}", "broadcast": " from rank {}"}.get(self.name, "")
        about = [named(self.ranks)]
        if self.payload:
            about.append(f"{size(self.payload)} {self.dtype}")
        if self.tag:
            about.append(self.tag)
        return f"{self.name} no {self.number} of {self.group}{peer.format(self.peer)} ({'; '.join(about)})"


@dataclasses.dataclass(frozen=True, slots=True)
class Error:
    kind: Kind
    text: str  # the line for the user ("": nothing to say), or the traceback
    code: int  # that the process exits with

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Error":
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    rank: int
    waiting: tuple[Waiting, ...]
    stacks: tuple[
        str, ...
    ]  # one a Python thread, the main thread's first; frames as traceback.format_stack writes them
    error: Error | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Status":
        fields = json.loads(text)
        waiting = tuple(Waiting(**{**one, "ranks": tuple(one["ranks"])}) for one in fields["waiting"])
        error = Error(**fields["error"]) if fields["error"] else None
        return cls(fields["rank"], waiting, tuple(fields["stacks"]), error)


def size(count: float) -> str:
    """`12 B`, `64 KiB`, `1.5 MiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.4g} B"


def named(ranks) -> str:
    """`rank 2`, `ranks 0, 1`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


Silent = State | Literal["ended", "absent"]  # what became of a rank that has left no status


def report(alarm: Error, statuses: Mapping[int, Status], silent: Mapping[int, Silent]) -> str:
    """What to print, "" for nothing. `alarm` is what was noticed first."""
    users = {
        rank: status.error.text for rank, status in statuses.items() if status.error and status.error.kind == "user"
    }
    if users or alarm.kind == "user":
        alike = len(users) == len(statuses) + len(silent) and len(set(users.values())) == 1
        told = [text if alike else f"{named(ranks)}: {text}" for text, ranks in _by_text(users).items() if text]
        return "\n".join(f"{program()}: error: {line}" for line in (told if users else [alarm.text]))
    lines = [*_silent(silent), *_errors(statuses, "gone" in silent.values())] or [alarm.text]
    lines += [line for rank in sorted(statuses) if not statuses[rank].error for line in _doing(statuses[rank])]
    return "\n".join([*lines, *_missing(statuses)])


def exit_code(alarm: Error, statuses: Mapping[int, Status]) -> int:
    errors = [alarm, *(statuses[rank].error for rank in sorted(statuses) if statuses[rank].error)]
    return next((error.code for error in errors if error.kind == "user"), alarm.code)


def _by_text(texts: Mapping[int, str]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank in sorted(texts):
        ranks.setdefault(texts[rank], []).append(rank)
    return ranks


def _silent(silent: Mapping[int, Silent]) -> list[str]:
    what = {
        "gone": "died: its process is gone",
        "stopped": "is stopped (SIGSTOP or a debugger): it is killed now",
        "runs": "does not answer: its process runs, but not its Python; it is killed now",
        "elsewhere": "does not answer; it is on another machine",
        "ended": "has ended",
        "absent": "has not started",
    }
    return [f"rank {rank} {what[state]}" for rank, state in sorted(silent.items())]


def _errors(statuses: Mapping[int, Status], follow: bool) -> list[str]:
    """Tracebacks, one for all ranks that have it alike; where a rank died, the others' errors mostly follow from it."""
    bugs = {rank: status.error.text.strip() for rank, status in statuses.items() if status.error}
    if follow:
        return [f"rank {rank} then raised {text.splitlines()[-1]}" for rank, text in sorted(bugs.items())]
    return [f"{named(ranks)} raised\n{text}" for text, ranks in _by_text(bugs).items()]


def _doing(status: Status) -> list[str]:
    head = f"rank {status.rank}"
    if status.waiting:
        return [f"{head} waits in {call} for {call.seconds:.1f} s" for call in status.waiting]
    frames = status.stacks[0].splitlines(keepends=True) if status.stacks else []
    starts = [index for index, line in enumerate(frames) if line.startswith("  File ")][-INNERMOST:]
    shown = "".join(frames[starts[0] :] if starts else frames).rstrip()
    return [f"{head} is in no collective; its stack:\n{shown}"]


def _missing(statuses: Mapping[int, Status]) -> list[str]:
    """Who is waited for, call by call; of sends and receives the reader sees it."""
    here: dict[tuple, set[int]] = {}
    names: dict[tuple, set[str]] = {}
    for rank, status in statuses.items():
        for call in status.waiting:
            if call.name not in ("send", "receive"):
                key = (call.ranks, call.number, call.group)
                here.setdefault(key, set()).add(rank)
                names.setdefault(key, set()).add(call.name)
    lines = []
    for (ranks, number, group), present in sorted(here.items()):
        absent = [rank for rank in ranks if rank not in present]
        if absent:
            lines.append(f"no {number} of {group} ({named(ranks)}) lacks {named(absent)}")
        if len(names[ranks, number, group]) > 1:
            called = " and ".join(sorted(names[ranks, number, group]))
            lines.append(f"no {number} of {group} ({named(ranks)}): different collectives, {called}")
    return lines
