"""OurComm: the collectives of parallel/comm.py on nothing but sends and receives between two ranks.

How they are done is in parallel/algorithms.py, which of them when in parallel/costs.py, the thread that they run on in
parallel/worker.py. All ranks end with the same bits, in every run. Refused: two OurComms whose calls overlap on one
process group (their messages would mix), algorithms that there are not.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel import algorithms
from parallel.algorithms import Reduction
from parallel.comm import Comm, Listener, Work
from parallel.compression import CODECS, Codec, Residuals, can_compress
from parallel.costs import ALGORITHMS, bytes_sent, has, pick
from parallel.mesh import Group
from parallel.wire import POINT_TAG, Wire, cut, wait_all
from parallel.worker import Job, Worker

__all__ = ["CHUNK_BYTES", "OurComm", "bytes_sent"]

CHUNK_BYTES = 1 << 20


class OurComm(Comm):
    """Collectives run in order on one thread of this object; sends and receives go past it, with a tag of their own
    (which NCCL has not: there give pipelines a group that does nothing else meanwhile).

    `algorithm`: auto picks by size; another one is used for those collectives that have it. `ranks_per_node`: so many
    neighbours of this group are on one machine (0: all). `compress`: what reductions send, see can_compress; they go
    pairwise then, and what was lost is kept by the call's `tag`, one for each tensor.
    """

    kind = "ours"

    def __init__(
        self,
        group: Group,
        listeners: Sequence[Listener] = (),
        *,
        algorithm: str = "auto",
        ranks_per_node: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        compress: str | None = None,
    ):
        super().__init__(group, listeners)
        if algorithm not in ("auto", *ALGORITHMS):
            raise ValueError(f"algorithm {algorithm!r}: expected auto, {', '.join(ALGORITHMS)}")
        if not ranks_per_node >= 0 or (0 < ranks_per_node < self.size and self.size % ranks_per_node):
            raise ValueError(f"ranks_per_node {ranks_per_node}: expected a divisor of the {self.size} ranks, or 0")
        if algorithm == "hierarchical" and ranks_per_node == 0:
            raise ValueError("algorithm hierarchical: expected ranks_per_node, got 0")
        if not chunk_bytes >= 1:
            raise ValueError(f"chunk_bytes {chunk_bytes}: expected at least 1")
        if compress not in (None, *CODECS):
            raise ValueError(f"compress {compress!r}: expected None, {' or '.join(CODECS)}")
        self.algorithm, self.ranks_per_node, self.compress = algorithm, ranks_per_node, compress
        self.wire, self._points = Wire(group, chunk_bytes), Wire(group, chunk_bytes)
        self._worker = Worker(f"collectives of {group.label}")
        self._residuals: dict[tuple[str, str], Residuals] = defaultdict(Residuals)
        self._tag = ""

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return self.wire.sent + self._points.sent

    def algorithm_for(self, name: str, x: Tensor) -> str:
        """How the collective `name` is done whose largest tensor is x."""
        if has(name, self.algorithm, self.size, self.ranks_per_node):
            return self.algorithm
        half = x.dtype in (torch.float16, torch.bfloat16)
        size = x.numel() * x.element_size()
        return pick(name, size, self.size, half=half, ranks_per_node=self.ranks_per_node)

    def _run(self, name, x, async_, tag, start, *others, **about):
        self._tag = tag  # which the methods below are not given
        return super()._run(name, x, async_, tag, start, *others, **about)

    def _codec(self, x: Tensor, op: str) -> tuple[Codec, str]:
        """How x is encoded, and the tag under which what that loses is kept; "" where nothing is lost."""
        if self.compress is not None and can_compress(x, op, self._tag):
            codec = CODECS[self.compress]()
            if codec.sent != x.dtype:
                return codec, self._tag
        return Codec(x.dtype), ""

    def _all_reduce(self, x: Tensor, op: str) -> Job:
        flat, reduction = x.detach().view(-1), Reduction(op, self.size)
        algorithm, wire = self.algorithm_for("all_reduce", x), self.wire
        codec, tag = self._codec(x, op)

        def run() -> None:
            if tag or algorithm == "pairwise":
                algorithms.pairwise_all_reduce(
                    wire, flat, reduction, codec, self._residuals["all_reduce", tag] if tag else None
                )
            elif algorithm == "ring":
                algorithms.ring_all_reduce(wire, flat, range(wire.size), reduction, reduction.finish)
            elif algorithm == "recursive":
                algorithms.halving_all_reduce(wire, flat, reduction)
            elif algorithm == "tree":
                algorithms.tree_all_reduce(wire, flat, reduction)
            else:
                algorithms.hierarchical_all_reduce(wire, flat, self.ranks_per_node, reduction)

        return self._worker.submit(run, flat)

    def _reduce_scatter(self, x: Tensor, out: Tensor, op: str) -> Job:
        x, out, reduction = x.detach(), out.detach(), Reduction(op, self.size)
        algorithm, wire = self.algorithm_for("reduce_scatter", x), self.wire
        codec, tag = self._codec(x, op)
        parts = cut((0, x.numel()), self.size)
        mine = x[slice(*parts[self.rank])]

        def run() -> None:
            if tag or algorithm == "pairwise":
                residuals = self._residuals["reduce_scatter", tag] if tag else None
                out.copy_(algorithms.pairwise_reduce_scatter(wire, x, parts, reduction, codec, residuals))
                return
            if algorithm == "ring":
                steps = algorithms.reduce_steps(wire.size, wire.rank)
                algorithms.ring(wire, x, parts, range(wire.size), steps, reduction)
            else:
                algorithms.halving(wire, x, parts, reduction)
            reduction.finish(mine)
            out.copy_(mine)

        return self._worker.submit(run, x, out)

    def _all_gather(self, x: Tensor, out: Tensor) -> Job:
        x, out = x.detach(), out.detach()
        algorithm, wire = self.algorithm_for("all_gather", out), self.wire
        parts = cut((0, out.numel()), self.size)

        def run() -> None:
            out[slice(*parts[wire.rank])] = x
            if algorithm == "ring":
                algorithms.ring(wire, out, parts, range(wire.size), algorithms.gather_steps(wire.size, wire.rank))
            else:
                algorithms.doubling(wire, out, parts)

        return self._worker.submit(run, x, out)

    def _broadcast(self, x: Tensor, source: int) -> Job:
        flat = x.detach().view(-1)
        tree = self.algorithm_for("broadcast", x) == "tree"
        relatives = algorithms.tree_relatives if tree else algorithms.ring_relatives
        return self._worker.submit(lambda: algorithms.relay(self.wire, flat, source, relatives), flat)

    def _all_to_all(self, x: Tensor, out: Tensor, send: list[int], receive: list[int]) -> Job:
        x, out = x.detach(), out.detach()
        return self._worker.submit(lambda: algorithms.all_to_all(self.wire, x, out, send, receive), x, out)

    def _send(self, x: Tensor, to: int) -> Work:
        works = self._points.exchange(x.detach(), to, None, to, POINT_TAG)
        return Work(lambda: wait_all(works))

    def _receive(self, x: Tensor, source: int) -> Work:
        works = self._points.exchange(None, source, x.detach(), source, POINT_TAG)
        return Work(lambda: wait_all(works))

    def _barrier(self) -> Job:
        token = torch.zeros(1, dtype=torch.uint8, device="cuda" if self.wire.grouped else "cpu")
        return self._worker.submit(lambda: algorithms.barrier(self.wire, token), token)
