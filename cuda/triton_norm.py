"""RMSNorm and LayerNorm of rows, forward and backward, the residual connection before them in the same pass.

Bytes: x read, y written (with a residual: x and that read, h and y written); backward h and d_y (and d_h) read, d_x
written. A tile of whole rows is one value in registers; sums along it are `tl.sum`. Where the CUDA version has teams of
threads, shuffles and slots in shared memory, the compiler chooses them. What it cannot do is to sum gradients of gains
in shared memory: they stay in registers, one number for each of the tile. Rows are read twice where a tile cannot hold
them: forward above 16384 elements, backward above 8192, or 4096 where rows do not start at multiples of 16 bytes. The
CUDA version refuses those that are too wide. Refused here: as in triton_rows.py.
"""

import torch
import triton
import triton.language as tl

from cuda.triton_compat import jit
from cuda.triton_rows import layout_of, read, read_parameter, tile_of, write


def reference(x, gain=None, bias=None, residual=None, eps=1e-6, centred=False):
    """y, h, mean and rstd in float32; mean is 0 for RMSNorm."""
    h = x.float() if residual is None else (x.float() + residual.float()).to(x.dtype).float()
    mean = h.mean(-1, keepdim=True) if centred else torch.zeros_like(h[..., :1])
    rstd = ((h - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (h - mean) * rstd * (1 if gain is None else gain.float()) + (0 if bias is None else bias.float())
    return y, h, mean, rstd


# ---- forward ---------------------------------------------------------------------------------------------------------


@jit
def _summed(x, residual, h, row, column, mask, sizes, strides, UNIT: tl.constexpr):
    """A tile of x, or of x + residual, rounded to the type of h and written there: the h that is normalised."""
    tile = read(x, row, column, mask, sizes, strides[0], UNIT)
    if residual is not None:
        tile += read(residual, row, column, mask, sizes, strides[1], UNIT)
        tile = tile.to(h.dtype.element_ty)
        write(h, tile, row, column, mask, sizes, strides[2], UNIT)
    return tile.to(tl.float32)


@jit
def _scaled(hat, gain, bias, column, width):
    if gain is not None:
        hat *= read_parameter(gain, column, width)
    if bias is not None:
        hat += read_parameter(bias, column, width)
    return hat


@jit
def _statistics(tile, mask, count):
    """Means of a tile's rows and sums of squares of what is left without them, from registers: no cancellation."""
    mean = tl.sum(tile, 1) / count
    rest = tl.where(mask, tile - mean[:, None], 0.0)
    return mean, tl.sum(rest * rest, 1)


@jit
def _forward(
    x, residual, h, y, gain, bias, mean, rstd, sizes, strides, rows, width, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Whole rows: each number is read once."""
    width = width * UNIT
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    tile = _summed(x, residual, h, row, column, mask, sizes, strides, UNIT)
    if mean is not None:
        centre, squares = _statistics(tile, mask, width)
        tl.store(mean + row, centre, row < rows)
        tile -= centre[:, None]
    else:
        squares = tl.sum(tile * tile, 1)
    scale = 1.0 / tl.sqrt(squares / width + eps)
    tl.store(rstd + row, scale, row < rows)
    write(y, _scaled(tile * scale[:, None], gain, bias, column, width), row, column, mask, sizes, strides[3], UNIT)


@jit
def _forward_wide(
    x, residual, h, y, gain, bias, mean, rstd, sizes, strides, rows, width, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row in strips, twice: statistics, then y. Those of strips are joined by their means and sums of squares."""
    width = width * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    centre, squares = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        tile = _summed(x, residual, h, row, column, mask, sizes, strides, UNIT)
        if mean is not None:
            count = tl.minimum(width - first, COLUMNS)
            strip_centre, strip_squares = _statistics(tile, mask, count)
            step = strip_centre - centre
            share = count / (first + count)
            squares += strip_squares + step * step * (first * share)
            centre += step * share
        else:
            squares += tl.sum(tile * tile, 1)
    scale = 1.0 / tl.sqrt(squares / width + eps)
    tl.store(rstd + row, scale, row < rows)
    if mean is not None:
        tl.store(mean + row, centre, row < rows)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        tile = _summed(x, residual, h, row, column, mask, sizes, strides, UNIT)
        hat = (tile - centre[:, None]) * scale[:, None]
        write(y, _scaled(hat, gain, bias, column, width), row, column, mask, sizes, strides[3], UNIT)


def norm_forward(place, *, x, y, rstd, eps, mean=None, residual=None, h=None, gain=None, bias=None) -> None:
    layout = layout_of({"x": x, "residual": residual, "h": h, "y": y})
    tile = tile_of(layout, x.element_size())
    kernel = _forward if x.shape[-1] <= tile.columns else _forward_wide
    kernel[(tile.groups(layout.rows),)](
        x, residual, h, y, gain, bias, mean, rstd, layout.sizes, tuple(layout.strides.values()),
        layout.rows, layout.width, float(eps), layout.unit, tile.rows, tile.columns, num_warps=tile.warps,
    )  # fmt: skip


# ---- backward --------------------------------------------------------------------------------------------------------
# With hat = (h - mean) * rstd and w = gain * d_y, and means along the row:
#
#   d_x = rstd * (w - hat * mean(w * hat) - mean(w)) + d_h        RMSNorm: without the last mean


@jit
def _inputs(h, d_y, mean, rstd, row, column, mask, rows, sizes, strides, UNIT: tl.constexpr):
    """Tiles hat and d_y, and the scale of each row."""
    hat = read(h, row, column, mask, sizes, strides[0], UNIT)
    slope = read(d_y, row, column, mask, sizes, strides[1], UNIT)
    scale = tl.load(rstd + row, row < rows, other=0.0)
    if mean is not None:
        hat -= tl.load(mean + row, row < rows, other=0.0)[:, None]
    return hat * scale[:, None], slope, scale


@jit
def _write_d_x(d_x, d_h, tile, row, column, mask, sizes, strides, UNIT: tl.constexpr):
    if d_h is not None:
        tile += read(d_h, row, column, mask, sizes, strides[2], UNIT)
    write(d_x, tile, row, column, mask, sizes, strides[3], UNIT)


@jit
def _means_wide(
    h, d_y, gain, mean, rstd, means, sizes, strides, rows, width,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mean(w * hat) and mean(w) of rows wider than a tile, (2, rows)."""
    width = width * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    along, level = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        hat, slope, _ = _inputs(h, d_y, mean, rstd, row, column, mask, rows, sizes, strides, UNIT)
        if gain is not None:
            slope *= read_parameter(gain, column, width)
        along += slope * hat
        level += slope
    tl.store(means + row, tl.sum(along, 1) / width, row < rows)
    tl.store(means + rows + row, tl.sum(level, 1) / width, row < rows)


@jit
def _backward(
    h, d_y, d_h, d_x, gain, mean, rstd, means, partials, sizes, strides, rows, width, padded,
    OF_BIAS: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs stay and take every n-th group of rows, so that gradients of gains are few partial sums. Of rows wider
    than a tile a program takes one strip, and `means` are known."""
    width = width * UNIT
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_gain, of_bias = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        hat, slope, scale = _inputs(h, d_y, mean, rstd, row, column, mask, rows, sizes, strides, UNIT)
        if partials is not None:
            of_gain += slope * hat
            if OF_BIAS:
                of_bias += slope
        if gain is not None:
            slope *= read_parameter(gain, column, width)
        if means is None:
            along, level = tl.sum(slope * hat, 1) / width, tl.sum(slope, 1) / width
        else:
            along = tl.load(means + row, row < rows, other=0.0)
            level = tl.load(means + rows + row, row < rows, other=0.0)
        tile = slope - hat * along[:, None]
        if mean is not None:
            tile -= level[:, None]
        _write_d_x(d_x, d_h, tile * scale[:, None], row, column, mask, sizes, strides, UNIT)
    if partials is not None:
        to = partials + tl.program_id(0).to(tl.int64) * padded * (2 if OF_BIAS else 1) + column
        tl.store(to, tl.sum(of_gain, 0), column < width)
        if OF_BIAS:
            tl.store(to + padded, tl.sum(of_bias, 0), column < width)


@jit
def _add_partials(partials, d_gain, d_bias, programs, width, padded, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over programs, in an order that never changes. A second grid dimension is for the bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kinds, kind = tl.num_programs(1), tl.program_id(1)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for first in range(0, programs, LINES):
        line = first + tl.arange(0, LINES)
        at = partials + (line.to(tl.int64) * kinds + kind)[:, None] * padded + column[None, :]
        total += tl.load(at, (line < programs)[:, None] & (column < width)[None, :], other=0.0)
    of_column = tl.sum(total, 0)
    if kind == 0:
        tl.store(d_gain + column, of_column.to(d_gain.dtype.element_ty), column < width)
    elif d_bias is not None:
        tl.store(d_bias + column, of_column.to(d_bias.dtype.element_ty), column < width)


def norm_backward(
    place, *, h, d_y, d_x, rstd, mean=None, d_h=None, gain=None, partials=None, d_gain=None, d_bias=None
) -> None:
    """partials (programs, 1 or 2, padded width): so many programs at the most sum gradients of gain and bias."""
    layout = layout_of({"h": h, "d_y": d_y, "d_h": d_h, "d_x": d_x})
    rows, width, strides = layout.rows, h.shape[-1], tuple(layout.strides.values())
    tile = tile_of(layout, h.element_size(), tensors=2, widest=8192 if layout.unit > 1 else 4096)
    shape = (layout.unit, tile.rows, tile.columns)
    strips, programs, means, padded = triton.cdiv(width, tile.columns), tile.groups(rows), None, 0
    if strips > 1:
        means = rstd.new_empty((2, rows))
        _means_wide[(programs,)](
            h, d_y, gain, mean, rstd, means, layout.sizes, strides, rows, layout.width, *shape, num_warps=tile.warps
        )
    if partials is not None:
        # As many as run at once, in one wave: 16 warps on a multiprocessor, whose threads may have 128 registers each.
        most = min(place.multiprocessors * 16 // (tile.warps * strips), partials.shape[0])
        programs, padded = min(programs, max(most, 1)), partials.shape[2]
    _backward[(programs, strips)](
        h, d_y, d_h, d_x, gain, mean, rstd, means, partials, layout.sizes, strides, rows, layout.width, padded,
        d_bias is not None, 2 if layout.unit > 1 else 1, *shape, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None:
        columns = triton.next_power_of_2(triton.cdiv(width, place.multiprocessors))  # a program a multiprocessor
        columns = min(max(columns, 32), 256)  # 128 bytes of each line, or more
        grid = (triton.cdiv(width, columns), partials.shape[1])
        _add_partials[grid](partials, d_gain, d_bias, programs, width, padded, 2048 // columns, columns)
