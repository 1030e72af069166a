"""What kernels in Triton on rows share: where the rows of a view lie, and how many of them a program takes.

The CUDA version (fused/rows.cuh) says which thread has which 16 bytes. In Triton a tile of rows is one value and the
compiler lays it out; it makes accesses of 16 bytes where it can prove that they are aligned. What it knows of a number
is only whether 16 divides it, so strides and widths come here in units of 16 bytes where all of them are multiples, and
the kernel multiplies: a factor that it sees. Sizes of 1 are constants for it, and divisions by them disappear.

Refused: 2^30 rows or more, and rows of 2^30 elements or more.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit


@jit
def offsets(row, sizes, strides, UNIT: tl.constexpr):
    """Of the first elements of rows: `row` counts them over three leading dimensions, as `Layout` has them."""
    inner = row % sizes[2]
    middle = row // sizes[2] % sizes[1]
    outer = row // (sizes[2] * sizes[1])
    offset = outer.to(tl.int64) * strides[0] + middle.to(tl.int64) * strides[1] + inner.to(tl.int64) * strides[2]
    return offset * UNIT


@jit
def read(x, row, column, mask, sizes, strides, UNIT: tl.constexpr):
    """A tile (rows, columns) in float32, 0 outside of the mask."""
    at = x + offsets(row, sizes, strides, UNIT)[:, None] + column[None, :]
    return tl.load(at, mask, other=0.0).to(tl.float32)


@jit
def write(y, tile, row, column, mask, sizes, strides, UNIT: tl.constexpr):
    at = y + offsets(row, sizes, strides, UNIT)[:, None] + column[None, :]
    tl.store(at, tile.to(y.dtype.element_ty), mask)


@jit
def read_parameter(p, column, width):
    """Of a gain or a bias (width,), the same for all rows: (1, columns) in float32, 0 past the end."""
    return tl.load(p + column, column < width, other=0.0).to(tl.float32)[None, :]


class Layout(NamedTuple):
    """How views of 1 to 4 dimensions lie whose leading sizes agree. Strides and width are in units of `unit` elements,
    `sizes` are the leading ones, filled up with 1 at the end: so rows with one stride take no division."""

    sizes: tuple[int, int, int]
    width: int
    unit: int
    strides: dict[str, tuple[int, int, int]]

    @property
    def rows(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]


def layout_of(views: dict[str, Tensor | None], parts: int = 1) -> Layout:
    """Of the views that are not None; `parts`: into so many the first one's rows are cut, each to start at a unit."""
    tensors = {name: x for name, x in views.items() if x is not None}
    x = next(iter(tensors.values()))
    sizes, width = _filled(x.shape[:-1], 1), x.shape[-1] // parts
    if max(sizes[0] * sizes[1] * sizes[2], width) >= 2**30:  # offsets in rows and numbers of rows are of 32 bits
        raise ValueError(f"{next(iter(tensors))} has shape {tuple(x.shape)}: expected less than 2^30 rows and elements")
    strides = {
        name: _filled([stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True)][:-1], 0)
        for name, t in tensors.items()
    }
    unit = 16 // x.element_size()
    if width % unit or any(stride % unit for each in strides.values() for stride in each):
        unit = 1
    strides = {name: tuple(stride // unit for stride in each) for name, each in strides.items()}
    none = (0, 0, 0)
    return Layout(sizes, width // unit, unit, {name: strides.get(name, none) for name in views})


def _filled(numbers, fill: int) -> tuple[int, int, int]:
    return (*numbers, *(fill,) * (3 - len(numbers)))


class Tile(NamedTuple):
    """What a program holds at once: rows and columns, powers of two."""

    rows: int
    columns: int
    warps: int

    def groups(self, rows: int) -> int:
        return triton.cdiv(rows, self.rows)


def tile_of(layout: Layout, element_size: int, tensors: int = 1, widest: int = 16384) -> Tile:
    """For rows of which a kernel reads `tensors` numbers each: whole rows where they have at most `widest` elements.
    A program asks for 16 KB at once, or for one row if that is more, and a thread for 64 bytes: 16 or 32 numbers in
    registers, so that a multiprocessor holds 1024 threads and 64 KB are on their way. Half as many where elements come
    one by one: each has an address then, in two registers."""
    columns = min(triton.next_power_of_2(layout.width * layout.unit), widest)
    of_row = columns * element_size * tensors
    rows = _power_of_two(16384 // of_row)
    of_thread = 64 if layout.unit > 1 else 32
    return Tile(rows, columns, min(_power_of_two(rows * of_row // (32 * of_thread)), 16))


def _power_of_two(number: int) -> int:
    """The largest that is not above the number, or 1."""
    return 1 << max(number.bit_length() - 1, 0)
