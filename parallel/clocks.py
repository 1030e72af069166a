"""By how much each rank's clock differs from rank 0's, so that the events of all ranks can stand in one picture.

Processes of one machine share CLOCK_MONOTONIC, which is Linux's time.perf_counter: their offset is exactly 0. That of
others is estimated as NTP does (Mills, RFC 5905, section 8): rank 0 answers a message with its time, and the message is
taken to need as long there as back. Clocks that drift apart during the run are not followed.
"""

import hashlib
import sys
import time
from dataclasses import dataclass

import torch

from parallel.comm import Comm
from parallel.processes import machine

ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Offset:
    """Rank 0's clock is this one's plus `seconds`; wrong by `error` at most (half of the fastest round trip)."""

    seconds: float
    error: float


def clock_offset(world: Comm, *, shared: bool | None = None, device: torch.device | str = "cpu") -> Offset:
    """Every rank of `world` calls it. `shared`: all have one clock; by default, those of one machine have."""
    if shared is None:
        shared = _share_clock(world, device)
    if shared or world.size == 1:
        return Offset(0.0, 0.0)
    times = torch.zeros(1, dtype=torch.float64, device=device)
    offset = Offset(0.0, 0.0)
    for rank in range(1, world.size):  # one after the other: an answer that waits for its turn would count as slow
        if world.rank == 0:
            _answer(world, rank, times)
        elif world.rank == rank:
            offset = _ask(world, times)
        world.barrier()
    return offset


def _share_clock(world: Comm, device: torch.device | str) -> bool:
    number = (
        int.from_bytes(hashlib.sha256(machine().encode()).digest()[:6]) if sys.platform == "linux" else -1 - world.rank
    )
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    world.all_reduce(ends, "max", tag="machines")
    return bool(ends[0] == -ends[1])


def _answer(world: Comm, rank: int, times: torch.Tensor) -> None:
    for _ in range(ROUNDS):
        world.receive(times, rank, tag="clock")
        times.item()  # with NCCL receive returns before the message is there
        times.fill_(time.perf_counter())
        world.send(times, rank, tag="clock")


def _ask(world: Comm, times: torch.Tensor) -> Offset:
    best = Offset(0.0, float("inf"))
    for _ in range(ROUNDS):
        asked = time.perf_counter()
        world.send(times, 0, tag="clock")
        world.receive(times, 0, tag="clock")
        answer, heard = times.item(), time.perf_counter()
        half = (heard - asked) / 2
        if half < best.error:
            best = Offset(answer - asked - half, half)
    return best
