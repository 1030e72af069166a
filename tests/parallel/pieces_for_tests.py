"""Layouts without strategies: which pieces each rank would have, and ranks that are threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

from parallel.comm import Comm
from parallel.mesh import Group, Layout, Mesh
from parallel.pieces import Piece, even_range


def pieces_of(shapes: dict[str, tuple[int, ...]], layout: Layout, rank: int, owned: tuple = ()) -> dict[str, Piece]:
    """By name: pp shares out the names, tp cuts rows or columns in turn (vectors are copies), fsdp cuts flat, dp
    replicates. The names in `owned` are whole, each on one rank."""
    place = Mesh(layout, rank, layout.world_size).place
    pieces = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name in owned:
            if number % layout.world_size == rank:
                pieces[name] = Piece.whole(shape)
            continue
        if number % layout.pp != place["pp"]:
            continue
        box = [(0, size) for size in shape]
        if len(shape) > 1:
            axis = number % len(shape)
            box[axis] = even_range(shape[axis], place["tp"], layout.tp)
        piece = Piece(tuple(shape), tuple(box), None, layout.tp if len(shape) < 2 else 1)
        if layout.fsdp > 1:
            piece = piece.cut(*even_range(prod(piece.box_shape), place["fsdp"], layout.fsdp))
        pieces[name] = piece
    return pieces


def entries(values: dict[str, Tensor], layout: Layout, rank: int) -> dict[str, tuple[Tensor, Piece]]:
    pieces = pieces_of({name: tuple(value.shape) for name, value in values.items()}, layout, rank)
    return {name: (piece.of(values[name]).clone(), piece) for name, piece in pieces.items()}


class ThreadComm(Comm):
    """An all-gather between threads."""

    kind = "torch"

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        super().__init__(Group(("dp",), tuple(range(len(slots))), rank))
        self.slots, self.meet = slots, barrier

    def _all_gather(self, x, out):
        self.slots[self.rank] = x.clone()
        self.meet.wait()
        out.copy_(torch.cat(self.slots))
        self.meet.wait()


def on_ranks(size: int, fn) -> list:
    """What fn(comm) returns on each of `size` ranks; an exception is returned too."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=20)

    def run(rank: int):
        try:
            return fn(ThreadComm(rank, slots, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
