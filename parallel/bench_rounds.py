"""The clock of benchmarks that run on several ranks: A B A B in the same processes, time and bytes of every round.

A round's time is that of its slowest rank; before it all ranks meet. Bytes are those that the kernel counted on the
loopback meanwhile, headers of TCP and IP too, less those of a round in which nothing is done, for each rank. Whatever
else talks on this machine's loopback is counted as well and can only add: the least of all rounds stands.
Refused: nothing; every rank calls it with the same functions in the same order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from common.timing import Samples
from parallel.counters import loopback_bytes

NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Rounds:
    times: Samples  # seconds a call
    sent: tuple[float, ...]  # bytes that a mean rank sent, a call

    @property
    def bytes(self) -> float:
        return min(self.sent)


def alternate(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1, inner: int = 1
) -> dict[str, Rounds]:
    """`rounds` samples of each function, taken in turn, each the mean of `inner` calls. The same on all ranks."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    functions = {**functions, NOTHING: lambda: None}
    raw = [{name: _sample(function, inner) for name, function in functions.items()} for _ in range(rounds)]
    table = torch.tensor([list(sample.values()) for sample in raw], dtype=torch.float64)  # round, function, (s, bytes)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    silence = table[:, -1, 1].min()
    result = {}
    for number, name in enumerate(functions):
        seconds, sent = table[:, number].unbind(1)
        per_call = (sent - silence) / dist.get_world_size() / inner
        result[name] = Rounds(Samples(tuple((seconds / inner).tolist()), inner), tuple(per_call.tolist()))
    return {name: result[name] for name in functions if name != NOTHING}


def _sample(function: Callable[[], Any], inner: int) -> tuple[float, float]:
    """Seconds of this rank, and all bytes on the loopback as rank 0 sees them (0 on other ranks)."""
    dist.barrier()
    before = loopback_bytes()
    dist.barrier()  # nobody begins before rank 0 has read
    started = perf_counter()
    for _ in range(inner):
        function()
    seconds = perf_counter() - started
    dist.barrier()
    return seconds, float(loopback_bytes() - before) if dist.get_rank() == 0 else 0.0


def ratio(ours: Rounds, theirs: Rounds) -> float:
    """Time of the one over time of the other: the median over rounds, since what disturbs a round meets both."""
    pairs = zip(ours.times.raw, theirs.times.raw, strict=True)
    return Samples(tuple(a / b for a, b in pairs)).median
