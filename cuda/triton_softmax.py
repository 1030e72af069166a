"""Softmax of rows, forward and backward.

Bytes: x read, y written; backward y and d_y read, d_x written. Rows of more than 16384 elements are read twice, as in
the CUDA version: maximum and sum in one pass, in which each column of the tile has its own and what was summed under a
smaller maximum is scaled down; the result in a second. Triton gives maximum and sum of a tile in a line each; its
maximum drops NaN, which comes back by exp(NaN) in the sum. Refused: as in triton_rows.py.
"""

import triton.language as tl

from cuda.triton_compat import jit
from cuda.triton_rows import layout_of, read, tile_of, write


def reference(x):
    e = (x.float() - x.float().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@jit
def _forward(
    x, y, sizes, strides, rows, width, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Whole rows: each number is read once."""
    width = width * UNIT
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    mask = (row < rows)[:, None] & inside
    tile = tl.where(inside, read(x, row, column, mask, sizes, strides[0], UNIT), float("-inf"))
    tile = tl.exp(tile - tl.max(tile, 1)[:, None])
    tile *= (1.0 / tl.sum(tile, 1))[:, None]
    write(y, tile, row, column, mask, sizes, strides[1], UNIT)


@jit
def _forward_wide(
    x, y, sizes, strides, rows, width, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A row in strips, twice."""
    width = width * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    most, total = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < width)[None, :]
        mask = (row < rows)[:, None] & inside
        tile = tl.where(inside, read(x, row, column, mask, sizes, strides[0], UNIT), float("-inf"))
        top = tl.maximum(most, tile)
        shift = tl.where(top == float("-inf"), 0.0, top)  # nothing but -inf so far: exp(-inf - 0) = 0
        total = total * tl.exp(most - shift) + tl.exp(tile - shift)
        most = top
    top = tl.max(most, 1)
    total *= tl.exp(most - tl.where(top == float("-inf"), 0.0, top)[:, None])
    factor = 1.0 / tl.sum(total, 1)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        tile = tl.exp(read(x, row, column, mask, sizes, strides[0], UNIT) - top[:, None]) * factor[:, None]
        write(y, tile, row, column, mask, sizes, strides[1], UNIT)


def softmax_forward(place, *, x, y) -> None:
    layout = layout_of({"x": x, "y": y})
    tile = tile_of(layout, x.element_size())
    kernel = _forward if x.shape[-1] <= tile.columns else _forward_wide
    kernel[(tile.groups(layout.rows),)](
        x, y, layout.sizes, tuple(layout.strides.values()), layout.rows, layout.width,
        layout.unit, tile.rows, tile.columns, num_warps=tile.warps,
    )  # fmt: skip


@jit
def _backward(
    y, d_y, d_x, sizes, strides, rows, width, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """d_x = y * (d_y - sum(y * d_y)) of whole rows."""
    width = width * UNIT
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    tile = read(y, row, column, mask, sizes, strides[0], UNIT)
    slope = read(d_y, row, column, mask, sizes, strides[1], UNIT)
    tile *= slope - tl.sum(tile * slope, 1)[:, None]
    write(d_x, tile, row, column, mask, sizes, strides[2], UNIT)


@jit
def _backward_wide(
    y, d_y, d_x, sizes, strides, rows, width, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A row in strips, twice."""
    width = width * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        tile = read(y, row, column, mask, sizes, strides[0], UNIT)
        total += tile * read(d_y, row, column, mask, sizes, strides[1], UNIT)
    level = tl.sum(total, 1)[:, None]
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        tile = read(y, row, column, mask, sizes, strides[0], UNIT)
        tile *= read(d_y, row, column, mask, sizes, strides[1], UNIT) - level
        write(d_x, tile, row, column, mask, sizes, strides[2], UNIT)


def softmax_backward(place, *, y, d_y, d_x) -> None:
    layout = layout_of({"y": y, "d_y": d_y, "d_x": d_x})
    tile = tile_of(layout, y.element_size(), tensors=2)
    kernel = _backward if y.shape[-1] <= tile.columns else _backward_wide
    kernel[(tile.groups(layout.rows),)](
        y, d_y, d_x, layout.sizes, tuple(layout.strides.values()), layout.rows, layout.width,
        layout.unit, tile.rows, tile.columns, num_warps=tile.warps,
    )  # fmt: skip
