"""The norm of all gradients together, and what clips them to a largest norm, in Triton: what fused/grad_norm.cu does.

A program has a chunk of 8192 elements, all of them asked for at once, and leaves its sum of squares; one program more
adds these up. Sums are float32, in an order that depends on sizes and addresses alone, never on the schedule.

Triton gives: the tree of a sum over a block, with its shuffles and its barrier, in one word. It takes: a last chunk, or
one that starts off a multiple of 16 bytes, goes by elements. NaN and infinity pass through as in torch.
"""

import torch
import triton.language as tl

from cuda.triton_compat import jit, reaching
from cuda.triton_multi_tensor import BF16, CHUNK, F32, load, pointer

TOTAL = 4096  # sums that the last program adds at once


def reference(gradients, max_norm):
    """The norm and the factor that clips it."""
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1)


@jit
def _chunk(gradients, chunks):
    """Address, type, first element and end of a program's chunk, and whether it may be read 16 bytes at a time."""
    chunk = chunks + 2 * tl.program_id(0)
    row = gradients + tl.load(chunk).to(tl.int64) * 3
    address, count, kind = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    return address, kind, first, count, (address % 16 == 0) & (first + CHUNK <= count)


@jit
def chunk_squares(gradients, chunks, sums):
    address, kind, first, count, whole = _chunk(gradients, chunks)
    i = first + tl.arange(0, CHUNK)
    x = load(address, kind, i, None, True) if whole else load(address, kind, i, i < count, False)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, 0))


@jit
def total_norm(sums, count, max_norm, norm, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        sum += tl.load(sums + first + i, mask=first + i < count, other=0.0)
    root = tl.sqrt_rn(tl.sum(sum, 0))
    wanted = tl.div_rn(max_norm, root + 1e-6)
    tl.store(norm, root)
    tl.store(factor, tl.where(wanted > 1.0, 1.0, wanted))  # NaN stays


@jit
def _scale(address, dtype: tl.constexpr, first, whole, end, by, BLOCK: tl.constexpr):
    """Elements first to end, of which those before `whole` are read 16 bytes at a time."""
    for start in range(first, whole, BLOCK):
        p = pointer(address, dtype, True) + start + tl.arange(0, BLOCK)
        tl.store(p, (by * tl.load(p).to(tl.float32)).to(dtype))
    for start in range(whole, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        p = pointer(address, dtype, False) + i
        tl.store(p, (by * tl.load(p, mask=i < end).to(tl.float32)).to(dtype), mask=i < end)


@jit
def chunk_scale(gradients, chunks, factor):
    by = tl.load(factor)
    if by == 1.0:
        return
    address, kind, first, count, aligned = _chunk(gradients, chunks)
    end = tl.minimum(count, first + CHUNK)
    whole = tl.where(aligned, end, first)
    # Blocks of two sizes: of one size, loads of both types get one layout, and stores of float32 another.
    if kind == F32:
        _scale(address, tl.float32, first, whole, end, by, 2048)
    elif kind == BF16:
        _scale(address, tl.bfloat16, first, whole, end, by, 4096)
    else:
        _scale(address, tl.float16, first, whole, end, by, 4096)


def grad_norm(place, *, tensors, chunks, sums, norm, factor, max_norm, memory=None):
    """fused/grad_norm.cu: a row of `tensors` has a gradient's address, count and type."""
    with reaching(memory):
        chunk_squares[(len(chunks),)](tensors, chunks, sums, num_warps=8)
    total_norm[(1,)](sums, len(chunks), max_norm, norm, factor, BLOCK=TOTAL, num_warps=16)


def grad_scale(place, *, tensors, chunks, factor, memory=None):
    """Every gradient times the factor, which where it is 1 touches nothing."""
    with reaching(memory):
        chunk_scale[(len(chunks),)](tensors, chunks, factor, num_warps=8)
