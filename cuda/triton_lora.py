"""Many LoRA adapters in one batch, in Triton: y[i] (+)= scale * (x[i] A^T) B^T with the A and B of row i's adapter.

Two kernels each: shrink, x A^T, and expand, which multiplies that with B and writes y or adds to it. What lies between
them is float32, where punica rounds it to the type of x, and a row's parts over `in` are added in one order: the same
bits every time. lora_bgmv has an adapter for each row (decoding): a product of vectors, all time goes into reading A
and B. lora_sgmv has rows sorted by adapter (prefill, training): tiles of rows on tensor cores; each program finds its
tile by the segments' lengths itself, so that nothing waits for the GPU. Ranks differ from adapter to adapter: what is
past a rank does not count, and is read only where it fills up 16 bytes. Gradients: triton_lora_gradients.py. What is
refused stands in lora_ops.py. In CUDA C++: fused/lora_rows.cu and lora_segments.cu.
"""

import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit

RANKS = 16  # rows of A that a program of the shrink of bgmv has
COLUMNS = 512  # of `in` that it has: 16 KB of 16 bits, which are 8 loads of 16 bytes for each of 128 threads
TILE = 8192  # elements of B that a program of its expand has: 16 KB again
INNER = {2: 128, 4: 32}  # columns of x, and of y, that a step of sgmv has, by the bytes of an element; up to rank 64
SPLITS = 4  # most parts of `in` in sgmv: the expand reads all of them again for each 512 columns of y


def reference(x: Tensor, a_pool: Tensor, b_pool: Tensor, indices, scales, ranks=None) -> Tensor:
    """What is added to y, (rows, out); indices[i]: the adapter of row i, or -1."""
    y = x.new_zeros(x.shape[0], b_pool.shape[1])
    for i, adapter in enumerate(indices.tolist()):
        if adapter >= 0:
            rank = a_pool.shape[1] if ranks is None else int(ranks[adapter])
            y[i] = scales[adapter].to(x.dtype) * (x[i] @ a_pool[adapter, :rank].T) @ b_pool[adapter, :, :rank].T
    return y


# ---- a row at a time -------------------------------------------------------------------------------------------------


@jit
def _rank_of(ranks, adapter, MOST: tl.constexpr, RAGGED: tl.constexpr):
    rank = MOST
    if RAGGED:
        rank = tl.minimum(tl.load(ranks + adapter), MOST)
    return rank


