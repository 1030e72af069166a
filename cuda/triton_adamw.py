"""A step of AdamW (Loshchilov and Hutter 2019) for all tensors of a parameter group in one launch, in Triton: what
fused/adamw.cu does, with its formula and its table. 16 bytes are read and 12 written for a parameter of float32.

Triton gives: a step on blocks that reads like the formula. It takes: what is known of pointers, since these come out of
a table; `multiple_of` says it again. Blocks that are not whole, or start off a multiple of 16 bytes, go by elements.
"""

import torch
import triton.language as tl

from cuda.triton_compat import jit, reaching
from cuda.triton_multi_tensor import CHUNK, F32, load, store

BLOCK = 1024  # 16 bytes of each float32 array for each of 256 threads: 64 bytes a thread in flight


def reference(p, g, m, v, lr, beta1, beta2, eps, weight_decay, count):
    """(p, m, v) after step `count`, the first of which is 1."""
    m, v = torch.lerp(m, g, 1 - beta1), torch.lerp(v, g.square(), 1 - beta2)
    root = v.sqrt() / (1 - beta2**count) ** 0.5
    return p * (1 - lr * weight_decay) - lr / (1 - beta1**count) * m / (root + eps), m, v


@jit
def _step(
    p, g, m, v, master, kind_p, kind_g, factor, decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps,
    i, mask, ALIGNED: tl.constexpr,
):  # fmt: skip
    exact = tl.where(master != 0, master, p)  # float32
    old = load(exact, F32, i, mask, ALIGNED)
    moment = load(m, F32, i, mask, ALIGNED)
    square = load(v, F32, i, mask, ALIGNED)
    slope = factor * load(g, kind_g, i, mask, ALIGNED)  # the last: the branches of its type wait for it
    moment += beta1_rest * (slope - moment)
    square = beta2 * square + beta2_rest * slope * slope
    new = decay * old - step * moment / (tl.sqrt(square) * root_inverse + eps)
    store(exact, F32, i, new, mask, ALIGNED)
    store(m, F32, i, moment, mask, ALIGNED)
    store(v, F32, i, square, mask, ALIGNED)
    if master != 0:
        store(p, kind_p, i, new, mask, ALIGNED)


@jit
def adamw_chunks(
    tensors, chunks, factor, decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps, BLOCK: tl.constexpr
):
    chunk = chunks + 2 * tl.program_id(0)
    row = tensors + tl.load(chunk).to(tl.int64) * 8
    p, g, m, v, master = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    count, kind_p, kind_g = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor)
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    end = tl.minimum(count, first + CHUNK)
    aligned = (p | g | m | v | master) % 16 == 0
    whole = tl.where(aligned, first + (end - first) // BLOCK * BLOCK, first)
    for start in range(first, whole, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _step(p, g, m, v, master, kind_p, kind_g, scale, decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps,
              i, None, True)  # fmt: skip
    for start in range(whole, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _step(p, g, m, v, master, kind_p, kind_g, scale, decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps,
              i, i < end, False)  # fmt: skip


def adamw(
    place, *, tensors, chunks, decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps, factor=None, memory=None
):
    """fused/adamw.cu: a row of `tensors` has the addresses of p, g, m, v and the float32 copy, the count, two types."""
    numbers = decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps
    with reaching(memory):
        adamw_chunks[(len(chunks),)](tensors, chunks, factor, *numbers, BLOCK=BLOCK, num_warps=8)
