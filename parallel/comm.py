"""The collectives of one group, as all of this stage calls them: checked, counted, traceable, blocking or not.

`Comm` is the interface; TorchComm is torch.distributed behind it, OurComm (parallel/collectives.py) the same written by
hand on sends and receives. A group of one works without torch.distributed. Tensors are contiguous and are written in
place. Every rank of the group makes the same calls in the same order. Refused: wrong sizes, non-contiguous tensors.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group

Op = Literal["sum", "mean", "max"]
Kind = Literal["torch", "ours"]


@dataclass(slots=True)
class Call:
    """One collective of one rank, as listeners see it. Times are time.perf_counter(); ended is 0 until it is over."""

    name: str  # all_reduce, reduce_scatter, all_gather, broadcast, all_to_all, send, receive, barrier
    group: Group
    number: int  # of this group's calls, from 0 on; sends and receives count on their own
    dtype: torch.dtype | None
    payload: int  # bytes of the largest tensor of the call: what S is in the formulas of parallel/README.md
    peer: int | None = None  # of a send, receive or broadcast: the other rank or the source, in the group
    started: float = 0.0
    ended: float = 0.0
    tag: str = ""  # what the caller says that it is for: "grads of blocks.3"
    op: str = ""  # of a reduction
    work: Any = None  # what is under way: NCCL's goes on after the wait for it, which is only the stream's

    @property
    def over(self) -> bool:
        """Whether it is done on the device too."""
        completed = getattr(self.work, "is_completed", None)
        return bool(self.ended) and (completed is None or completed())


class Listener(Protocol):
    """Hears of each call on the thread that makes it, before it begins and once it is known to be over."""

    def started(self, call: Call) -> None: ...

    def ended(self, call: Call) -> None: ...


class Work:
    """A collective under way: its tensors are not to be touched before `wait` returns. To wait twice is fine."""

    def __init__(self, finish=None):
        self._finish = finish

    def wait(self) -> None:
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


@dataclass(slots=True)
class _Numbers:
    collectives: int = 0
    sends: int = 0
    receives: int = 0


class Comm:
    """What follows holds for every implementation. W ranks; `async_` returns a Work that is still to be waited for.

    Subclasses define _all_reduce and so on, which return something with `.wait()` (or None when they are done).
    """

    kind: Kind

    def __init__(self, group: Group, listeners: Sequence[Listener] = ()):
        self.group, self.listeners = group, list(listeners)
        self._numbers = _Numbers()

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank

    def all_reduce(self, x: Tensor, op: Op = "sum", *, async_: bool = False, tag: str = "") -> Work:
        """x becomes the elementwise sum, mean or maximum over the ranks: bitwise the same on all of them."""
        _check_op(op, x)
        return self._run("all_reduce", x, async_, tag, lambda: self._all_reduce(x, op), op=op)

    def reduce_scatter(self, x: Tensor, out: Tensor, op: Op = "sum", *, async_: bool = False, tag: str = "") -> Work:
        """out becomes this rank's W-th of the reduced x, seen as flat: x.numel() == W out.numel(). x is spent."""
        _check_op(op, x)
        self._check_parts(x, out)
        if self.size == 1:
            out.view(-1).copy_(x.view(-1))
        return self._run(
            "reduce_scatter", x, async_, tag, lambda: self._reduce_scatter(x.view(-1), out.view(-1), op), out, op=op
        )

    def all_gather(self, x: Tensor, out: Tensor, *, async_: bool = False, tag: str = "") -> Work:
        """out becomes the x of all ranks, one behind the other: out.numel() == W x.numel()."""
        self._check_parts(out, x)
        if self.size == 1:
            out.view(-1).copy_(x.view(-1))
        return self._run("all_gather", out, async_, tag, lambda: self._all_gather(x.view(-1), out.view(-1)), x)

    def broadcast(self, x: Tensor, source: int = 0, *, async_: bool = False, tag: str = "") -> Work:
        """x becomes that of the rank `source` of the group."""
        self._check_peer(source)
        return self._run("broadcast", x, async_, tag, lambda: self._broadcast(x, source), peer=source)

    def all_to_all(
        self,
        x: Tensor,
        out: Tensor,
        send: Sequence[int] | None = None,
        receive: Sequence[int] | None = None,
        *,
        async_: bool = False,
        tag: str = "",
    ) -> Work:
        """The r-th part of flat x goes to rank r, whose own part for this rank comes to the r-th part of out.

        `send` and `receive` are the parts' elements, W numbers each that may be 0; without them all parts are equal.
        """
        send = self._parts(x, send, "send")
        receive = self._parts(out, receive, "receive")
        if self.size == 1:
            out.view(-1).copy_(x.view(-1))
        return self._run(
            "all_to_all", x, async_, tag, lambda: self._all_to_all(x.view(-1), out.view(-1), send, receive), out
        )

    def send(self, x: Tensor, to: int, *, async_: bool = False, tag: str = "") -> Work:
        """To the rank `to` of the group, which receives in the order in which this rank sends."""
        self._check_peer(to, another=True)
        return self._run("send", x, async_, tag, lambda: self._send(x, to), peer=to)

    def receive(self, x: Tensor, source: int, *, async_: bool = False, tag: str = "") -> Work:
        self._check_peer(source, another=True)
        return self._run("receive", x, async_, tag, lambda: self._receive(x, source), peer=source)

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self._run("barrier", None, False, "", self._barrier)

    def _run(self, name, x, async_, tag, start, *others: Tensor, peer: int | None = None, op: str = "") -> Work:
        for tensor in (x, *others):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name}: a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
                                 f"expected a contiguous one")  # fmt: skip
        if self.size == 1:
            return Work()
        call = Call(
            name, self.group, self._number(name), dtype=None if x is None else x.dtype,
            payload=0 if x is None else x.numel() * x.element_size(), peer=peer, started=time.perf_counter(), tag=tag,
            op=op,
        )  # fmt: skip
        for listener in self.listeners:
            listener.started(call)
        call.work = work = start()

        def finish() -> None:
            if work is not None:
                work.wait()
            call.ended = time.perf_counter()
            for listener in self.listeners:
                listener.ended(call)

        running = Work(finish)
        if not async_:
            running.wait()
        return running

    def _number(self, name: str) -> int:
        which = {"send": "sends", "receive": "receives"}.get(name, "collectives")
        number = getattr(self._numbers, which)
        setattr(self._numbers, which, number + 1)
        return number

    def _check_parts(self, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != self.size * part.numel():
            raise ValueError(
                f"{whole.numel()} elements over {self.size} ranks and a part of {part.numel()}: expected equal parts"
            )
        if whole.dtype != part.dtype:
            raise ValueError(f"dtypes {whole.dtype} and {part.dtype}: expected the same")

    def _parts(self, x: Tensor, sizes: Sequence[int] | None, name: str) -> list[int]:
        if sizes is None:
            if x.numel() % self.size:
                raise ValueError(
                    f"{x.numel()} elements to {name} over {self.size} ranks: expected a multiple, or sizes"
                )
            return [x.numel() // self.size] * self.size
        if len(sizes) != self.size or min(sizes) < 0 or sum(sizes) != x.numel():
            raise ValueError(f"{name} sizes {list(sizes)}: expected {self.size} numbers that add up to {x.numel()}")
        return list(sizes)

    def _check_peer(self, peer: int, another: bool = False) -> None:
        if not 0 <= peer < self.size or (another and peer == self.rank):
            besides = f" other than {self.rank}" if another else ""
            raise ValueError(f"rank {peer} of the group {self.group.label}: expected 0 to {self.size - 1}{besides}")


def _check_op(op: str, x: Tensor) -> None:
    if op not in ("sum", "mean", "max"):
        raise ValueError(f"op {op!r}: expected sum, mean or max")
    if op == "mean" and not x.is_floating_point():
        raise ValueError(f"the mean of {x.dtype}: expected a floating-point type")


OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX}
# torch 2.13 has new names for these two, and warns of the old ones.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchComm(Comm):
    """torch.distributed: gloo on a CPU, NCCL on GPUs."""

    kind = "torch"

    def _all_reduce(self, x, op):
        return dist.all_reduce(x, OPS[op], group=self.group.process_group, async_op=True)

    def _reduce_scatter(self, x, out, op):
        return REDUCE_SCATTER(out, x, OPS[op], group=self.group.process_group, async_op=True)

    def _all_gather(self, x, out):
        return ALL_GATHER(out, x, group=self.group.process_group, async_op=True)

    def _broadcast(self, x, source):
        return dist.broadcast(x, self.group.ranks[source], group=self.group.process_group, async_op=True)

    def _all_to_all(self, x, out, send, receive):
        return dist.all_to_all_single(out, x, receive, send, group=self.group.process_group, async_op=True)

    def _send(self, x, to):
        return dist.isend(x, self.group.ranks[to], group=self.group.process_group)

    def _receive(self, x, source):
        return dist.irecv(x, self.group.ranks[source], group=self.group.process_group)

    def _barrier(self):
        return dist.barrier(group=self.group.process_group, async_op=True)


def make_comm(group: Group, kind: Kind = "torch", listeners: Sequence[Listener] = (), **options) -> Comm:
    """`options` are OurComm's. Raises ValueError for another kind."""
    if kind == "torch":
        return TorchComm(group, listeners)
    if kind == "ours":
        from parallel.collectives import OurComm  # which is built on this file

        return OurComm(group, listeners, **options)
    raise ValueError(f"collectives {kind!r}: expected torch or ours")
