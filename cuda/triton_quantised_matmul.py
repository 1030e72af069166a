"""Products with a matrix of 4 or 8 bits in Triton: x @ W.T for few rows of x and for many, and dy @ W.

W is read as it lies, unpacked in registers (triton_quantised.py) and never written out. Triton gives the pipeline, the
operand of wgmma that stays in registers, and one kernel for all formats; it takes control of layouts: that a thread
owns 16 bytes of W and the numbers of x beside them has to be said by the shapes of tensors (`_multiply_few`). Where
tiles alone leave multiprocessors without work, the sum is cut into parts, added in one order: the same bits every time.
For hundreds of rows (MANY) W is unpacked once, into memory, since each tile of x would unpack its tiles of W again.
Refused: nothing here, quantised_ops.py checks. Letters: W is (rows, columns), x (m, columns), y (m, rows).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit
from cuda.triton_parts import add
from cuda.triton_quantised import FLAT, INT4, INT8, Weight, dequantise, look_up, scale_of, tile_of, weight_of
from cuda.triton_tilings import Tiling


def reference(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ w.to(x.dtype).T
    return y if bias is None else y + bias


@jit
def _multiply(
    packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, x, bias, y, m, stride, share,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(W @ x.T).T: as the left operand of wgmma W comes from registers, where it was unpacked. y has a matrix for each
    part of the sum, `share` columns of W."""
    tiles = tl.cdiv(m, M)  # programs that read one tile of W start one after the other: it comes from memory once
    row = tl.program_id(0) // tiles * N + tl.arange(0, N)
    i = ((tl.program_id(0) % tiles).to(tl.int64) * M + tl.arange(0, M))[None, :]
    sums = tl.zeros((N, M), tl.float32)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, columns), K):
        column = first + tl.arange(0, K)[:, None]
        a = tl.load(x + i * stride + column, mask=(i < m) & (column < columns), other=0.0)
        tile = tile_of(
            packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups, row, first,
            K, FORMAT, BLOCK, NESTED,
        )  # fmt: skip
        sums = tl.dot(tile.to(a.dtype), a, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    y += tl.program_id(1).to(tl.int64) * m * rows
    tl.store(y + i * rows + row[:, None], sums.to(y.dtype.element_ty), mask=(i < m) & (row[:, None] < rows))


@jit
def _multiply_transposed(
    packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, dy, dx, m, stride, share,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dy @ W. Here the sum runs over rows of W: a pair in a register of wgmma's left operand would be of two rows, so W
    is the right operand, which goes through shared memory."""
    tiles = tl.cdiv(m, M)
    first = tl.program_id(0) // tiles * N
    i = ((tl.program_id(0) % tiles).to(tl.int64) * M + tl.arange(0, M))[:, None]
    sums = tl.zeros((M, N), tl.float32)
    begin = tl.program_id(1) * share  # the first row of W of this part of the sum
    for top in range(begin, tl.minimum(begin + share, rows), K):
        row = top + tl.arange(0, K)
        a = tl.load(dy + i * stride + row[None, :], mask=(i < m) & (row[None, :] < rows), other=0.0)
        tile = tile_of(
            packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups, row, first,
            N, FORMAT, BLOCK, NESTED,
        )  # fmt: skip
        sums = tl.dot(a, tile.to(a.dtype), sums, input_precision="ieee")
    column = first + tl.arange(0, N)[None, :]
    dx += tl.program_id(1).to(tl.int64) * m * columns
    tl.store(dx + i * columns + column, sums.to(dx.dtype.element_ty), mask=(i < m) & (column < columns))


@jit
def _multiply_few(
    packed, scale, zero, scale2, offset, code, table, rows, columns, row_bytes, groups,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, x, bias, y, m, stride,
    M: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Up to M rows of x. A lane takes 16 bytes of each of N rows of W at a time, which lie in one block, and the
    numbers of x beside them in chunks of 16 bytes.

    Tensors have the dimensions (rows of x, rows of W, chunks, lanes, within a chunk). A load gives a thread 16 bytes
    and the next thread what follows in the last dimension but one: with lanes there, it owns the same columns of x and
    of W, and needs no other thread until the last sum. With chunks there, all weights would move between threads."""
    EACH: tl.constexpr = 16 if FORMAT == INT8 else 32  # weights in 16 bytes
    CHUNK: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # numbers of x in 16 bytes
    i = tl.arange(0, M)
    row = tl.program_id(0) * N + tl.arange(0, N)
    lane = tl.arange(0, LANES)
    row3 = row.to(tl.int64)[None, :, None]
    start_w = row.to(tl.int64)[None, :, None, None] * row_bytes + tl.arange(0, 16)[None, None, None, :]
    number5 = tl.arange(0, EACH // CHUNK)[None, None, :, None, None] * CHUNK
    number5 += tl.arange(0, CHUNK)[None, None, None, None, :]
    sums = tl.zeros((M, N, LANES), tl.float32)
    for first in range(0, row_bytes, LANES * 16):
        byte = first + lane * 16
        mask = (row[None, :, None, None] < rows) & (byte[None, None, :, None] < row_bytes)
        number = tl.load(packed + start_w + byte[None, None, :, None], mask=mask, other=0)
        if FORMAT != INT8:
            number = number.to(tl.int32)
            number = tl.interleave(number >> 4, number & 15)
        number = tl.permute(tl.reshape(number, (1, N, LANES, EACH // CHUNK, CHUNK)), (0, 1, 3, 2, 4))
        column = byte * (EACH // 16)
        column3, column5 = column[None, None, :], column[None, None, None, :, None]
        block = (row3 * columns + column3) // BLOCK if FORMAT == FLAT else row3 * groups + column3 // BLOCK
        within = (row3 < rows) & (column3 < columns)
        s = scale_of(scale, scale2, offset, code, block, within, NESTED)
        if FORMAT <= FLAT:  # NF4 too
            number = look_up(number, table)
        number = number.to(tl.float32)
        if FORMAT == INT4:
            if zero is None:
                number -= 8.0
            else:
                row5 = row.to(tl.int64)[None, :, None, None, None]
                z = tl.load(zero + row5 * groups + column5 // BLOCK, mask=(row5 < rows) & (column5 < columns), other=0)
                number -= z.to(tl.float32)
        for r in tl.static_range(M):  # one row of x after the other: all of them at once are too many registers
            start = x + tl.minimum(m - 1, r) * stride  # those beyond m are not stored
            a = tl.load(start + column5 + number5, mask=column5 + number5 < columns, other=0.0)
            dots = tl.sum(tl.sum(number * a.to(tl.float32), 4), 2)
            sums = tl.where(i[:, None, None] == r, sums + dots * s, sums)  # nothing is compared: a thread has all i
    result = tl.sum(sums, 2)
    if bias is not None:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    to = y + i[:, None] * rows + row[None, :]
    tl.store(to, result.to(y.dtype.element_ty), mask=(i[:, None] < m) & (row[None, :] < rows))


# ---- launches --------------------------------------------------------------------------------------------------------


def quantised_multiply(place, *, x: Tensor, y: Tensor, bias: Tensor | None, format: str, **weight) -> None:
    """y (m, rows) = x (m, columns) @ W.T + bias."""
    m = len(x)
    if m > MANY:
        return place.multiply(None, _apart(x), _unpacked(place, x.dtype, format, weight).mT, y, bias=bias)
    format = _how(format, **weight)
    given = weight_of(format, **weight)
    if m <= FEW and _in_chunks(x, given):
        rows = 4 if m <= 4 else 2
        _multiply_few[(triton.cdiv(given.rows, rows),)](
            *given, x, bias, y, m, x.stride(0), M=triton.next_power_of_2(m), N=rows, LANES=128, num_warps=4
        )
        return None
    tiling = _tiling(m, x.dtype, format)
    parts, share = _parts(place, m, given.rows, given.columns, tiling)
    out = y if parts == 1 else y.new_empty((parts, *y.shape), dtype=torch.float32)
    operands = (*given, x, bias if parts == 1 else None, out, m, x.stride(0), share)
    _multiply[(_tiles(m, given.rows, tiling), parts)](*operands, **_options(tiling))
    if parts > 1:
        add(out, y, bias)
    return None


def quantised_multiply_transposed(place, *, dy: Tensor, dx: Tensor, format: str, **weight) -> None:
    """dx (m, columns) = dy (m, rows) @ W."""
    m = len(dx)
    if m > MANY:
        return place.multiply(None, _apart(dy), _unpacked(place, dy.dtype, format, weight), dx)
    format = _how(format, **weight)
    given = weight_of(format, **weight)
    tiling = _tiling(m, dy.dtype, format)
    parts, share = _parts(place, m, given.columns, given.rows, tiling)
    out = dx if parts == 1 else dx.new_empty((parts, *dx.shape), dtype=torch.float32)
    operands = (*given, dy, out, m, dy.stride(0), share)
    _multiply_transposed[(_tiles(m, given.columns, tiling), parts)](*operands, **_options(tiling))
    if parts > 1:
        add(out, dx)
    return None


def _unpacked(place, dtype: torch.dtype, format: str, weight: dict) -> Tensor:
    w = weight["packed"].new_empty((weight["rows"], weight["columns"]), dtype=dtype)
    dequantise(place, w=w, format=format, **weight)
    return w


def _apart(x: Tensor) -> Tensor:
    """Rows that do not overlap, as those of an expanded gradient do."""
    return x if x.stride(0) >= x.shape[1] else x.contiguous()


def _tiles(m: int, n: int, tiling: Tiling) -> int:
    return triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)


def _options(tiling: Tiling) -> dict:
    return dict(zip("MNK", tiling, strict=False)) | {"num_warps": tiling.warps, "num_stages": tiling.stages}


def _parts(place, m: int, n: int, k: int, tiling: Tiling) -> tuple[int, int]:
    """(parts, how much of k each has) of a product (m, k) x (k, n).

    Two programs for each multiprocessor, each of which has 8 KB of W on its way: 2 MB in all, what 3.35 TB/s bring in a
    latency of 600 ns. Of the large tile, with twice the warps and 130 registers a thread, but one fits. A part has
    one block of k more than the pipeline has stages. No more tiles than that are summed up in memory, which are 9 MB at
    most, and stay in L2.
    """
    wanted = place.multiprocessors * (2 if tiling.warps == 4 else 1) // _tiles(m, n, tiling)
    blocks = triton.cdiv(k, tiling.block_k)
    parts = max(1, min(wanted, blocks // (tiling.stages + 1)))
    share = triton.cdiv(blocks, parts) * tiling.block_k
    return triton.cdiv(k, share), share


FEW = 8  # rows of x that are vectors: memory then takes longer than two to sixteen operations for each weight

# Rows of x beyond which W is unpacked into memory first. A multiprocessor of an H100 has 128 instructions and 14.5
# bytes of memory a clock. To unpack a weight for a tile of 128 rows takes 8 to 11 instructions of a thread (the loops'
# machine code: 258 to 346 for 32 weights), or 0.07 clocks. To write it, and what is read before and after, are 4.5
# bytes, or 0.31 clocks, and the instructions hide behind them. So it is four or five tiles that pay for it.
MANY = 640


def _how(format: str, columns: int, block: int, **_) -> str:
    return "flat" if format == "nf4" and columns % block else format


def _in_chunks(x: Tensor, weight: Weight) -> bool:
    """Whether rows of W are whole chunks of 16 bytes, each in one block, and rows of x begin at such."""
    addresses = (weight.packed.data_ptr(), x.data_ptr(), x.stride(0) * x.element_size(), weight.row_bytes)
    return all(address % 16 == 0 for address in addresses) and weight.columns % 32 == 0


def _tiling(m: int, dtype: torch.dtype, format: str) -> Tiling:
    """Up to 128 rows of x a tile: each tile of x unpacks W again, which so many products pay for. Fewer leave tensor
    cores waiting for memory: smaller tiles of W for more programs, and more of it on its way in each."""
    if dtype == torch.float32:  # without tensor cores
        return Tiling(32, 32, 32, warps=4, stages=2)
    if format == "flat":  # an address and two bytes for each pair: registers
        return Tiling(min(64, max(16, triton.next_power_of_2(m))), 64, 64, warps=4, stages=2)
    if m <= 64:
        return Tiling(max(16, triton.next_power_of_2(m)), 64, 128, warps=4, stages=3)
    return Tiling(128, 128, 64, warps=8, stages=3)
