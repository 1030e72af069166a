"""Steps 02 and 03 of the matrix product in Triton: TMA brings the tiles.

02: the host describes A, B and D (a TensorDescriptor); `load` and `store` of a tile become one TMA instruction each,
num_stages says how many tiles are under way, and the barriers are the compiler's. 03: as many programs as fit at once
walk over the tiles. Flattened, the loops over tiles and over k are one, so that loads for the next tile start before
the last one is stored. Or specialised, by a tiling of its own: the compiler makes one warp group that loads and two
that multiply 64 rows each, as matmul/12_two_consumers.cu does by hand. Then it does not flatten.
Refused: addresses and strides that are no multiples of 16 bytes, which TMA cannot describe.
"""

from contextvars import copy_context

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda import triton_dispatch
from cuda.triton_compat import jit
from cuda.triton_dispatch import GROUP
from cuda.triton_operands import Problem
from cuda.triton_tile import epilogue, finished, put, tile_of
from cuda.triton_tilings import Tiling


@jit
def tile_product(
    a,
    b,
    za,
    zb,
    row,
    column,
    first,
    last,
    TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over k from `first` to `last` of the tile of D at this row and column. TMA reads zeros outside."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(first, last, BLOCK_K):
        if TRANSPOSE_A:
            x = tl.trans(tl.reshape(a.load([za, at, row]), (BLOCK_K, BLOCK_M)))
        else:
            x = tl.reshape(a.load([za, row, at]), (BLOCK_M, BLOCK_K))
        if TRANSPOSE_B:
            y = tl.trans(tl.reshape(b.load([zb, column, at]), (BLOCK_N, BLOCK_K)))
        else:
            y = tl.reshape(b.load([zb, at, column]), (BLOCK_K, BLOCK_N))
        sums = tl.dot(x, y, sums, input_precision="ieee")
    return sums


@jit
def descriptor_02(
    a,
    b,
    d,
    tiles_d,
    c,
    bias,
    m,
    n,
    k,
    slices,
    slice_k,
    many_a,
    many_b,
    batch_d,
    row_d,
    batch_c,
    row_c,
    alpha,
    beta,
    TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program: one tile of one slice of k of one matrix of the batch. d has a matrix for each slice."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    z = tl.program_id(0) // (rows * columns)
    i, j = tile_of(tl.program_id(0) % (rows * columns), rows, columns, GROUP)
    row, column = i * BLOCK_M, j * BLOCK_N
    matrix, first = z // slices, z % slices * slice_k
    last = tl.minimum(first + slice_k, k)
    za, zb = matrix * many_a, matrix * many_b
    x = tile_product(a, b, za, zb, row, column, first, last, TRANSPOSE_A, TRANSPOSE_B, BLOCK_M, BLOCK_N, BLOCK_K)
    epilogue(x, d, tiles_d, c, bias, z, row, column, m, n, batch_d, row_d, batch_c, row_c, alpha, beta, ACTIVATION)


@jit
def persistent_03(
    a,
    b,
    d,
    tiles_d,
    c,
    bias,
    m,
    n,
    k,
    batch,
    many_a,
    many_b,
    batch_d,
    row_d,
    batch_c,
    row_c,
    alpha,
    beta,
    TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program p computes tiles p, p + programs, ... of all of the batch."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns * batch, tl.num_programs(0), flatten=True):
        z = tile // (rows * columns)
        i, j = tile_of(tile % (rows * columns), rows, columns, GROUP)
        row, column = i * BLOCK_M, j * BLOCK_N
        za, zb = z * many_a, z * many_b
        x = tile_product(a, b, za, zb, row, column, 0, k, TRANSPOSE_A, TRANSPOSE_B, BLOCK_M, BLOCK_N, BLOCK_K)
        epilogue(x, d, tiles_d, c, bias, z, row, column, m, n, batch_d, row_d, batch_c, row_c, alpha, beta, ACTIVATION)


@jit
def specialised_03(
    a,
    b,
    d,
    bias,
    m,
    n,
    k,
    row_a,
    row_b,
    row_d,
    alpha,
    TRANSPOSE_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The same by three warp groups, for one matrix in 16 bits, A row-major, without c and activation: of what else was
    tried some did not compile, some spilled. Descriptors are made here, for the compiler splits their boxes, which the
    host's do not let it; a tile is stored whole, for it takes no halves."""
    tiles_a = tl.make_tensor_descriptor(a, [m, k], [row_a, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSE_B:
        tiles_b = tl.make_tensor_descriptor(b, [n, k], [row_b, 1], [BLOCK_N, BLOCK_K])
    else:
        tiles_b = tl.make_tensor_descriptor(b, [k, n], [row_b, 1], [BLOCK_K, BLOCK_N])
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), warp_specialize=True):
        i, j = tile_of(tile, rows, columns, GROUP)
        row, column = i * BLOCK_M, j * BLOCK_N
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, k, BLOCK_K):
            y = tl.trans(tiles_b.load([column, at])) if TRANSPOSE_B else tiles_b.load([at, column])
            x = tl.dot(tiles_a.load([row, at]), y, x)
        x = finished(x, bias, column, n, alpha, "none")
        put(x, d, None, None, 0, row, column, m, n, 0, row_d, 0, 0, 0.0)


# ---- launches --------------------------------------------------------------------------------------------------------


def _described(p: Problem, t: Tiling) -> tuple:
    """A and B as tiles, D, D as tiles where TMA can store it, c, bias."""
    a, b = ((t.block_m, t.block_k), (t.block_k, t.block_n))
    half = t.block_n // (4 if p.activation == "swiglu" else 2)
    tiles_d = p.d.descriptor(t.block_m, half) if p.c is None and not p.d.obstacle() else None
    tiles_a = p.a.descriptor(*(a[::-1] if p.a.transposed else a))
    tiles_b = p.b.descriptor(*(b[::-1] if p.b.transposed else b))
    return tiles_a, tiles_b, p.d.tensor, tiles_d, p.c and p.c.tensor, p.bias


def _constants(p: Problem, t: Tiling) -> tuple:
    return p.a.transposed, p.b.transposed, p.activation, t.block_m, t.block_n, t.block_k, GROUP


def launch_descriptor_02(place, p: Problem, t: Tiling, slices: int = 1, slice_k: int = 0) -> None:
    descriptor_02[(triton_dispatch.tiles(p.size, t) * slices,)](
        *_described(p, t),
        p.size.m,
        p.size.n,
        p.size.k,
        slices,
        slice_k or p.size.k,
        int(p.a.batch != 0),
        int(p.b.batch != 0),
        *p.d.strides[:2],
        *(p.c or p.d).strides[:2],
        p.alpha,
        p.beta,
        *_constants(p, t),
        num_warps=t.warps,
        num_stages=t.stages,
    )


def specialisable(p: Problem) -> bool:
    plain = p.size.batch == 1 and p.activation == "none" and p.c is None
    return plain and not p.a.transposed and p.d.tensor.element_size() == 2


def launch_persistent_03(place, p: Problem, t: Tiling) -> None:
    details = triton_dispatch.Details(p.d.tensor.element_size(), p.c is not None)
    at_once = triton_dispatch.resident(t, "persistent_03", p.size, details, place.kind) * place.multiprocessors
    grid = (min(at_once, triton_dispatch.tiles(p.size, t)),)
    if t == triton_dispatch.SPECIALISED:
        return _launch_specialised_03(p, t, grid)
    persistent_03[grid](
        *_described(p, t),
        p.size.m,
        p.size.n,
        p.size.k,
        p.size.batch,
        int(p.a.batch != 0),
        int(p.b.batch != 0),
        *p.d.strides[:2],
        *(p.c or p.d).strides[:2],
        p.alpha,
        p.beta,
        *_constants(p, t),
        num_warps=t.warps,
        num_stages=t.stages,
    )


def _launch_specialised_03(p: Problem, t: Tiling, grid: tuple[int]) -> None:
    if not specialisable(p):
        raise ValueError(f"tiling {tuple(t)}: expected another, or a product alone in 16 bits with a row-major")
    copy_context().run(_launch_with_memory, grid, p, t)  # a copy: whoever set an allocator of his own keeps it


def _launch_with_memory(grid: tuple[int], p: Problem, t: Tiling) -> None:
    triton.set_allocator(_memory_for_descriptors)
    specialised_03[grid](
        p.a.tensor,
        p.b.tensor,
        p.d.tensor,
        p.bias,
        p.size.m,
        p.size.n,
        p.size.k,
        p.a.leading,
        p.b.leading,
        p.d.leading,
        p.alpha,
        p.b.transposed,
        t.block_m,
        t.block_n,
        t.block_k,
        GROUP,
        num_warps=t.warps,
        num_stages=t.stages,
    )


def _memory_for_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # torch's begin at multiples of 512 bytes
