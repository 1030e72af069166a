"""Rows of a table by their numbers, and the gradient of the table, in Triton: what fused/embedding.cu does.

Forward copies a tile of several rows. The gradient comes from tokens that are sorted, so that equal ones are
neighbours, a segment: a program sums a piece of the list, in float32 and in the list's order, and a segment of several
pieces leaves partial sums there, which a second kernel adds up. No atomic additions: the same bits every time.

Triton gives: `tl.range(.., num_stages=8)` makes the loop over rows a pipeline of cp.async, in which seven rows are on
their way to shared memory while one is added, and their numbers before them; in CUDA C++ four rows are asked for by
hand. It takes: accesses of 16 bytes where a row is no multiple of 16 elements, all that the compiler asks about it.
A token outside of the table gives a row of NaN, and no gradient.
"""

import torch
import triton
import triton.language as tl

from cuda.triton_compat import jit

PIECE = 64  # as in cuda/loss_ops.py, which makes room for the partial sums


def reference(tokens, table, upstream):
    """The rows, and the gradient of the table when theirs is `upstream`."""
    gradient = torch.zeros(table.shape, dtype=torch.float64).index_add_(0, tokens, upstream.double())
    return table[tokens], gradient.to(table.dtype)


# ---- forward ---------------------------------------------------------------------------------------------------------


@jit
def look_up(table, tokens, rows, count, entries, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    token = tl.load(tokens + i, mask=there, other=-1)
    inside = (token >= 0) & (token < entries)
    here = column[None, :] < columns
    x = tl.load(table + token[:, None] * columns + column[None, :], mask=inside[:, None] & here, other=float("nan"))
    tl.store(rows + i[:, None] * columns + column[None, :], x, mask=there[:, None] & here)


# ---- backward --------------------------------------------------------------------------------------------------------


@jit
def _token(tokens, i, count):
    """Token i of the sorted list; before and after the list a number that is in no table."""
    return tl.load(tokens + i, mask=(i >= 0) & (i < count), other=-(2**31))


@jit
def sum_pieces(
    gradient, rows, tokens, places, partial, count, entries, columns,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    first, last = piece * PIECE, tl.minimum(count, (piece + 1) * PIECE) - 1
    open_start = _token(tokens, first - 1, count) == _token(tokens, first, count)  # it began in an earlier piece
    open_end = _token(tokens, last, count) == _token(tokens, last + 1, count)
    own = partial + piece.to(tl.int64) * 2 * columns + column
    sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(first, last + 1, num_stages=STAGES):
        row = rows + tl.load(places + i) * columns + column
        sum += tl.load(row, mask=here, other=0.0).to(tl.float32)
        token = tl.load(tokens + i)
        if (i == last) | (_token(tokens, i + 1, count) != token):
            if open_start:
                tl.store(own, sum, mask=here)
            elif (i == last) & open_end:
                tl.store(own + columns, sum, mask=here)
            elif (token >= 0) & (token < entries):
                tl.store(gradient + token.to(tl.int64) * columns + column, sum.to(gradient.dtype.element_ty), mask=here)
            sum = tl.zeros([BLOCK], tl.float32)
            open_start = False


@jit
def add_partial(gradient, tokens, partial, count, entries, columns, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """A program has the segment that begins in its piece and reaches over its end, if there is one."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    after = (piece + 1) * PIECE
    token = _token(tokens, after, count)
    begins_before = _token(tokens, piece * PIECE - 1, count) == token
    if (_token(tokens, after - 1, count) != token) | begins_before | (token < 0) | (token >= entries):
        return
    sum = tl.load(partial + (piece.to(tl.int64) * 2 + 1) * columns + column, mask=here)
    while _token(tokens, after, count) == token:
        sum += tl.load(partial + (after // PIECE).to(tl.int64) * 2 * columns + column, mask=here)
        after += PIECE
    tl.store(gradient + token.to(tl.int64) * columns + column, sum.to(gradient.dtype.element_ty), mask=here)


# ---- the operations --------------------------------------------------------------------------------------------------


def embedding(place, *, table, tokens, rows):
    """rows = table[tokens]. A tile has four pieces of 16 bytes for each of 128 threads; its width divides that of the
    table where it can, so that no thread is idle."""
    columns, tile = table.shape[1], 8192 // table.element_size()
    block = min(max(columns & -columns, 512 // table.element_size()), 1024, triton.next_power_of_2(columns))
    grid = triton.cdiv(len(tokens), tile // block), triton.cdiv(columns, block)
    look_up[grid](table, tokens, rows, len(tokens), *table.shape, ROWS=tile // block, BLOCK=block, num_warps=4)


def embedding_backward(place, *, gradient, rows, tokens, places, partial):
    """The gradient of the table, which comes as zeros. Programs are of one warp: pieces are few, columns make more."""
    (entries, columns), count = gradient.shape, len(tokens)
    block = min(512 // gradient.element_size(), triton.next_power_of_2(columns))
    grid = triton.cdiv(count, PIECE), triton.cdiv(columns, block)
    options = {"PIECE": PIECE, "BLOCK": block, "num_warps": 1}
    sum_pieces[grid](gradient, rows, tokens, places, partial, count, entries, columns, STAGES=8, **options)
    if grid[0] > 1:
        add_partial[grid](gradient, tokens, partial, count, entries, columns, **options)