@jit
def _times(x, stride, GROUP: tl.constexpr):
    """x * stride, of a stride that is a multiple of GROUP; Triton itself sees that of multiples of 16 only."""
    return x * (stride // GROUP * GROUP)


@jit
def _shrink_row(
    x, a, indices, ranks, shrunk, x_row, x_column, a_pool, a_rank, a_column, rows, width,
    MOST: tl.constexpr, RAGGED: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """shrunk[split, row] (.., MOST): 16 elements of it, of 512 columns. Neighbouring programs are neighbouring rows:
    those of one adapter find its A in the L2 cache."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    adapter = tl.load(indices + row).to(tl.int64)
    if adapter >= 0:
        rank = _rank_of(ranks, adapter, MOST, RAGGED)
        r, columns = tl.program_id(2) * RANKS + tl.arange(0, RANKS), split * COLUMNS + tl.arange(0, COLUMNS)
        if tl.program_id(2) * RANKS < rank:
            inside = columns < width
            given = tl.load(x + row * x_row + columns * x_column, mask=inside, other=0.0).to(tl.float32)
            at = adapter * a_pool + r[:, None] * a_rank + columns[None, :] * a_column
            weight = tl.load(a + at, mask=(r < rank)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            tl.store(shrunk + (split * rows + row) * MOST + r, tl.sum(weight * given[None, :], 1), mask=r < rank)


@jit
def _expand_row(
    shrunk, b, indices, scales, ranks, y, b_pool, b_column, b_rank, y_row, y_column, rows, width, splits,
    MOST: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, RAGGED: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, r, split = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS), tl.arange(0, SPLITS)
    inside = columns < width
    to = y + row * y_row + columns * y_column
    adapter = tl.load(indices + row).to(tl.int64)
    if adapter >= 0:
        rank = _rank_of(ranks, adapter, MOST, RAGGED)
        real = r < rank
        parts = shrunk + (split[:, None] * rows + row) * MOST + r[None, :]
        between = tl.sum(tl.load(parts, mask=(split < splits)[:, None] & real[None, :], other=0.0), 0)
        at = _times(adapter, b_pool, GROUP) + _times(columns[:, None], b_column, GROUP) + r[None, :] * b_rank
        read = (r // GROUP * GROUP < rank)[None, :]
        weight = tl.load(b + at, mask=inside[:, None] & read, other=0.0).to(tl.float32)
        weight = tl.where(real[None, :], weight, 0.0)
        result = tl.sum(weight * between[None, :], 1) * tl.load(scales + adapter)
        if ADD:
            result += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, result.to(y.dtype.element_ty), mask=inside)
    elif not ADD:
        tl.store(to, tl.zeros((COLUMNS,), y.dtype.element_ty), mask=inside)


def _group(weight: Tensor, outer: int, rank: int) -> int:
    """Where ranks lie side by side in weight (adapters, .., ..), they are read by 8: of an adapter of rank 12 also four
    that do not count and are then set to 0. Asking at each element would take 8 loads for one of 16 bytes."""
    strides = (weight.stride(0), weight.stride(outer), weight.shape[rank])
    return 8 if weight.stride(rank) == 1 and all(n % 8 == 0 for n in strides) else 1


def lora_bgmv(place, *, x, a_pool, b_pool, indices, scales, ranks, y, add) -> None:
    """y (rows, out) is written, or with `add` added to."""
    (rows, width), most, out = x.shape, a_pool.shape[1], b_pool.shape[1]
    splits, r_block = triton.cdiv(width, COLUMNS), triton.next_power_of_2(most)
    shrunk = x.new_empty((splits, rows, most), dtype=scales.dtype)
    _shrink_row[(rows, splits, triton.cdiv(most, RANKS))](
        x, a_pool, indices, ranks, shrunk, *x.stride(), *a_pool.stride(), rows, width,
        MOST=most, RAGGED=ranks is not None, RANKS=min(RANKS, r_block), COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    columns = max(32, TILE // r_block)
    _expand_row[(rows, triton.cdiv(out, columns))](
        shrunk, b_pool, indices, scales, ranks, y, *b_pool.stride(), *y.stride(), rows, out, splits,
        MOST=most, GROUP=_group(b_pool, 1, 2), ADD=add, RAGGED=ranks is not None, RANKS=r_block, COLUMNS=columns,
        SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip


# ---- segments of rows ------------------------------------------------------------------------------------------------


@jit
def tiles_of(segments, indices, count, adapter, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """After each segment, how many tiles there are, where each has as many as it needs; if an adapter is given, those
    of others have none. Every program counts for itself: a few thousand segments cost less than a kernel that would
    write a list."""
    s = tl.arange(0, SEGMENTS)
    begin = tl.load(segments + s, mask=s < count, other=0)
    tiles = tl.cdiv(tl.load(segments + s + 1, mask=s < count, other=0) - begin, ROWS)
    if adapter is not None:
        tiles = tl.where(tl.load(indices + s, mask=s < count, other=-1) == adapter, tiles, 0)
    return tl.cumsum(tiles, 0)


@jit
def tile_of(segments, after, count, tile, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """(segment, first row, end) of a tile, by what tiles_of found; (count, ..) past the last."""
    past = (after <= tile) & (tl.arange(0, SEGMENTS) < count)
    segment = tl.sum(past.to(tl.int32), 0)
    before = tl.max(tl.where(past, after, 0), 0)
    first = tl.load(segments + tl.minimum(segment, count - 1)) + (tile - before) * ROWS
    return segment, first, tl.load(segments + tl.minimum(segment + 1, count))


@jit
def dot_float32(a, b, c):
    """c + a b, of a float32 and a b of 16 bits: a goes into two numbers of 16 bits, so that its first 16 bits or more
    count. A large one that becomes inf as a float16 stays inf."""
    if b.dtype == tl.float32:
        c = tl.dot(a, b, c, input_precision="ieee")
    else:
        high = a.to(b.dtype)
        rest = a - high.to(tl.float32)
        low = tl.where(tl.abs(rest) < float("inf"), rest, 0.0).to(b.dtype)
        c = tl.dot(high, b, tl.dot(low, b, c))
    return c


@jit
def sum_parts(shrunk, row, r, here, rows, splits, MOST: tl.constexpr):
    """Rows of x A^T, ranks r of them; zeros past the rank."""
    mask = here[:, None] & (r < MOST)[None, :]
    between = tl.zeros((row.shape[0], r.shape[0]), tl.float32)
    for split in range(splits):
        between += tl.load(shrunk + (split * rows + row[:, None]) * MOST + r[None, :], mask=mask, other=0.0)
    return between


@jit
def _shrink(
    x, a, segments, indices, ranks, shrunk, x_row, x_column, a_pool, a_rank, a_column, rows, width, count, share,
    MOST: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    INNER: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """shrunk[split] (rows, MOST) = x A^T, of `share` columns of x."""
    after = tiles_of(segments, indices, count, None, ROWS, SEGMENTS)
    segment, first, end = tile_of(segments, after, count, tl.program_id(0), ROWS, SEGMENTS)
    adapter = tl.load(indices + tl.minimum(segment, count - 1)).to(tl.int64)
    if (segment < count) & (adapter >= 0):
        split, rank = tl.program_id(1), _rank_of(ranks, adapter, MOST, RAGGED)
        row, r = (first + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, RANKS)
        here, read = row < end, r // GROUP * GROUP < rank
        result = tl.zeros((ROWS, RANKS), tl.float32)
        last = tl.minimum((split + 1) * share, width)
        for start in tl.range(split * share, last, INNER, num_stages=3):
            columns = start + tl.arange(0, INNER)
            inside = columns < last
            at = row[:, None] * x_row + columns[None, :] * x_column
            given = tl.load(x + at, mask=here[:, None] & inside[None, :], other=0.0)
            at = _times(adapter, a_pool, GROUP) + r[None, :] * a_rank + _times(columns[:, None], a_column, GROUP)
            weight = tl.load(a + at, mask=inside[:, None] & read[None, :], other=0.0)
            result = tl.dot(given, weight, result, input_precision="ieee")
        to = shrunk + (split * rows + row[:, None]) * MOST + r[None, :]
        result = tl.where((r < rank)[None, :], result, 0.0)
        tl.store(to, result, mask=here[:, None] & (r < MOST)[None, :])


@jit
def _expand(
    shrunk, b, segments, indices, scales, ranks, y, b_pool, b_column, b_rank, y_row, y_column, rows, width, count,
    splits, share, MOST: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, INNER: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """`share` columns of y of a tile of rows; x A^T stays in registers where STEP is all RANKS."""
    after = tiles_of(segments, indices, count, None, ROWS, SEGMENTS)
    segment, first, end = tile_of(segments, after, count, tl.program_id(0), ROWS, SEGMENTS)
    if segment < count:
        adapter = tl.load(indices + segment).to(tl.int64)
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        here = row < end
        begin = tl.program_id(1) * share
        last = tl.minimum(begin + share, width)
        if adapter >= 0:
            rank = _rank_of(ranks, adapter, MOST, RAGGED)
            if STEP == RANKS:
                between = sum_parts(shrunk, row, tl.arange(0, RANKS), here, rows, splits, MOST)
            for start in tl.range(begin, last, INNER, num_stages=3):
                columns = start + tl.arange(0, INNER)
                inside = columns < last
                result = tl.zeros((ROWS, INNER), tl.float32)
                for lowest in tl.static_range(0, RANKS, STEP):
                    r = lowest + tl.arange(0, STEP)
                    if STEP < RANKS:
                        between = sum_parts(shrunk, row, r, here, rows, splits, MOST)
                    at = _times(adapter, b_pool, GROUP) + _times(columns[None, :], b_column, GROUP)
                    read = inside[None, :] & (r // GROUP * GROUP < rank)[:, None]
                    weight = tl.load(b + at + r[:, None] * b_rank, mask=read, other=0.0)
                    if GROUP > 1:
                        weight = tl.where((r < rank)[:, None], weight, tl.zeros_like(weight))
                    result = dot_float32(between, weight, result)
                result *= tl.load(scales + adapter)
                to = y + row[:, None] * y_row + columns[None, :] * y_column
                mask = here[:, None] & inside[None, :]
                if ADD:
                    result += tl.load(to, mask=mask, other=0.0).to(tl.float32)
                tl.store(to, result.to(y.dtype.element_ty), mask=mask)
        elif not ADD:
            for start in range(begin, last, INNER):
                columns = start + tl.arange(0, INNER)
                mask = here[:, None] & (columns < last)[None, :]
                to = y + row[:, None] * y_row + columns[None, :] * y_column
                tl.store(to, tl.zeros((ROWS, INNER), y.dtype.element_ty), mask=mask)


class Plan:
    """How rows are cut: tiles of 64 rows, which wgmma needs, where segments have half of that on average, else of 16.
    As many tiles as there can be: each segment may end with one not full; a program without one does nothing."""

    def __init__(self, place, x: Tensor, count: int, most: int):
        ranks = max(16, triton.next_power_of_2(most))
        self.rows = 64 if x.shape[0] >= 32 * count and ranks <= 128 else 16
        # Large ranks have fewer columns: three stages then stay below the 99 KB that a block may have on any GPU from
        # Ampere on, and x A^T, which the expand has in registers, takes 32 of each thread at most.
        self.inner, warps = max(16, INNER[x.element_size()] * 64 // max(64, ranks)), 4 if ranks <= 64 else 8
        self.tiles, self.multiprocessors = triton.cdiv(x.shape[0], self.rows) + count, place.multiprocessors
        # Without tensor cores a thread has all ranks of its rows and columns in registers: of float32 32 at a time.
        self.step = 32 if x.element_size() == 4 and ranks > 64 else ranks
        self.options = {"ROWS": self.rows, "RANKS": ranks, "INNER": self.inner, "num_warps": warps}
        self.options["SEGMENTS"] = triton.next_power_of_2(count)

    def parts(self, width: int) -> tuple[int, int]:
        """(parts of `in`, columns of each): about two programs for each multiprocessor, 512 columns or more."""
        wanted = min(SPLITS, triton.cdiv(2 * self.multiprocessors, self.tiles), triton.cdiv(width, 512))
        share = triton.cdiv(triton.cdiv(width, wanted), self.inner) * self.inner
        return triton.cdiv(width, share), share


def run_shrink(plan: Plan, x: Tensor, weight: Tensor, segments, indices, ranks, dtype) -> Tensor:
    """weight (adapters, most, width)."""
    (rows, width), most, count = x.shape, weight.shape[1], indices.shape[0]
    splits, share = plan.parts(width)
    shrunk = x.new_empty((splits, rows, most), dtype=dtype)
    _shrink[(plan.tiles, splits)](
        x, weight, segments, indices, ranks, shrunk, *x.stride(), *weight.stride(), rows, width, count, share,
        MOST=most, GROUP=_group(weight, 2, 1), RAGGED=ranks is not None, **plan.options,
    )  # fmt: skip
    return shrunk


def run_expand(plan: Plan, shrunk: Tensor, weight: Tensor, segments, indices, scales, ranks, y, add) -> None:
    """weight (adapters, width, most)."""
    (splits, rows, most), width, share = shrunk.shape, y.shape[1], 512
    _expand[(plan.tiles, triton.cdiv(width, share))](
        shrunk, weight, segments, indices, scales, ranks, y, *weight.stride(), *y.stride(), rows, width,
        indices.shape[0], splits, share, MOST=most, GROUP=_group(weight, 1, 2), ADD=add, RAGGED=ranks is not None,
        STEP=plan.step, **plan.options,
    )  # fmt: skip


def lora_sgmv(place, *, x, a_pool, b_pool, segments, indices, scales, ranks, y, add) -> None:
    """y (rows, out) is written, or with `add` added to; rows in no segment are left as they are."""
    plan = Plan(place, x, indices.shape[0], a_pool.shape[1])
    shrunk = run_shrink(plan, x, a_pool, segments, indices, ranks, scales.dtype)
    run_expand(plan, shrunk, b_pool, segments, indices, scales, ranks, y, add)
