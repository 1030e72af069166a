"""A trace of the CPU model played again against a clock: what a block's pipeline would look like with costs put in.

The model says who waits for what and in which order; here each operation takes as long as COSTS say.
So this is a model of time, not a measurement: it shows what overlaps and what cannot, and why. The tensor cores take
wgmmas in the order in which they were issued, whoever did; two softmaxes at once share the units that compute them:
both are assumptions. Refused: a trace of several blocks.

A trace is the list that module.take_trace() returns (simt/cpu/trace.h).
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

WARPGROUP = 128


@dataclass(frozen=True, slots=True)
class Costs:
    """In clocks of an H100's multiprocessor. The rates are NVIDIA's; the last four are estimates."""

    flops: float = 4096.0  # bf16 FLOP a clock of the tensor cores
    exps: float = 16.0  # exponentials a clock
    steps: float = 128.0  # other instructions a clock
    steps_of_a_score: float = 5.0  # scale, maximum, sum, conversion, the share of rescaling the output
    latency: float = 600.0  # of a load from L2
    bytes: float = 46.6  # a clock from L2, when all multiprocessors ask at once
    instruction: float = 2.0  # to issue a copy, an arrival, a wgmma


class Interval(NamedTuple):
    """`row`: "loads", or the number of a warpgroup."""

    row: str | int
    kind: str  # "load", "scores", "values", "softmax", "wait"
    start: float
    end: float


@dataclass(slots=True)
class Shared:
    """A unit that works on several things at once, each as fast as the others."""

    now: float = 0.0
    left: dict = field(default_factory=dict)  # job -> clocks of work that remain

    def advance(self, time: float) -> None:
        if self.left:
            share = (time - self.now) / len(self.left)
            self.left = {job: work - share for job, work in self.left.items()}
        self.now = time

    def next(self) -> tuple[float, object] | None:
        if not self.left:
            return None
        job = min(self.left, key=self.left.get)
        return self.now + max(0.0, self.left[job]) * len(self.left), job


@dataclass(slots=True)
class Queue:
    """A unit that works on one thing after the other."""

    jobs: list = field(default_factory=list)  # (when it is done, job)
    free: float = 0.0

    def add(self, job: object, now: float, work: float) -> float:
        """When it begins."""
        began = max(now, self.free)
        self.free = began + work
        self.jobs.append((self.free, job))
        return began

    def next(self) -> tuple[float, object] | None:
        return self.jobs[0] if self.jobs else None


@dataclass(slots=True)
class Mbarrier:
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrivals: int, announced: int) -> None:
        self.pending -= arrivals
        self.bytes += announced
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


@dataclass(slots=True)
class Group:
    """A warpgroup's products; one is handed to the tensor cores when all 128 threads have issued it."""

    issued: list = field(default_factory=list)  # threads that have issued product i
    what: list = field(default_factory=list)  # (n, from registers)
    done: int = 0
    softmaxed: int = 0  # products whose scores have been through the softmax


@dataclass(slots=True)
class Thread:
    number: int
    events: list
    at: int = 0
    products: int = 0
    commits: list = field(default_factory=list)
    waiting_since: float | None = None


