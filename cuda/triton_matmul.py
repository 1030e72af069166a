"""Matrix products in Triton, a ladder of four steps: d = activation(alpha * A B + bias) + beta * c.

What the CUDA version (cuda/matmul) spells out, and the compiler does here: who holds which element, swizzled shared
memory, wgmma and its fences, copies under way while others are multiplied. What stays ours is a block's view: which
tile, how it lies in memory, what happens to the sums, how large the tiles are. What it takes: clusters and multicast,
a say in registers. Any m, n and k, four layouts, batches; float32 is multiplied in float32 ("ieee"), not in TF32.

Refused with a ValueError: layouts that are neither row-major nor the transpose of that, in words as those of the
extension; steps 02 and 03 for what TMA cannot describe. Letters: A is m x k, B is k x n.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cuda import triton_dispatch, triton_matmul_tma, triton_tilings
from cuda.triton_compat import jit
from cuda.triton_dispatch import GROUP, Details
from cuda.triton_operands import Operand, Problem, problem_of
from cuda.triton_tile import epilogue, tile_of
from cuda.triton_tilings import Tiling


def reference(a, b, *, c=None, bias=0.0, alpha=1.0, beta=0.0, activation="none"):
    """The definition, in torch."""
    x = alpha * (a @ b) + bias
    if activation == "gelu":
        x = F.gelu(x)
    elif activation == "swiglu":
        x = F.silu(x[..., ::2]) * x[..., 1::2]
    return x if beta == 0 else x + beta * c


# ---- step 01: pointers -----------------------------------------------------------------------------------------------


@jit
def pointer_01(
    a,
    b,
    d,
    c,
    bias,
    m,
    n,
    k,
    slices,
    slice_k,
    batch_a,
    row_a,
    column_a,
    batch_b,
    row_b,
    column_b,
    batch_d,
    row_d,
    batch_c,
    row_c,
    alpha,
    beta,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program: one tile of one slice of k of one matrix of the batch. d has a matrix for each slice. A stride that is
    1 is known to the compiler, which then copies 16 bytes at once along it."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    z = tl.program_id(0) // (tiles_m * tiles_n)
    i, j = tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    matrix, first = (z // slices).to(tl.int64), z % slices * slice_k
    last = tl.minimum(first + slice_k, k)

    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = j * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inner = tl.arange(0, BLOCK_K)
    a += matrix * batch_a + rows.to(tl.int64) * row_a + (first + inner).to(tl.int64)[None, :] * column_a
    b += matrix * batch_b + (first + inner).to(tl.int64)[:, None] * row_b + columns.to(tl.int64) * column_b
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    step = tl.full((), BLOCK_K, tl.int64)
    for at in range(first, last, BLOCK_K):
        x = tl.load(a, mask=(rows < m) & (at + inner < last)[None, :], other=0)
        y = tl.load(b, mask=(at + inner < last)[:, None] & (columns < n), other=0)
        sums = tl.dot(x, y, sums, input_precision="ieee")
        a += step * column_a
        b += step * row_b
    row, column = i * BLOCK_M, j * BLOCK_N
    epilogue(sums, d, None, c, bias, z, row, column, m, n, batch_d, row_d, batch_c, row_c, alpha, beta, ACTIVATION)


def launch_pointer_01(place, p: Problem, t: Tiling, slices: int = 1, slice_k: int = 0) -> None:
    operands = p.a.tensor, p.b.tensor, p.d.tensor, p.c and p.c.tensor, p.bias
    strides = *p.a.strides, *p.b.strides, *p.d.strides[:2], *(p.c or p.d).strides[:2]
    pointer_01[(triton_dispatch.tiles(p.size, t) * slices,)](
        *operands,
        p.size.m,
        p.size.n,
        p.size.k,
        slices,
        slice_k or p.size.k,
        *strides,
        p.alpha,
        p.beta,
        p.activation,
        t.block_m,
        t.block_n,
        t.block_k,
        GROUP,
        num_warps=t.warps,
        num_stages=t.stages,
    )


# ---- step 04: slices of k --------------------------------------------------------------------------------------------


@jit
def sum_slices(
    sums,
    d,
    c,
    bias,
    m,
    n,
    slices,
    batch_d,
    row_d,
    batch_c,
    row_c,
    alpha,
    beta,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program: the same tile of all slices of a matrix, added in their order: the same bits every time."""
    tiles_m, tiles_n = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    z = tl.program_id(0) // (tiles_m * tiles_n)
    i = tl.program_id(0) % (tiles_m * tiles_n) // tiles_n
    j = tl.program_id(0) % tiles_n
    rows = i * ROWS + tl.arange(0, ROWS)[:, None]
    columns = j * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = sums + z.to(tl.int64) * slices * m * n + rows.to(tl.int64) * n + columns
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(slices):
        x += tl.load(at, mask=(rows < m) & (columns < n), other=0)
        at += tl.cast(m, tl.int64) * n
    row, column = i * ROWS, j * COLUMNS
    epilogue(x, d, None, c, bias, z, row, column, m, n, batch_d, row_d, batch_c, row_c, alpha, beta, ACTIVATION)


