"""The geometry of loading at another layout: which elements of one piece are where in another.

A flat range of a box is a few smaller boxes, each a run of elements without a gap; so whatever two layouts do, moving
numbers from the pieces of one to those of the other is copying intersections of boxes. No tensor of the whole parameter
is made. Refused: nothing; pieces are checked where they are saved.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from parallel.pieces import Box, Piece


@dataclass(frozen=True, slots=True)
class Run:
    """The elements [offset, offset + the box's volume) of a piece's tensor are this box of the whole parameter."""

    offset: int
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def stop(self) -> int:
        return self.offset + prod(self.shape)


def runs(piece: Piece) -> list[Run]:
    """All elements of a piece in their order; at most 2 n - 1 runs for n dimensions, none where the piece is empty."""
    start, stop = (0, piece.numel) if piece.flat is None else piece.flat
    found, offset = [], 0
    for local in _split(start, stop, piece.box_shape):
        box = tuple((first + a, first + b) for (first, _), (a, b) in zip(piece.box, local, strict=True))
        found.append(Run(offset, box))
        offset = found[-1].stop
    assert offset == piece.numel, (piece, found)
    return found


def _split(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """The elements [start, stop) of a flattened tensor of this shape, as boxes in order."""
    if start >= stop:
        return []
    if (start, stop) == (0, prod(shape)):
        return [tuple((0, size) for size in shape)]
    rest = shape[1:]
    row = prod(rest)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return [((first, first + 1), *box) for box in _split(head, tail, rest)]
    boxes: list[Box] = []
    if head:
        boxes += [((first, first + 1), *box) for box in _split(head, row, rest)]
        first += 1
    if first < last:
        boxes.append(((first, last), *((0, size) for size in rest)))
    return boxes + [((last, last + 1), *box) for box in _split(0, tail, rest)]


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes share; None when that is nothing."""
    shared = tuple((max(i, k), min(j, n)) for (i, j), (k, n) in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def inside(region: Box, box: Box) -> tuple[slice, ...]:
    """The index of a region in a tensor that holds the box."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(region, box, strict=True))


def view_of(flat: Tensor, run: Run) -> Tensor:
    """The run's elements of a piece's flattened tensor, in the shape of its box: a view."""
    return flat[run.offset : run.stop].view(run.shape)


def uncovered(shape: tuple[int, ...], pieces: Iterable[Piece]) -> Box | None:
    """A box of the whole parameter that none of the pieces has; None when together they have all of it."""
    whole = tuple((0, size) for size in shape)
    left = [whole] if prod(shape) else []
    for box in sorted(run.box for piece in pieces for run in runs(piece)):
        left = [rest for part in left for rest in _without(part, box)]
    return left[0] if left else None


def _without(part: Box, box: Box) -> list[Box]:
    """What is left of a part when the box is cut out of it."""
    shared = overlap(part, box)
    if shared is None:
        return [part]
    rests = []
    for axis, ((start, stop), (first, last)) in enumerate(zip(part, shared, strict=True)):
        before, behind = shared[:axis], part[axis + 1 :]
        rests += [(*before, edge, *behind) for edge in ((start, first), (last, stop)) if edge[0] < edge[1]]
    return rests
