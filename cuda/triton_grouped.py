"""Grouped matrix products in Triton: rows sorted by expert, each expert with its own matrix; and its gradients.

Where experts end is known to the GPU alone, so the kernels find their work there: `_rows_times` is persistent, and each
program walks the experts and takes every so-manyth tile; `_grouped_weights` has a program for each tile of each
expert's gradient, which loops over that expert's rows. No atomics: the same bits every time. Matrices come by TMA, and
a group that ends inside a block of rows is masked in registers, as TMA cannot end inside a tensor. Triton keeps the
stages of the loads and makes wgmma of `tl.dot`; float32 is multiplied without tensor cores. On Ampere it makes plain
loads of TMA's, in one stage. There is no CUDA C++ version. What TMA cannot describe is for grouped_ops.py to copy.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import TensorDescriptor, jit
from cuda.triton_tilings import Tiling, choose


def reference(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Differentiable; rows past the last end are zero."""
    groups = [x[begin:end] @ w for (begin, end), w in zip(_groups(ends), weights, strict=True)]
    return torch.cat([*groups, x.new_zeros(len(x) - int(ends[-1]), weights.shape[2])])


def reference_weights(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([x[begin:end].mT @ y[begin:end] for begin, end in _groups(ends)])


def _groups(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


# ---- rows times the matrix of their expert ---------------------------------------------------------------------------


@jit
def _rows_times(
    x, weights, ends, d, rows, experts, k, n, stride_d,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TRANSPOSED: weights are stored (experts, n, k). After the experts comes a group of what belongs to none, whose
    products have no terms."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    first_tile, begin = 0, 0
    for expert in range(experts + 1):
        # Ends are what they should be only if somebody looked: from here on they neither fall nor lie outside.
        end = min(max(tl.load(ends + expert, mask=expert < experts, other=rows), begin), rows)
        tiles_m = tl.cdiv(end - begin, BLOCK_M)
        terms = tl.where(expert < experts, k, 0)
        while tile < first_tile + tiles_m * tiles_n:
            # Tiles below one another run at the same time: they share what they read of the expert's matrix in L2.
            row = begin + (tile - first_tile) % tiles_m * BLOCK_M
            column = (tile - first_tile) // tiles_m * BLOCK_N
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, terms, BLOCK_K):
                left = x.load([row, start])
                if TRANSPOSED:
                    right = weights.load([expert, column, start]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    right = weights.load([expert, start, column]).reshape(BLOCK_K, BLOCK_N)
                sums = tl.dot(left, right, sums, input_precision="ieee")
            r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
            there = d + r.to(tl.int64)[:, None] * stride_d + c[None, :]
            tl.store(there, sums.to(d.dtype.element_ty), mask=(r < end)[:, None] & (c < n)[None, :])
            tile += tl.num_programs(0)
        first_tile += tiles_m * tiles_n
        begin = end


def candidates(kind: str, dtype: torch.dtype, rows_of_expert: int, n: int) -> list[Tiling]:
    """A tile of 128 rows needs each element of the matrix half as often as one of 64, so 64 is for experts with few."""
    if kind == "interpreter":
        return [Tiling(32, 64, 64)]
    if dtype == torch.float32:
        return [Tiling(64, 64, 16, warps=4, stages=3)]  # the operands of 16 terms fill the registers
    if rows_of_expert <= 64:
        return [Tiling(64, 128, 64, warps=4, stages=4)]
    narrow = Tiling(128, 128, 64, warps=8, stages=3)
    return [narrow] if n <= 128 or kind == "sm_80" else [Tiling(128, 256, 64, warps=8, stages=3), narrow]


def grouped_matmul(place, *, x: Tensor, weights: Tensor, ends: Tensor, d: Tensor) -> None:
    """weights (experts, k, n) with a contiguous k or n."""
    (rows, k), (experts, _, n) = x.shape, weights.shape
    block_m, block_n, block_k, warps, stages = choose(
        "grouped_matmul", place.kind, (rows, experts, k, n), candidates(place.kind, x.dtype, rows // experts, n)
    )
    transposed = weights.stride(2) != 1
    stored, block = (weights.mT, [1, block_n, block_k]) if transposed else (weights, [1, block_k, block_n])
    most_tiles = (triton.cdiv(rows, block_m) + experts) * triton.cdiv(n, block_n)
    _rows_times[(min(place.multiprocessors, most_tiles),)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]), TensorDescriptor.from_tensor(stored, block), ends, d,
        rows, experts, k, n, d.stride(0),
        TRANSPOSED=transposed, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip


# ---- the sum over each expert's rows ---------------------------------------------------------------------------------


@jit
def _grouped_weights(
    x, y, ends, d, rows, k, n, stride_e, stride_d,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of x[group].T @ y[group] for one expert; zeros where that has no rows."""
    tiles_k, tiles_n = tl.cdiv(k, BLOCK_K), tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) % (tiles_k * tiles_n)
    expert = tl.program_id(0) // (tiles_k * tiles_n)
    row, column = tile % tiles_k * BLOCK_K, tile // tiles_k * BLOCK_N
    begin = max(tl.load(ends + expert - 1, mask=expert > 0, other=0), 0)
    end = min(tl.load(ends + expert), rows)
    whole = begin + max(end - begin, 0) // BLOCK_ROWS * BLOCK_ROWS
    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(begin, whole, BLOCK_ROWS):
        sums = tl.dot(x.load([start, row]).T, y.load([start, column]), sums, input_precision="ieee")
    if whole < end:  # both are masked: a zero does not hide what is NaN in the rows of the next expert
        inside = (whole + tl.arange(0, BLOCK_ROWS) < end)[:, None]
        left, right = x.load([whole, row]), y.load([whole, column])
        left = tl.where(inside, left, tl.zeros_like(left))
        right = tl.where(inside, right, tl.zeros_like(right))
        sums = tl.dot(left.T, right, sums, input_precision="ieee")
    r, c = row + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
    there = d + expert.to(tl.int64) * stride_e + r.to(tl.int64)[:, None] * stride_d + c[None, :]
    tl.store(there, sums.to(d.dtype.element_ty), mask=(r < k)[:, None] & (c < n)[None, :])


def weights_candidates(kind: str, dtype: torch.dtype, k: int, n: int) -> list[Tiling]:
    if kind == "interpreter":
        return [Tiling(64, 64, 32)]
    if dtype == torch.float32:
        return [Tiling(64, 64, 16, warps=4, stages=3)]  # the operands of 16 terms fill the registers
    narrow = Tiling(128, 128, 64, warps=8, stages=3)
    return [narrow] if min(k, n) <= 128 or kind == "sm_80" else [Tiling(128, 256, 64, warps=8, stages=3), narrow]


def grouped_weights(place, *, x: Tensor, y: Tensor, ends: Tensor, d: Tensor) -> None:
    """d (experts, k, n) with contiguous rows, of x (rows, k) and y (rows, n)."""
    (rows, k), n, experts = x.shape, y.shape[1], len(ends)
    block_k, block_n, block_rows, warps, stages = choose(
        "grouped_weights", place.kind, (rows, experts, k, n), weights_candidates(place.kind, x.dtype, k, n)
    )
    _grouped_weights[(experts * triton.cdiv(k, block_k) * triton.cdiv(n, block_n),)](
        TensorDescriptor.from_tensor(x, [block_rows, block_k]), TensorDescriptor.from_tensor(y, [block_rows, block_n]),
        ends, d, rows, k, n, d.stride(0), d.stride(1),
        BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_ROWS=block_rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
