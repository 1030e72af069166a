"""Rotary embedding: channels i and i + K/2 of a head turn together by the angle of their position.

Bytes: x read, y written, both halves of a row by one program; tables come out of caches where heads or sequences share
them: a stride of 0. The backward pass turns back: the same kernel with -sin. As in the CUDA version; what Triton takes
over is who reads which 16 bytes. Refused: as in triton_rows.py.
"""

import torch
import triton
import triton.language as tl

from cuda.triton_compat import jit
from cuda.triton_rows import layout_of, read, tile_of, write


def reference(x, cos, sin, sign=1.0):
    x1, x2 = x.float().chunk(2, -1)
    cos, sin = cos.float(), sign * sin.float()
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


@jit
def _rotate(
    x, y, cos, sin, sizes, strides, rows, half, strips, sign,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    half = half * UNIT
    row = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    x1 = read(x, row, column, mask, sizes, strides[0], UNIT)
    x2 = read(x, row, column + half, mask, sizes, strides[0], UNIT)
    along = read(cos, row, column, mask, sizes, strides[2], UNIT)
    across = read(sin, row, column, mask, sizes, strides[3], UNIT) * sign
    write(y, x1 * along - x2 * across, row, column, mask, sizes, strides[1], UNIT)
    write(y, x2 * along + x1 * across, row, column + half, mask, sizes, strides[1], UNIT)


def rotary(place, *, x, y, cos, sin, sign) -> None:
    """cos and sin (.., K/2), in float32 or the type of x; sign 1: forward, -1: backward."""
    layout = layout_of({"x": x, "y": y, "cos": cos, "sin": sin}, parts=2)
    half = x.shape[-1] // 2
    tile = tile_of(layout, x.element_size(), tensors=4, widest=2048)
    strips = triton.cdiv(half, tile.columns)
    _rotate[(tile.groups(layout.rows) * strips,)](
        x, y, cos, sin, layout.sizes, tuple(layout.strides.values()), layout.rows, layout.width, strips, float(sign),
        layout.unit, tile.rows, tile.columns, num_warps=tile.warps,
    )  # fmt: skip
