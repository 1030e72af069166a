"""What each algorithm costs: rounds, bytes on the longest way, bytes of a mean rank; and which is the cheapest.

    W  ranks        S  bytes of the call's largest tensor        time = rounds alpha + bytes beta (Hockney)

NEAR was measured (`measure` does it again, between any two ranks); give a Link of your own where you know better.
`bytes_sent` is what the counters of parallel/trace.py and the tables of the README are held against.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallel.algorithms import largest_power_of_two
from parallel.comm import Comm, Kind
from parallel.compression import CODECS


@dataclass(frozen=True, slots=True)
class Link:
    alpha: float  # seconds a message
    beta: float  # seconds a byte


NEAR = Link(alpha=70e-6, beta=0.3e-9)  # measured: gloo on the loopback of two cores, torch 2.13
FAR = Link(alpha=200e-6, beta=1e-9)  # between machines: assumed, not measured
TREE_UP_TO = 1 << 18  # bytes of an all-reduce: a tree has the fewest messages in all, 2 (W-1), and ranks share cores
HIERARCHICAL_FROM = 1 << 16  # bytes


def _log2(W: int) -> int:
    return (W - 1).bit_length()


def _share(W: int) -> float:
    return (W - 1) / W


def _guests(W: int) -> int:
    """1 where some ranks of recursive halving sit out: they send S once before and get S once behind."""
    return int(largest_power_of_two(W) != W)


@dataclass(frozen=True, slots=True)
class Cost:
    rounds: Callable[[int], float]
    slowest: Callable[[int], float]  # bytes over S that one rank sends in turn, on the longest way


COSTS: dict[str, dict[str, Cost]] = {
    "all_reduce": {
        "tree": Cost(lambda W: 2 * _log2(W), lambda W: 2 * _log2(W)),
        "recursive": Cost(
            lambda W: 2 * (largest_power_of_two(W).bit_length() - 1 + _guests(W)),
            lambda W: 2 * (_share(largest_power_of_two(W)) + _guests(W)),
        ),
        "ring": Cost(lambda W: 2 * (W - 1), lambda W: 2 * _share(W)),
        "pairwise": Cost(lambda W: 2 * (W - 1), lambda W: 2 * _share(W)),
    },
    "reduce_scatter": {
        "recursive": Cost(_log2, _share),
        "ring": Cost(lambda W: W - 1, _share),
        "pairwise": Cost(lambda W: W - 1, _share),
    },
    "all_gather": {"recursive": Cost(_log2, _share), "ring": Cost(lambda W: W - 1, _share)},
    "broadcast": {"tree": Cost(_log2, _log2), "ring": Cost(lambda W: W - 1, lambda W: 1.0)},
    "all_to_all": {"pairwise": Cost(lambda W: W - 1, _share)},
}
ALGORITHMS = ("ring", "recursive", "tree", "pairwise", "hierarchical")


def has(name: str, algorithm: str, W: int, ranks_per_node: int = 0) -> bool:
    """Whether this collective can be done so by W ranks."""
    if algorithm == "hierarchical":
        return name == "all_reduce" and 1 < ranks_per_node < W
    if algorithm == "recursive" and name != "all_reduce" and _guests(W):
        return False
    return algorithm in COSTS.get(name, {})


def seconds(name: str, algorithm: str, size_bytes: int, W: int, link: Link) -> float:
    cost = COSTS[name][algorithm]
    return cost.rounds(W) * link.alpha + cost.slowest(W) * size_bytes * link.beta


def pick(name: str, size_bytes: int, W: int, *, half: bool = False, ranks_per_node: int = 0) -> str:
    """The algorithm for a collective whose largest tensor has `size_bytes`:

    all-reduce between nodes, from HIERARCHICAL_FROM on    hierarchical
    other all-reduces up to TREE_UP_TO                     tree
    reductions of 16-bit floats (`half`)                   pairwise, which rounds once
    everything else                                        what COSTS and the link say is fastest
    """
    if has(name, "hierarchical", W, ranks_per_node) and size_bytes >= HIERARCHICAL_FROM:
        return "hierarchical"
    if name == "all_reduce" and size_bytes <= TREE_UP_TO:
        return "tree"
    if half and has(name, "pairwise", W):
        return "pairwise"
    link = FAR if 0 < ranks_per_node < W else NEAR
    fit = [algorithm for algorithm in COSTS[name] if has(name, algorithm, W)]
    return min(fit, key=lambda algorithm: seconds(name, algorithm, size_bytes, W, link))


def bytes_sent(
    name: str,
    size_bytes: int,
    W: int,
    kind: Kind = "ours",
    algorithm: str = "auto",
    *,
    ranks_per_node: int = 0,
    compress: str | None = None,
) -> float:
    """Bytes that a rank sends, mean over the W ranks of the group, for a call whose largest tensor has `size_bytes`.

    No algorithm of an all-reduce sends more than another: they differ in rounds, and in who sends. torch is gloo, whose
    reduce_scatter is an all-reduce on the wire. all_to_all: with equal parts. `compress` of a float32 all_reduce or
    reduce_scatter. Raises ValueError for a collective or algorithm that there is not.
    """
    if name in ("send", "receive", "barrier"):
        return {"send": size_bytes, "receive": 0, "barrier": _log2(W)}[name]
    if name not in COSTS:
        raise ValueError(f"collective {name!r}: expected {', '.join(COSTS)}, send, receive or barrier")
    if kind == "ours" and algorithm != "auto" and not has(name, algorithm, W, ranks_per_node):
        raise ValueError(f"algorithm {algorithm!r} for {name} over {W} ranks: expected one of {', '.join(COSTS[name])}")
    passes = 2 if name == "all_reduce" or (kind == "torch" and name == "reduce_scatter") else 1
    if compress is not None and kind == "ours" and name in ("all_reduce", "reduce_scatter"):
        size_bytes = CODECS[compress]().nbytes(size_bytes // 4)
    return passes * _share(W) * size_bytes


def measure(comm: Comm, device: torch.device | str = "cpu", tries: int = 10, large: int = 1 << 22) -> Link:
    """alpha and beta between the ranks 0 and 1, from messages there and back; the same on all ranks."""
    best = torch.full((2,), float("inf"), dtype=torch.float64, device=device)
    for which, size in enumerate((1, large)):
        x = torch.zeros(size, dtype=torch.uint8, device=device)
        for _ in range(tries):
            comm.barrier()
            started = time.perf_counter()
            if comm.rank == 0:
                comm.send(x, 1)
                comm.receive(x, 1)
                x[0].item()  # a stream that waits is not enough
                best[which].clamp_(max=(time.perf_counter() - started) / 2)
            elif comm.rank == 1:
                comm.receive(x, 0)
                comm.send(x, 0)
    comm.broadcast(best)
    short, long = best.tolist()
    return Link(short, (long - short) / large)
