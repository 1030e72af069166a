"""Matrices of 4 and 8 bits in Triton: tiles of weights from packed bytes, for every kernel that reads such a matrix.

Formats are those of quantised_ops.py. Triton gives the way of nibbles from bytes to where tensor cores want them: a
tile is interleaved, looked up, scaled, and the compiler finds which thread needs which byte. It takes the choice of
where a table lies: shared memory belongs to the compiler, which writes the table there for each tile anew (`look_up`).
Refused: nothing here, quantised_ops.py checks. Letters: W is (rows, columns), which a Linear calls (out, in).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit


def reference(numbers: Tensor, scale: Tensor, zero: Tensor | float, block: int) -> Tensor:
    """The weights that a line of numbers means, `block` of them with each scale and zero; in NF4 numbers are entries of
    its table and zeros 0."""
    zero = torch.as_tensor(zero).expand(scale.shape)
    return (numbers - zero.repeat_interleave(block)[: len(numbers)]) * scale.repeat_interleave(block)[: len(numbers)]


# How a kernel reads W. FLAT is NF4 whose rows are no whole number of blocks, so that blocks and bytes straddle them.
NF4: tl.constexpr = tl.constexpr(0)
FLAT: tl.constexpr = tl.constexpr(1)
INT4: tl.constexpr = tl.constexpr(2)
INT8: tl.constexpr = tl.constexpr(3)
FORMATS = {"nf4": NF4, "flat": FLAT, "int4": INT4, "int8": INT8}
NESTED_BLOCK: tl.constexpr = tl.constexpr(256)


class Weight(NamedTuple):
    """The first arguments of kernels: where W lies and what it means. None is what a format does not have; groups are
    the scales of a row, row_bytes means nothing in FLAT."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    scale2: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    table: Tensor | None
    rows: int
    columns: int
    row_bytes: int
    groups: int
    FORMAT: int
    BLOCK: int
    NESTED: bool


def weight_of(
    format: str, rows: int, columns: int, block: int, packed, scale, zero=None, scale2=None, offset=None, code=None,
    table=None,
) -> Weight:  # fmt: skip
    row_bytes = columns if format == "int8" else triton.cdiv(columns, 2)
    tensors = (packed, scale, zero, scale2, offset, code, table)
    groups = triton.cdiv(columns, block)
    return Weight(*tensors, rows, columns, row_bytes, groups, FORMATS[format].value, block, scale2 is not None)


@jit
def scale_of(scale, scale2, offset, code, block, mask, NESTED: tl.constexpr):
    """Of blocks, in float32; 0 outside, so that weights there are 0."""
    if NESTED:
        value = tl.load(code + tl.load(scale + block, mask=mask, other=0).to(tl.int32))
        value = value * tl.load(scale2 + block // NESTED_BLOCK, mask=mask, other=0.0) + tl.load(offset)
        value = tl.where(mask, value, 0.0)
    else:
        value = tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)
    return value


@jit
def look_up(nibble, table):
    """A gather in one dimension goes through shared memory: one LDS a weight, and no two of 16 entries share a bank.
    A load from a table in global memory takes an LDG and two instructions for its address, a tree of selections 10 of
    them, and a gather in rows by shuffles ten times the instructions of this one."""
    entries = tl.load(table + tl.arange(0, 16))
    return tl.reshape(tl.gather(entries, tl.ravel(nibble), 0), nibble.shape)


@jit
def tile_of(
    packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups, row, first,
    WIDTH: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Weights in float32: rows `row`, WIDTH columns from `first` on, a multiple of WIDTH. 0 outside of W, but for the
    nibble that fills up a row of odd length."""
    row = row.to(tl.int64)[:, None]
    within = row < rows
    if FORMAT == FLAT:
        column = first + 2 * tl.arange(0, WIDTH // 2)[None, :]
        within1 = within & (column + 1 < columns)
        within = within & (column < columns)
        element = (row * columns + column).to(tl.uint64)  # a division of signed numbers would be four instructions
        shift = 4 * (element & 1).to(tl.int32)
        high = tl.load(packed + element // 2, mask=within, other=0).to(tl.int32) >> (4 - shift)
        low = tl.load(packed + (element + 1) // 2, mask=within1, other=0).to(tl.int32) >> shift
        s0 = scale_of(scale, scale2, offset, code, element // BLOCK, within, NESTED)
        s1 = scale_of(scale, scale2, offset, code, (element + 1) // BLOCK, within1, NESTED)
        w = look_up(tl.interleave(high, low) & 15, table) * tl.interleave(s0, s1)
    else:
        if FORMAT == INT8:
            byte = first + tl.arange(0, WIDTH)[None, :]
            number = tl.load(packed + row * row_bytes + byte, mask=within & (byte < row_bytes), other=0)
        else:
            byte = first // 2 + tl.arange(0, WIDTH // 2)[None, :]
            pair = tl.load(packed + row * row_bytes + byte, mask=within & (byte < row_bytes), other=0).to(tl.int32)
            number = tl.interleave(pair >> 4, pair & 15)
        SPAN: tl.constexpr = BLOCK if BLOCK < WIDTH else WIDTH  # columns that share a scale: one load for all of them
        group = first // BLOCK + tl.arange(0, WIDTH // SPAN)[None, :]
        within = within & (group < groups)
        s = scale_of(scale, scale2, offset, code, row * groups + group, within, NESTED)
        number = tl.reshape(number, (row.shape[0], WIDTH // SPAN, SPAN))
        if FORMAT == NF4:
            number = look_up(number, table)
        number = number.to(tl.float32)
        if FORMAT == INT4:
            if zero is None:
                number -= 8.0
            else:
                number -= tl.load(zero + row * groups + group, mask=within, other=0).to(tl.float32)[:, :, None]
        w = tl.reshape(number * s[:, :, None], (row.shape[0], WIDTH))
    return w


@jit
def _dequantise(
    packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, w, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tiles = (columns - 1) // WIDTH + 1  # tl.cdiv adds first, and a line of nearly 2^31 numbers would pass 2^31
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % tiles).to(tl.int64) * WIDTH
    tile = tile_of(
        packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups, row, first,
        WIDTH, FORMAT, BLOCK, NESTED,
    )  # fmt: skip
    column = first + tl.arange(0, WIDTH)[None, :]
    to = w + row[:, None] * columns + column
    tl.store(to, tile.to(w.dtype.element_ty), mask=(row[:, None] < rows) & (column < columns))


def dequantise(place, *, w: Tensor, format: str, **weight) -> None:
    """w (rows, columns) in any of the types that kernels compute with."""
    if format == "nf4":  # which knows nothing of rows
        weight |= {"rows": 1, "columns": w.numel()}
    given = weight_of(format, **weight)
    width = min(TILE, max(16, triton.next_power_of_2(given.columns)))
    grid = (triton.cdiv(given.rows, TILE // width) * triton.cdiv(given.columns, width),)
    # A nested scale is a product and a sum: rounded twice, as bitsandbytes does it, so that both make the same numbers.
    _dequantise[grid](*given, w, ROWS=TILE // width, WIDTH=width, num_warps=4, enable_fp_fusion=False)


TILE = 4096  # weights a program: 32 a thread, 16 bytes of which are read and 64 written
