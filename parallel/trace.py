"""What every rank did when: spans of computation and of each collective, in one trace that chrome://tracing and
ui.perfetto.dev open, and as a picture. `python -m parallel.trace --folder RUN`.

Each rank keeps its events in memory and writes rank-N.jsonl at the end; `merge` puts them on rank 0's clock. Times are
those of the host: on a GPU a span of computation is that of its launch. A collective that is not waited for lasts until
the wait. Refused: files of different runs in one folder.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import cli
from common.log import atomic_write
from parallel.clocks import Offset, clock_offset
from parallel.comm import Call, Comm
from parallel.counters import TORCH, Count, Formula, table
from parallel.model import StageGPT
from parallel.processes import machine

COMPUTE = "compute"
BLOCK = "block"  # what a span of a transformer block has in its args


class Tracer:
    """A Listener for every Comm of this rank. `on` may be changed at any time: what begins while it is off is left
    out."""

    def __init__(self, folder: Path | str, rank: int, world_size: int, formula: Formula = TORCH):
        self.folder, self.rank, self.world_size, self.formula = Path(folder), rank, world_size, formula
        self.on = True
        self.offset = Offset(0.0, 0.0)
        self.run = 0  # the same number on all ranks, another one in each run
        self._events: list[dict[str, Any]] = []
        self._open: set[int] = set()

    def align(self, world: Comm, *, shared: bool | None = None, device: torch.device | str = "cpu") -> None:
        """All ranks at the same time, before the first event: finds how their clocks differ."""
        self.offset = clock_offset(world, shared=shared, device=device)
        run = torch.tensor(time.time_ns() if world.rank == 0 else 0, dtype=torch.int64, device=device)
        world.broadcast(run, tag="run")
        self.run = int(run)

    def started(self, call: Call) -> None:
        if self.on:
            self._open.add(id(call))

    def ended(self, call: Call) -> None:
        if id(call) in self._open:
            self._open.remove(id(call))
            wire = self.formula(call.name, call.payload, call.group.size)
            args = {"number": call.number, "payload": call.payload, "wire": wire, "tag": call.tag}
            args |= {} if call.peer is None else {"peer": call.group.ranks[call.peer]}
            self._add(call.group.label, call.name, call.started, call.ended, args)

    @contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """What happens inside is a span of computation; spans may be nested."""
        began, on = time.perf_counter(), self.on
        try:
            yield
        finally:
            if on:
                self._add(COMPUTE, name, began, time.perf_counter(), args)

    def watch(self, stages: Iterable[StageGPT]) -> list[torch.utils.hooks.RemovableHandle]:
        """From now on each forward and backward of each block is a span. A forward that activation checkpointing does
        again is a span `recompute`. The backward of a block whose input needs no gradient has no span."""
        handles = []
        for stage in stages:
            for layer, block in stage.blocks.items():
                spans = _BlockSpans(self, f"blocks.{layer}")
                handles.append(block.register_forward_pre_hook(spans.before))
                handles.append(block.register_forward_hook(spans.after, always_call=True))
        return handles

    def save(self) -> Path:
        """Writes this rank's file; with the others' it is what `merge` reads."""
        head = {"rank": self.rank, "world_size": self.world_size, "run": self.run, "machine": machine().split()[0],
                "offset_s": self.offset.seconds, "offset_error_s": self.offset.error}  # fmt: skip
        path = self.folder / f"rank-{self.rank}.jsonl"
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in (head, *self._events)))
        return path

    def _add(self, lane: str, name: str, began: float, ended: float, args: dict[str, Any]) -> None:
        self._events.append({"lane": lane, "name": name, "began": began, "ended": ended, "args": args})


class _BlockSpans:
    """A backward pass begins with the gradient of the block's output and ends with that of its input."""

    def __init__(self, tracer: Tracer, name: str):
        self.tracer, self.name = tracer, name
        self.began: list[float] = []  # a stack: a forward within a backward is activation checkpointing's

    def before(self, block: nn.Module, inputs: tuple) -> None:
        self.began.append(time.perf_counter())

    def after(self, block: nn.Module, inputs: tuple, out: Tensor | None) -> None:
        """`out` is None where checkpointing has broken the second forward off, having all that it needs."""
        again = torch._C._current_graph_task_id() != -1  # within a backward pass; torch.distributed asks so too
        self._end("recompute" if again else "forward", self.began.pop())
        x_BTC = inputs[0]
        if not again and out.requires_grad and x_BTC.requires_grad:
            began: list[float] = []
            before = getattr(x_BTC, "backward_began", None)
            out.register_hook(lambda _: began.append(time.perf_counter()))
            x_BTC.register_hook(lambda _: self._backward(began, before))
            out.backward_began = began

    def _backward(self, began: list[float], before: list[float] | None) -> None:
        """`before` is of the block whose output is this one's input: its hook on that tensor has just run, and is where
        the one ends and the other begins."""
        if began:
            self._end("backward", began.pop(), before[-1] if before else None)

    def _end(self, what: str, began: float, ended: float | None = None) -> None:
        if self.tracer.on:
            self.tracer._add(COMPUTE, f"{self.name} {what}", began, ended or time.perf_counter(), {BLOCK: what})


