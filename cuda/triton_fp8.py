"""Float8 in Triton: tensors scaled and cast to it, and the product of two such tensors on Hopper's tensor cores.

Two kernels quantise (maxima, then the cast), or one where each row has its own scale and is read once. The product is
persistent and its tiles come by TMA; Triton makes QGMMA of `tl.dot`, loads stages ahead and stores a tile while the
next one's loads run. What it takes from us: which accumulators are promoted is its choice, we only say how often.
There is no CUDA C++ version. Refused: a GPU before Hopper, whose tensor cores do not know e4m3 (RuntimeError), and
operands that TMA cannot describe (fp8_ops.py says how they should lie).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import TensorDescriptor, jit
from cuda.triton_tilings import Tiling, choose

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still a float32
LEAST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


def reference_quantize(x: Tensor, scaling: str, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    x = (x.mT if transposed else x).float()
    size = x.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    largest = size.amax(1, keepdim=True) if scaling == "row" else size.amax()
    scale = torch.where(largest > 0, (largest / LARGEST[dtype]).clamp(min=SMALLEST_SCALE), 1.0)
    return (x * (1 / scale)).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def reference_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None) -> Tensor:
    d = (scale_a.double() * a.double()) @ (scale_b.double() * b.double())
    return d if bias is None else d + bias.double()


# ---- scaling and casting ---------------------------------------------------------------------------------------------


@jit
def _scale(largest, LARGEST: tl.constexpr):
    """What the values are divided by; 1 where all are 0 or NaN."""
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), LEAST_SCALE)
    return tl.where(largest > 0, scale, 1.0)


@jit
def _reciprocal(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@jit
def _saturated(x, LARGEST: tl.constexpr):
    """A NaN compares as false and stays; the cast on the GPU saturates too, but that of the interpreter does not."""
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x)


@jit
def _quantize_rows(
    x, y, scale, rows, columns, stride_x, stride_y,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A scale for each row. A row of more than a block is read twice, the second time from L2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    x_row, y_row = x + row[:, None] * stride_x, y + row[:, None] * stride_y
    if WHOLE:
        here = inside & (column < columns)[None, :]
        values = tl.load(x_row + column[None, :], mask=here, other=0.0).to(tl.float32)
        s = _scale(tl.max(tl.abs(values), axis=1), LARGEST)
        values = _saturated(values * _reciprocal(s)[:, None], LARGEST)
        tl.store(y_row + column[None, :], values.to(y.dtype.element_ty), mask=here)
    else:
        largest = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, BLOCK):
            here = inside & (start + column < columns)[None, :]
            values = tl.load(x_row + start + column[None, :], mask=here, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
        s = _scale(largest, LARGEST)
        inverse = _reciprocal(s)[:, None]
        for start in range(0, columns, BLOCK):
            here = inside & (start + column < columns)[None, :]
            values = tl.load(x_row + start + column[None, :], mask=here, other=0.0).to(tl.float32)
            values = _saturated(values * inverse, LARGEST)
            tl.store(y_row + start + column[None, :], values.to(y.dtype.element_ty), mask=here)
    tl.store(scale + row, s, mask=row < rows)


@jit
def _maxima(
    x, partial, rows, columns, chunk, stride_x, PER_COLUMN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a chunk of rows and a block of columns: one number, or one for each column."""
    block, part = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part * chunk, min(rows, (part + 1) * chunk), ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=here, other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    of_columns = tl.max(largest, axis=0)
    if PER_COLUMN:
        tl.store(partial + part.to(tl.int64) * columns + column, of_columns, mask=column < columns)
    else:
        tl.store(partial + part * tl.num_programs(0) + block, tl.max(of_columns, axis=0))


@jit
def _largest_of_all(partial, count):
    largest = tl.zeros([256], tl.float32)
    for start in range(0, count, 256):
        index = start + tl.arange(0, 256)
        largest = tl.maximum(largest, tl.load(partial + index, mask=index < count, other=0.0))
    return tl.max(largest, axis=0)


@jit
def _largest_of_columns(partial, parts, column, columns, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, 32):
        part = start + tl.arange(0, 32)
        here = (part < parts)[:, None] & (column < columns)[None, :]
        values = tl.load(partial + part.to(tl.int64)[:, None] * columns + column[None, :], mask=here, other=0.0)
        largest = tl.maximum(largest, tl.max(values, axis=0))
    return largest


