"""Handwritten collectives beside torch.distributed's own: seconds and bytes of a call, by size, on the same gloo group.

Means of random float32. S is the size of a call's largest tensor, as in the README. Refused: results that differ.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.bench_rounds import alternate, ratio
from parallel.collectives import OurComm
from parallel.costs import bytes_sent
from parallel.mesh import Layout, Mesh

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)  # bytes
QUICK_SIZES = (1 << 12, 1 << 16)
SAMPLE_BYTES, MOST_CALLS = 1 << 22, 40  # a sample is so many bytes' worth of calls
ERROR = 1e-5
MEAN = dist.ReduceOp.AVG


def all_reduce(comm: OurComm, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours and torch's, which return what comes out. In place, and a mean of means is the same mean."""
    ours, torchs = x.clone(), x.clone()

    def call() -> Tensor:
        comm.all_reduce(ours, "mean")
        return ours

    def torch_call() -> Tensor:
        dist.all_reduce(torchs, MEAN, group=comm.group.process_group)
        return torchs

    return call, torch_call


def reduce_scatter(comm: OurComm, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    part = x.new_empty(x.numel() // comm.size)
    ours, torch_part = x.clone(), part.clone()

    def call() -> Tensor:
        comm.reduce_scatter(ours, part, "mean")
        return part

    def torch_call() -> Tensor:
        dist.reduce_scatter_tensor(torch_part, x, MEAN, group=comm.group.process_group)
        return torch_part

    return call, torch_call


def all_gather(comm: OurComm, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    part, ours, torchs = x[: x.numel() // comm.size], torch.empty_like(x), torch.empty_like(x)

    def call() -> Tensor:
        comm.all_gather(part, ours)
        return ours

    def torch_call() -> Tensor:
        dist.all_gather_into_tensor(torchs, part, group=comm.group.process_group)
        return torchs

    return call, torch_call


COLLECTIVES = {"all_reduce": all_reduce, "reduce_scatter": reduce_scatter, "all_gather": all_gather}


def measure(rank: int, ranks: int, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """The rows of `ranks` ranks. All of them call it. Raises ValueError where ours and torch's results differ."""
    comm = OurComm(Mesh(Layout(dp=ranks), rank, ranks).group("dp"))
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for name, make in COLLECTIVES.items():
        for size in sizes:
            x = torch.randn(size // 4, generator=generator)
            calls = dict(zip(("ours", "torch"), make(comm, x), strict=True))
            check(f"{name} of {size} bytes", *(call() for call in calls.values()))
            inner = max(1, min(MOST_CALLS, SAMPLE_BYTES // size))
            found = alternate(calls, rounds=rounds, inner=inner)
            rows.append({
                "collective": name, "ranks": ranks, "size": _show(size), "bytes": size,
                "algorithm": comm.algorithm_for(name, x), "ours_us": 1e6 * found["ours"].times.median,
                "torch_us": 1e6 * found["torch"].times.median, "vs_torch": ratio(found["ours"], found["torch"]),
                **_bytes(name, size, ranks, found), "ours": found["ours"].times, "torch": found["torch"].times,
            })  # fmt: skip
    return rows


def _bytes(name: str, size: int, ranks: int, found: dict) -> dict[str, float]:
    """Counted and by formula, over S."""
    shares = {f"{kind}_sent": found[kind].bytes / size for kind in ("ours", "torch")}
    return shares | {f"{kind}_formula": bytes_sent(name, size, ranks, kind) / size for kind in ("ours", "torch")}


def check(what: str, ours: Tensor, torchs: Tensor) -> None:
    """On all ranks the same outcome, or those that pass would wait for the one that raised."""
    error = (ours - torchs).abs().max() / torchs.abs().max()
    wrong = torch.tensor(0.0 if error <= ERROR else 1.0)
    dist.all_reduce(wrong)
    if wrong.item():
        raise ValueError(f"check failed, nothing was timed: {what} is not torch's, here by {error:.1e}")


def _show(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