@dataclass(slots=True)
class RankTrace:
    """One rank's events on rank 0's clock, in seconds after the first event of all ranks."""

    rank: int
    machine: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def lanes(self) -> list[str]:
        """compute first, then the groups; calls of one group that overlap have lanes of their own, `fsdp (2)`."""
        return sorted({event["lane"] for event in self.events}, key=lambda lane: (lane != COMPUTE, lane))

    def counts(self) -> dict[tuple[str, str], Count]:
        counts: dict[tuple[str, str], Count] = {}
        for event in self.events:
            if event["lane"] != COMPUTE:
                count = counts.setdefault((event["lane"].partition(" (")[0], event["name"]), Count())
                count.add(event["args"]["payload"], event["args"]["wire"])
        return counts


def read_traces(folder: Path | str) -> list[RankTrace]:
    """By rank. Raises UserError when there is none, or when they are not of one run."""
    files = sorted(Path(folder).glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    if not files:
        raise cli.UserError(f"no trace in {folder}: expected rank-0.jsonl and so on, which a run with tracing writes")
    heads, traces = [], []
    for path in files:
        head, *events = map(json.loads, path.read_text().splitlines())
        for event in events:
            event["began"] += head["offset_s"]
            event["ended"] += head["offset_s"]
        heads.append(head)
        traces.append(RankTrace(head["rank"], head["machine"], sorted(events, key=lambda event: event["began"])))
    if len({(head["run"], head["world_size"]) for head in heads}) > 1:
        raise cli.UserError(f"the traces in {folder} are of different runs: delete those that are old")
    first = min((event["began"] for trace in traces for event in trace.events), default=0.0)
    for trace in traces:
        for event in trace.events:
            event["began"] -= first
            event["ended"] -= first
        _separate(trace.events)
    return traces


def _separate(events: list[dict[str, Any]]) -> None:
    """Moves each call that begins before the one before it in its lane is over to the next lane that is free."""
    free: dict[str, list[float]] = {}  # of each group, when each of its lanes is free
    for event in events:
        if event["lane"] != COMPUTE:
            ends = free.setdefault(event["lane"], [])
            lane = next((i for i, end in enumerate(ends) if end <= event["began"]), len(ends))
            ends[lane : lane + 1] = [event["ended"]]
            event["lane"] += f" ({lane + 1})" if lane else ""


def merge(folder: Path | str) -> Path:
    """Writes trace.json, in the Trace Event Format, from the files of all ranks: a process a rank, a thread a lane."""
    lines: list[dict[str, Any]] = []
    for trace in read_traces(folder):
        pid = trace.rank
        lines.append(_named(pid, 0, "process_name", f"rank {pid} ({trace.machine})"))
        lines.append({"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}})
        number = {lane: tid for tid, lane in enumerate(trace.lanes())}
        lines += [_named(pid, tid, "thread_name", lane) for lane, tid in number.items()]
        for event in trace.events:
            began, ended = 1e6 * event["began"], 1e6 * event["ended"]  # microseconds
            lines.append({"ph": "X", "pid": pid, "tid": number[event["lane"]], "name": event["name"], "ts": began,
                          "dur": ended - began, "cat": event["lane"], "args": event["args"]})  # fmt: skip
    path = Path(folder) / "trace.json"
    atomic_write(path, json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}))
    return path


def _named(pid: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


@dataclass(frozen=True, slots=True)
class TraceConfig:
    folder: Path = field(metadata={"help": "where the ranks wrote rank-0.jsonl, rank-1.jsonl, ..."})
    start_ms: float = field(default=0.0, metadata={"help": "where the picture begins"})
    stop_ms: float = field(default=math.inf, metadata={"help": "where it ends"})
    steps: int = field(default=0, metadata={"help": "of the run that was traced, for bytes per step; 0: in all"})

    def __post_init__(self) -> None:
        if not 0 <= self.start_ms < self.stop_ms:
            raise ValueError(f"start_ms {self.start_ms} and stop_ms {self.stop_ms}: expected 0 <= start < stop")
        if self.steps < 0:
            raise ValueError(f"steps {self.steps}: expected 0 or more")


def main() -> None:
    from parallel.timeline import draw  # matplotlib is slow to import, and ranks need none of it

    config = cli.parse(TraceConfig, prog=cli.program(), description="one trace and one picture of all ranks")
    traces = read_traces(config.folder)
    print(f"{merge(config.folder)}: open it in ui.perfetto.dev")
    print(draw(config.folder / "timeline.png", traces, config.start_ms, config.stop_ms))
    for trace in traces[:1]:
        print(f"rank {trace.rank}, {table(trace.counts(), config.steps)}")


if __name__ == "__main__":
    cli.run(main)
