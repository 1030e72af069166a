"""What the matrix products in Triton share: which tile is whose, and what becomes of a tile of sums.

The epilogue of cuda/matmul/epilogue.cuh in Triton: there each thread knows which elements it holds, here the compiler
does. Pairs of columns lie in one thread, so `tl.split` moves nothing.
"""

import triton.language as tl

from cuda.triton_compat import jit


@jit
def tile_of(t, rows, columns, GROUP: tl.constexpr):
    """Row and column of tile t of rows x columns. Inside of GROUP rows they go column by column, so that programs which
    run at the same time ask L2 for the same parts of A and of B."""
    first = t // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = t % (GROUP * columns)
    return first + inside % height, inside // height


@jit
def finished(sums, bias, column, n, alpha, ACTIVATION: tl.constexpr):
    """activation(alpha * sums + bias) of a tile that begins at this column; half as wide for swiglu."""
    ROWS: tl.constexpr = sums.shape[0]
    COLUMNS: tl.constexpr = sums.shape[1]
    x = sums * alpha
    if bias is not None:
        at = column + tl.arange(0, COLUMNS)
        x += tl.load(bias + at, mask=at < n, other=0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "swiglu":
        gate, up = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
        x = gate / (1 + tl.exp(-gate)) * up
    return x


@jit
def put(x, d, tiles, c, z, row, column, m, n, batch_d, row_d, batch_c, row_c, beta):
    """d = x + beta * c where x begins at this row and column of matrix z, in d's own rows and columns m x n. Through
    TMA if `tiles` describes d; that is for products without c, for then x goes to shared memory but once."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if tiles is not None:
        tiles.store([z, row, column], tl.reshape(x.to(d.dtype.element_ty), (1, ROWS, COLUMNS)))
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        inside = (rows < m) & (columns < n)
        matrix = tl.cast(z, tl.int64)
        if c is not None:
            added = tl.load(c + matrix * batch_c + rows * row_c + columns, mask=inside, other=0)
            x += beta * added.to(tl.float32)
        tl.store(d + matrix * batch_d + rows * row_d + columns, x.to(d.dtype.element_ty), mask=inside)


@jit
def epilogue(
    sums,
    d,
    tiles,
    c,
    bias,
    z,
    row,
    column,
    m,
    n,
    batch_d,
    row_d,
    batch_c,
    row_c,
    alpha,
    beta,
    ACTIVATION: tl.constexpr,
):
    """All that is left to do for a tile of sums, by halves: one after the other they take the same registers and the
    same shared memory, which leaves room for one stage more."""
    ROWS: tl.constexpr = sums.shape[0]
    HALF: tl.constexpr = sums.shape[1] // 2
    OUT: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
    x = finished(left, bias, column, n, alpha, ACTIVATION)
    put(x, d, tiles, c, z, row, column // OUT, m, n // OUT, batch_d, row_d, batch_c, row_c, beta)
    x = finished(right, bias, column + HALF, n, alpha, ACTIVATION)
    put(x, d, tiles, c, z, row, (column + HALF) // OUT, m, n // OUT, batch_d, row_d, batch_c, row_c, beta)