@jit
def _cast(
    x, y, partial, scale, rows, columns, chunk, stride_x, stride_y,
    LARGEST: tl.constexpr, PER_COLUMN: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chunk that the same program of `_maxima` read: with luck it is still in L2."""
    block, part = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    if PER_COLUMN:
        s = _scale(_largest_of_columns(partial, tl.num_programs(1), column, columns, BLOCK), LARGEST)
        if part == 0:
            tl.store(scale + column, s, mask=column < columns)
    else:
        largest = _largest_of_all(partial, tl.num_programs(0) * tl.num_programs(1))
        s = _scale(tl.full([BLOCK], largest, tl.float32), LARGEST)
        if part + block == 0:
            tl.store(scale + tl.arange(0, BLOCK), s, mask=tl.arange(0, BLOCK) == 0)
    inverse = _reciprocal(s)[None, :]
    for start in range(part * chunk, min(rows, (part + 1) * chunk), ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=here, other=0.0)
        values = _saturated(values.to(tl.float32) * inverse, LARGEST).to(y.dtype.element_ty)
        if TRANSPOSED:
            there = (column < columns)[:, None] & (row < rows)[None, :]
            tl.store(y + column.to(tl.int64)[:, None] * stride_y + row[None, :], tl.trans(values), mask=there)
        else:
            tl.store(y + row.to(tl.int64)[:, None] * stride_y + column[None, :], values, mask=here)


def quantize_fp8(place, *, x: Tensor, y: Tensor, scale: Tensor, per_row: bool, transposed: bool) -> None:
    """y is of x, or of its transpose; scale has one number, or one for each row of y."""
    _expect_hopper(place)
    rows, columns = x.shape
    largest = LARGEST[y.dtype]
    if per_row and not transposed:
        block = min(triton.next_power_of_2(columns), 8192)
        at_once = max(1, 4096 // block)  # some 32 values for each of 128 threads: four loads of 16 bytes in flight
        _quantize_rows[(triton.cdiv(rows, at_once),)](
            x, y, scale, rows, columns, x.stride(0), y.stride(0),
            LARGEST=largest, ROWS=at_once, BLOCK=block, WHOLE=block >= columns, num_warps=8 if block == 8192 else 4,
        )  # fmt: skip
        return
    at_once, block = (128, 64) if transposed else (16, 512)  # lines of 128 bytes, read and written
    blocks = triton.cdiv(columns, block)
    parts = min(triton.cdiv(rows, at_once), triton.cdiv(4 * place.multiprocessors, blocks))
    chunk = triton.cdiv(triton.cdiv(rows, parts), at_once) * at_once
    parts = triton.cdiv(rows, chunk)
    partial = torch.empty(parts * (columns if per_row else blocks), dtype=torch.float32, device=x.device)
    sizes = {"PER_COLUMN": per_row, "ROWS": at_once, "BLOCK": block, "num_warps": 8}
    _maxima[(blocks, parts)](x, partial, rows, columns, chunk, x.stride(0), **sizes)
    _cast[(blocks, parts)](
        x, y, partial, scale, rows, columns, chunk, x.stride(0), y.stride(0),
        LARGEST=largest, TRANSPOSED=transposed, **sizes,
    )  # fmt: skip


# ---- the product -----------------------------------------------------------------------------------------------------


@jit
def _multiply(
    a, b, scale_a, scale_b, bias, d, m, n, k, step_a, step_b, stride_d,
    IMPRECISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    # flatten: the loads of the next tile start while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # RASTER tiles of rows beside one another share what they read of b in L2.
        band = tile // (RASTER * tiles_n)
        height = min(tiles_m - band * RASTER, RASTER)
        within = tile - band * RASTER * tiles_n
        row, column = (band * RASTER + within % height) * BLOCK_M, within // height * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            sums = tl.dot(a.load([row, start]), b.load([column, start]).T, sums, max_num_imprecise_acc=IMPRECISE)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        sums *= tl.load(scale_a + rows * step_a, mask=rows < m, other=0.0)[:, None]
        sums *= tl.load(scale_b + columns * step_b, mask=columns < n, other=0.0)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        there = d + rows.to(tl.int64)[:, None] * stride_d + columns[None, :]
        tl.store(there, sums.to(d.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def candidates(kind: str, m: int, n: int, promoted: bool) -> list[Tiling]:
    """A promoted sum has its accumulators twice: 128 x 128 then fills the registers as 128 x 256 does without."""
    if kind == "interpreter":
        return [Tiling(64, 64, 128)]
    narrow = Tiling(128, 128, 128, warps=8, stages=4)
    return [narrow] if promoted or n <= 128 or m <= 128 else [Tiling(128, 256, 128, warps=8, stages=3), narrow]


def fp8_matmul(
    place,
    *,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    d: Tensor,
    imprecise: int | None,
) -> None:
    """b is k x n with a contiguous k. `imprecise`: after how many of k a sum is promoted; None: never."""
    _expect_hopper(place)
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n, block_k, warps, stages = choose(
        "fp8_matmul", place.kind, (m, n, k), candidates(place.kind, m, n, imprecise is not None)
    )
    programs = min(place.multiprocessors, triton.cdiv(m, block_m) * triton.cdiv(n, block_n))
    _multiply[(programs,)](
        TensorDescriptor.from_tensor(a, [block_m, block_k]), TensorDescriptor.from_tensor(b.mT, [block_n, block_k]),
        scale_a, scale_b, d if bias is None else bias, d, m, n, k,
        int(scale_a.numel() > 1), int(scale_b.numel() > 1), d.stride(0),
        IMPRECISE=imprecise, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, RASTER=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _expect_hopper(place) -> None:
    if place.kind == "sm_80":
        raise RuntimeError("float8 on a GPU before Hopper: expected compute capability 9.0")
