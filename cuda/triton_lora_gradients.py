"""Gradients of lora_sgmv in Triton (triton_lora.py): of x, of the A of all adapters, and of their B.

That of x is the forward pass with B and A in turned-round roles. That of an A is a product over all rows of its
adapter, in few tiles: programs share the rows of a tile (triton_parts.py). The same bits every time. What is refused
stands in lora_ops.py. In CUDA C++: fused/lora_outer.cu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit
from cuda.triton_lora import Plan, dot_float32, run_expand, run_shrink, sum_parts, tile_of, tiles_of
from cuda.triton_parts import add

LEAST = 4  # tiles of rows for each part of a sum; fewer, and writing and adding it up costs more than it saves


def reference(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (rows, in), A (rank, in) and B (out, rank) of one adapter, from dy (rows, out)."""
    return scale * dy @ b @ a, scale * (dy @ b).T @ x, scale * dy.T @ (x @ a.T)


@jit
def _outer(
    shrunk, x, segments, indices, scales, grad, x_row, x_column, g_part, g_pool, g_rank, g_column, rows, width, count,
    splits, MOST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """grad[part, adapter] (MOST, width) = scale * shrunk^T x over every num_programs(2)-th tile of its rows: the
    gradient of A of x and a shrunk dy, of B of dy and the shrunk x."""
    adapter = tl.program_id(0).to(tl.int64)
    r, columns, many = tl.arange(0, RANKS), tl.program_id(1) * INNER + tl.arange(0, INNER), tl.arange(0, ROWS)
    inside = columns < width
    result = tl.zeros((RANKS, INNER), tl.float32)
    after = tiles_of(segments, indices, count, tl.program_id(0), ROWS, SEGMENTS)
    for tile in range(tl.program_id(2), tl.max(after, 0), tl.num_programs(2)):
        _, first, end = tile_of(segments, after, count, tile, ROWS, SEGMENTS)
        row = (first + many).to(tl.int64)
        here = row < end
        between = sum_parts(shrunk, row, tl.arange(0, RANKS), here, rows, splits, MOST)
        at = row[:, None] * x_row + columns[None, :] * x_column
        given = tl.load(x + at, mask=here[:, None] & inside[None, :], other=0.0)
        result = dot_float32(tl.trans(between), given, result)
    to = grad + tl.program_id(2).to(tl.int64) * g_part + adapter * g_pool + r[:, None] * g_rank
    result = (result * tl.load(scales + adapter)).to(grad.dtype.element_ty)
    tl.store(to + columns[None, :] * g_column, result, mask=(r < MOST)[:, None] & inside[None, :])


def _run_outer(plan: Plan, shrunk: Tensor, x: Tensor, segments, indices, scales, grad: Tensor, turned: bool) -> None:
    """grad is that of A (adapters, most, width) or, turned, of B (adapters, width, most)."""
    (splits, rows, most), width, adapters = shrunk.shape, x.shape[1], grad.shape[0]
    blocks = triton.cdiv(width, plan.inner)
    # Two programs for each multiprocessor: one loads while the other multiplies. Parts are then a few MB at most.
    parts = min(2 * plan.multiprocessors // (adapters * blocks), triton.cdiv(rows, plan.rows) // LEAST)
    out = grad[None] if parts < 2 else grad.new_empty((parts, *grad.shape), dtype=torch.float32)
    seen = out.mT if turned else out
    _outer[(adapters, blocks, len(out))](
        shrunk, x, segments, indices, scales, seen, *x.stride(), *seen.stride(), rows, width, indices.shape[0], splits,
        MOST=most, **plan.options | {"num_warps": 4},
    )  # fmt: skip
    if parts > 1:
        add(out, grad)


def lora_sgmv_backward(
    place, *, x, a_pool, b_pool, segments, indices, scales, ranks, dy, dx=None, da_pool=None, db_pool=None
) -> None:
    """The gradients that are asked for, written. x A^T is computed again for db_pool: it is one reading of x, less than
    keeping it would be."""
    plan = Plan(place, x, indices.shape[0], a_pool.shape[1])
    if dx is not None or da_pool is not None:
        shrunk = run_shrink(plan, dy, b_pool.mT, segments, indices, ranks, scales.dtype)
        if dx is not None:
            run_expand(plan, shrunk, a_pool.mT, segments, indices, scales, ranks, dx, False)
        if da_pool is not None:
            _run_outer(plan, shrunk, x, segments, indices, scales, da_pool, turned=False)
    if db_pool is not None:
        shrunk = run_shrink(plan, x, a_pool, segments, indices, ranks, scales.dtype)
        _run_outer(plan, shrunk, dy, segments, indices, scales, db_pool, turned=True)