def launch_split_k_04(place, p: Problem, t: Tiling) -> None:
    """Sums of slices by step 02 where TMA can describe A and B, else by step 01; in float32, in memory of their own."""
    size = p.size
    slices = triton_dispatch.slices_of(t, size, place.multiprocessors, least=1)
    slice_k = triton.cdiv(triton.cdiv(size.k, t.block_k), slices) * t.block_k
    slices = triton.cdiv(size.k, slice_k)  # none is empty
    sums = torch.empty((size.batch * slices, size.m, size.n), dtype=torch.float32, device=p.d.tensor.device)
    d = Operand("d", sums, size.batch * slices, False, size.n, size.m * size.n)
    tma = place.kind != "sm_80" and describable(p)
    launch = triton_matmul_tma.launch_descriptor_02 if tma else launch_pointer_01
    launch(place, Problem(size, p.a, p.b, d, None, None, 1.0, 0.0, "none"), t, slices, slice_k)
    rows, columns = 8, 128
    grid = (size.batch * triton.cdiv(size.m, rows) * triton.cdiv(size.n, columns),)
    strides = *p.d.strides[:2], *(p.c or p.d).strides[:2]
    operands = sums, p.d.tensor, p.c and p.c.tensor, p.bias
    sum_slices[grid](
        *operands, size.m, size.n, slices, *strides, p.alpha, p.beta, p.activation, rows, columns, num_warps=4
    )


# ---- which step ------------------------------------------------------------------------------------------------------


LAUNCHES = {
    "pointer_01": launch_pointer_01,
    "descriptor_02": triton_matmul_tma.launch_descriptor_02,
    "persistent_03": triton_matmul_tma.launch_persistent_03,
    "split_k_04": launch_split_k_04,
}


def describable(p: Problem) -> bool:
    return not p.a.obstacle() and not p.b.obstacle()


def details_of(p: Problem) -> Details:
    odd = not describable(p) or any(x.stored()[1] % 16 for x in (p.a, p.b))
    return Details(p.d.tensor.element_size(), p.c is not None, triton_matmul_tma.specialisable(p), odd)


def multiply(
    place,
    step: str | None,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    *,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    activation: str = "none",
    tiling: Tiling | None = None,
) -> None:
    """Writes d, which may be c: one program reads and writes an element. step None: triton_dispatch.choose_step."""
    p = problem_of(a, b, d, c, bias, alpha, beta, activation)
    details = details_of(p)
    if step is None:
        step = triton_dispatch.choose_step(place.kind, p.size, details, place.multiprocessors, tma=describable(p))
    if step in triton_dispatch.NEED_TMA and not describable(p):
        raise ValueError(f"matmul: {p.a.obstacle() or p.b.obstacle()}")
    if tiling is None:
        tilings = triton_dispatch.candidates(step, place.kind, p.size, details, place.multiprocessors)
        tiling = triton_tilings.choose("matmul", place.kind, p.size[:4], tilings)
    LAUNCHES[step](place, p, Tiling(*tiling))
