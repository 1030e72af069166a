"""Which part of a whole parameter a rank has: the language between tensor parallelism, sharding and checkpoints.

A tensor-parallel layer has a box of the whole parameter (rows 64 to 128 of a matrix); ZeRO and FSDP cut what is there,
flattened, into ranges. A Piece names both, so any rank's tensor can be found in the whole one and back.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

Box = tuple[tuple[int, int], ...]  # [start, stop) along each dimension


@dataclass(frozen=True, slots=True)
class Piece:
    shape: tuple[int, ...]  # of the whole parameter, as one process has it
    box: Box
    flat: tuple[int, int] | None = None  # of the box, flattened: [start, stop) is this tensor; None: all, in its shape
    copies: int = 1  # ranks of the tp and pp axes together that have the same box

    @classmethod
    def whole(cls, shape: tuple[int, ...], copies: int = 1) -> "Piece":
        return cls(tuple(shape), tuple((0, size) for size in shape), None, copies)

    @property
    def box_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def numel(self) -> int:
        return prod(self.box_shape) if self.flat is None else self.flat[1] - self.flat[0]

    def cut(self, start: int, stop: int) -> "Piece":
        """The elements [start, stop) of this box, flattened."""
        assert self.flat is None and 0 <= start <= stop <= prod(self.box_shape), (self, start, stop)
        return Piece(self.shape, self.box, (start, stop), self.copies)

    def of(self, whole: Tensor) -> Tensor:
        """This piece of a whole tensor: a view where it can be one."""
        assert tuple(whole.shape) == self.shape, (whole.shape, self.shape)
        part = whole[tuple(slice(start, stop) for start, stop in self.box)]
        return part if self.flat is None else part.reshape(-1)[self.flat[0] : self.flat[1]]

    def put(self, whole: Tensor, value: Tensor) -> None:
        """Writes the piece into a whole contiguous tensor."""
        part = whole[tuple(slice(start, stop) for start, stop in self.box)]
        if self.flat is None:
            part.copy_(value.view(part.shape))
            return
        flat = part.contiguous().view(-1)
        flat[self.flat[0] : self.flat[1]] = value.view(-1)
        if flat.data_ptr() != part.data_ptr():  # a copy; else it is written already
            part.copy_(flat.view(part.shape))


def piece_of(p: nn.Parameter) -> Piece:
    """What tensor parallelism wrote on the parameter as `p.piece`; without it the parameter is whole."""
    return getattr(p, "piece", None) or Piece.whole(tuple(p.shape))


def even_range(numel: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of a rank's share when a flat tensor is cut into `size` parts of ceil(numel / size)."""
    part = -(-numel // size)
    return min(rank * part, numel), min((rank + 1) * part, numel)