class Replay:
    def __init__(self, trace: Iterable[tuple], costs: Costs | None = None):
        by_thread = defaultdict(list)
        blocks = set()
        for block, thread, kind, first, second, *_ in trace:
            blocks.add(block)
            by_thread[thread].append((kind, first, second))
        if len(blocks) != 1:
            raise ValueError(f"a trace of {len(blocks)} blocks: expected one, launch one or choose its events")
        self.costs = costs or Costs()
        self.threads = {number: Thread(number, events) for number, events in by_thread.items()}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.barriers = defaultdict(lambda: [0, 0, []])  # number -> arrived, generation, waiting threads
        self.groups = defaultdict(Group)
        self.tensor, self.units = Queue(), Shared()
        self.softmax_began: dict[int, float] = {}
        self.sleeping: dict[str, list[Thread]] = defaultdict(list)  # by what they wait for
        self.landing: list[tuple[float, int, int, int]] = []
        self.link_free = 0.0
        self.ready: list[tuple[float, int]] = []
        self.intervals: list[Interval] = []

    def run(self) -> list[Interval]:
        """All that was done, by the clock. Raises RuntimeError where nobody can go on: not a trace of a whole block."""
        self.ready = [(0.0, number) for number in sorted(self.threads)]
        while True:
            times = [self.ready[0][0]] if self.ready else []
            times += [found[0] for found in (self.tensor.next(), self.units.next()) if found]
            times += [self.landing[0][0]] if self.landing else []
            if not times:
                break
            self._until(min(times))
        if any(thread.at < len(thread.events) for thread in self.threads.values()):
            raise RuntimeError("the trace cannot be played to its end: is it of a whole block?")
        return sorted(self.intervals, key=lambda interval: interval.start)

    def _until(self, now: float) -> None:
        self.units.advance(now)
        while self.landing and self.landing[0][0] <= now:
            _, _, barrier, size = heapq.heappop(self.landing)
            self._change(barrier, 0, -size, now)
        while (found := self.tensor.next()) and found[0] <= now:
            self.tensor.jobs.pop(0)
            self.groups[found[1]].done += 1
            self._wake(("products", found[1]), now)
        while (found := self.units.next()) and found[0] <= now + 1e-9:
            del self.units.left[found[1]]
            self._softmax_done(found[1], now)
        while self.ready and self.ready[0][0] <= now:
            self._step(self.threads[heapq.heappop(self.ready)[1]], now)

    def _later(self, thread: Thread, time: float) -> None:
        heapq.heappush(self.ready, (time, thread.number))

    def _wake(self, what: object, now: float) -> None:
        for thread in self.sleeping.pop(what, []):
            self._later(thread, now)

    def _change(self, barrier: int, arrivals: int, announced: int, now: float) -> None:
        self.mbarriers[barrier].change(arrivals, announced)
        self._wake(("mbarrier", barrier), now)

    # ---- one event of one thread; `at` moves on when it has happened ----
    def _step(self, thread: Thread, now: float) -> None:
        if thread.at == len(thread.events):
            return
        kind, first, second = thread.events[thread.at]
        verb = getattr(self, "_" + kind.replace(" ", "_"))
        blocked = verb(thread, first, second, now)
        if blocked is not None:
            if thread.waiting_since is None:
                thread.waiting_since = now
            self.sleeping[blocked].append(thread)
            return
        if thread.waiting_since is not None:
            if thread.number % WARPGROUP == 0 and kind in ("mbarrier wait", "barrier sync"):
                self.intervals.append(Interval(thread.number // WARPGROUP, "wait", thread.waiting_since, now))
            thread.waiting_since = None
        thread.at += 1
        self._later(thread, now + self.costs.instruction)

    def _mbarrier_init(self, thread, barrier, count, now):
        self.mbarriers[barrier] = Mbarrier(count, count)

    def _mbarrier_arrive(self, thread, barrier, size, now):
        self._change(barrier, 1, size, now)

    def _mbarrier_expect(self, thread, barrier, size, now):
        self._change(barrier, 0, size, now)

    def _mbarrier_wait(self, thread, barrier, parity, now):
        return ("mbarrier", barrier) if self.mbarriers[barrier].phase == parity else None

    def _load(self, thread, barrier, size, now):
        start = max(now, self.link_free)
        self.link_free = start + size / self.costs.bytes
        land = self.link_free + self.costs.latency
        heapq.heappush(self.landing, (land, len(self.intervals), barrier, size))
        self.intervals.append(Interval("loads", "load", start + self.costs.latency, land))

    def _store(self, thread, first, size, now):
        self.link_free = max(now, self.link_free) + size / self.costs.bytes

    def _store_commit(self, thread, first, second, now):
        """Takes no time, and waits for stores are short beside all else: what they cost is their way."""

    _store_wait = _store_commit

    def _barrier_sync(self, thread, number, threads, now):
        barrier = self.barriers[number]
        mine = ("barrier", number, barrier[1])
        if thread.waiting_since is not None:  # woken: the generation it waited for is over
            return None
        return None if self._barrier_full(barrier, threads, number, now) else mine

    def _barrier_arrive(self, thread, number, threads, now):
        self._barrier_full(self.barriers[number], threads, number, now)

    def _barrier_full(self, barrier, threads, number, now) -> bool:
        barrier[0] += 1
        alive = sum(t.at < len(t.events) for t in self.threads.values()) if threads == 0 else threads
        if barrier[0] < alive:
            return False
        barrier[0] = 0
        barrier[1] += 1
        self._wake(("barrier", number, barrier[1] - 1), now)
        return True

    def _wgmma(self, thread, n, registers, now):
        number = thread.number // WARPGROUP
        group = self.groups[number]
        if thread.products == len(group.issued):
            group.issued.append(0)
            group.what.append((n, registers))
        group.issued[thread.products] += 1
        thread.products += 1
        if group.issued[thread.products - 1] == WARPGROUP:
            work = 2 * 64 * n * 16 / self.costs.flops
            began = self.tensor.add(number, now, work)
            self.intervals.append(Interval(number, "values" if registers else "scores", began, began + work))

    def _wgmma_commit(self, thread, first, second, now):
        thread.commits.append(thread.products)

    def _wgmma_wait(self, thread, first, pending, now):
        """Scores that have come are followed by their softmax, once for the warpgroup."""
        target = thread.commits[-1 - pending] if len(thread.commits) > pending else 0
        number = thread.number // WARPGROUP
        group = self.groups[number]
        if group.done < target:
            return ("products", number)
        if number in self.softmax_began:
            return ("softmax", number)
        scores = [n for n, registers in group.what[group.softmaxed : target] if not registers]
        if scores:
            group.softmaxed = target
            each = 1 / self.costs.exps + self.costs.steps_of_a_score / self.costs.steps
            self.units.left[number] = 64 * scores[0] * each
            self.softmax_began[number] = now
            return ("softmax", number)
        group.softmaxed = max(group.softmaxed, target)
        return None

    def _softmax_done(self, number: int, now: float) -> None:
        self.intervals.append(Interval(number, "softmax", self.softmax_began.pop(number), now))
        self._wake(("softmax", number), now)


def busy(intervals: Iterable[Interval], *kinds: str) -> float:
    """Clocks in which at least one interval of these kinds runs."""
    total, end = 0.0, float("-inf")
    for interval in sorted((i for i in intervals if i.kind in kinds), key=lambda i: i.start):
        total += max(0.0, interval.end - max(interval.start, end))
        end = max(end, interval.end)
    return total
