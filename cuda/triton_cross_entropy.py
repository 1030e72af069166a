"""Cross-entropy of rows of logits and its gradient in Triton: what fused/cross_entropy.cu does.

One program has one row and walks over it in blocks; a lane has 16 bytes of each block and keeps its own largest logit
and sum, so nothing crosses threads before the row's end. Triton gives: the layout of loads and stores, the reductions
over warps and their barriers. It takes: shared memory that outlives an operation. The version in CUDA C++ keeps the row
there for the gradient; this one reads it twice, the second time from L2 while the rows at work fit there: 2 E bytes
read and E written a logit, where that one reads E. Without a gradient both read E.

Rows may start anywhere: a block starts at the multiple of 16 bytes before, and the first and the last block are masked.
Refused with a ValueError: rows with gaps inside. A target outside of the vocabulary gives a loss and a row of NaN.
"""

import torch
import triton
import triton.language as tl

from cuda.triton_compat import jit

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def reference(logits, targets, scales=(1.0, 0.0), softcap=0.0, ignore_index=-100):
    """The loss of each row, and the gradient of sum(scales[0] * loss + scales[1] * log Z squared) over the rows."""
    logits = logits.detach().requires_grad_()
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = torch.nn.functional.cross_entropy(capped, targets, ignore_index=ignore_index, reduction="none")
    total = scales[0] * losses.sum() + scales[1] * capped.logsumexp(1).square().sum()
    return losses.detach(), torch.autograd.grad(total, logits)[0]


# ---- a block of a row ------------------------------------------------------------------------------------------------
#
# A block is a tile (LANES, VECTOR), VECTOR elements to 16 bytes, so that a reduction along axis 1 stays in a thread.
# Element 0 of the row's first block lies `shift` elements before the row.


@jit
def _block(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@jit
def _load(row, element, shift, end, EDGE: tl.constexpr):
    """float32; what is not in the row is minus infinity."""
    if EDGE:
        return tl.load(row + element, mask=(element >= shift) & (element < end), other=float("-inf")).to(tl.float32)
    return tl.load(row + element).to(tl.float32)


@jit
def _add(most, sum, row, element, shift, end, softcap, CAPPED: tl.constexpr, EDGE: tl.constexpr):
    """A block joins the largest logit and the sum of exp(logit - largest) of each lane."""
    x = _load(row, element, shift, end, EDGE)
    if CAPPED:
        x = softcap * _tanh(x / softcap)
        if EDGE:
            x = tl.where((element >= shift) & (element < end), x, float("-inf"))
    top = tl.maximum(most, tl.max(x, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # minus infinity less itself would be NaN
    sum *= tl.exp2((most - base) * LOG2_E)
    return top, sum + tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), 1)


@jit
def _write(row, gradient, element, shift, end, target, most, factor, at_target, softcap,
           CAPPED: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """gradient = factor * exp(logit - most) - at_target * [element is the target]."""
    x = _load(row, element, shift, end, EDGE)
    slope = 1.0
    if CAPPED:
        t = _tanh(x / softcap)
        x = softcap * t
        slope = 1.0 - t * t
    d = factor * tl.exp2((x - most) * LOG2_E) - tl.where(element - shift == target, at_target, 0.0)
    d = (d * slope).to(gradient.dtype.element_ty)
    if EDGE:
        tl.store(gradient + element, d, mask=(element >= shift) & (element < end))
    else:
        tl.store(gradient + element, d)


@jit
def _factors(scales, target, ignored, columns, most, sum):
    """Of the gradient: factor and at_target; and the target, -1 where it is in no column."""
    scale, square = 1.0, 0.0
    if scales is not None:
        scale, square = tl.load(scales), tl.load(scales + 1)
    outside = (target < 0) | (target >= columns)
    at_target = tl.where(ignored, 0.0, tl.where(outside, float("nan"), scale))
    log_z = most + tl.log2(sum) * LN_2
    factor = (at_target + tl.where(square == 0.0, 0.0, 2.0 * square * log_z)) / sum
    return factor, at_target, tl.where(outside, -1, target).to(tl.int32)


@jit
def _aligned(start, VECTOR: tl.constexpr):
    """The multiple of VECTOR at or before; the compiler sees that it is one."""
    return start // VECTOR * VECTOR


# ---- kernels ---------------------------------------------------------------------------------------------------------


@jit
def one_pass(
    logits, targets, gradient, loss, statistics, scales, logits_stride, gradient_stride, columns, softcap, ignore_index,
    SKIP_IGNORED: tl.constexpr, CAPPED: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    ignored = target == ignore_index
    start = i * logits_stride
    shift = (start % VECTOR).to(tl.int32)
    row, end = logits + _aligned(start, VECTOR), shift + columns
    last = (end - 1) // (LANES * VECTOR) * (LANES * VECTOR)  # where the last block starts
    edges = tl.where(last > 0, 2, 1)
    if gradient is not None:
        start = i * gradient_stride
        # The same shift lets both rows count from a multiple of 16 bytes on.
        d_row = gradient + (_aligned(start, VECTOR) if SAME else start - shift)
    if SKIP_IGNORED and ignored:
        if loss is not None:
            tl.store(loss + i, 0.0)
        if statistics is not None:
            tl.store(statistics + 2 * i, 0.0)
            tl.store(statistics + 2 * i + 1, 1.0)
        if gradient is not None:
            zeros = tl.zeros([LANES, VECTOR], gradient.dtype.element_ty)
            for first in range(0, end, LANES * VECTOR):
                element = _block(first, LANES, VECTOR)
                tl.store(d_row + element, zeros, mask=(element >= shift) & (element < end))
        return
    # Read before anything is written: the gradient may lie over the logits.
    inside = (target >= 0) & (target < columns)
    at = tl.load(logits + i * logits_stride + target, mask=inside, other=float("nan")).to(tl.float32)
    if CAPPED:
        at = softcap * _tanh(at / softcap)
    most = tl.full([LANES], float("-inf"), tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    for first in range(LANES * VECTOR, last, LANES * VECTOR):
        most, sum = _add(most, sum, row, _block(first, LANES, VECTOR), shift, end, softcap, CAPPED, False)
    for edge in range(0, edges):
        most, sum = _add(most, sum, row, _block(edge * last, LANES, VECTOR), shift, end, softcap, CAPPED, True)
    top = tl.max(most, 0)
    sum = tl.sum(sum * tl.exp2((most - tl.where(top == float("-inf"), 0.0, top)) * LOG2_E), 0)
    if loss is not None:
        tl.store(loss + i, tl.where(ignored, 0.0, tl.log2(sum) * LN_2 - (at - top)))
    if statistics is not None:
        tl.store(statistics + 2 * i, top)
        tl.store(statistics + 2 * i + 1, sum)
    if gradient is not None:
        factor, at_target, column = _factors(scales, target, ignored, columns, top, sum)
        for edge in range(0, edges):  # the last block is the one that was read last
            _write(row, d_row, _block(last - edge * last, LANES, VECTOR), shift, end, column, top, factor, at_target,
                   softcap, CAPPED, True)  # fmt: skip
        for first in range(LANES * VECTOR, last, LANES * VECTOR):
            _write(row, d_row, _block(first, LANES, VECTOR), shift, end, column, top, factor, at_target, softcap,
                   CAPPED, False)  # fmt: skip


@jit
def gradient_alone(
    logits, targets, gradient, statistics, scales, logits_stride, gradient_stride, columns, blocks, softcap,
    ignore_index, SKIP_IGNORED: tl.constexpr, CAPPED: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """A program has a block: neighbours have neighbouring blocks of a row."""
    i = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    target = tl.load(targets + i)
    ignored = target == ignore_index
    start = i * logits_stride
    shift = (start % VECTOR).to(tl.int32)
    row, end = logits + _aligned(start, VECTOR), shift + columns
    start = i * gradient_stride
    d_row = gradient + (_aligned(start, VECTOR) if SAME else start - shift)
    element = _block(block * (LANES * VECTOR), LANES, VECTOR)
    if SKIP_IGNORED and ignored:
        zeros = tl.zeros([LANES, VECTOR], gradient.dtype.element_ty)
        tl.store(d_row + element, zeros, mask=(element >= shift) & (element < end))
        return
    most, sum = tl.load(statistics + 2 * i), tl.load(statistics + 2 * i + 1)
    factor, at_target, column = _factors(scales, target, ignored, columns, most, sum)
    if (block == 0) | ((block + 1) * (LANES * VECTOR) > end):
        _write(row, d_row, element, shift, end, column, most, factor, at_target, softcap, CAPPED, True)
    else:
        _write(row, d_row, element, shift, end, column, most, factor, at_target, softcap, CAPPED, False)


# ---- the operations --------------------------------------------------------------------------------------------------


def _stride(name: str, x) -> int:
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise ValueError(
            f"{name} has strides {x.stride()}: expected rows without gaps inside, one after the other; "
            f"call .contiguous()"
        )
    return x.stride(0) if rows > 1 else columns


def _strides(logits, gradient, vector: int):
    """Of the rows; and whether logits and gradient reach a multiple of 16 bytes at the same columns."""
    stride = _stride("logits", logits)
    other = stride if gradient is None else _stride("gradient", gradient)
    return stride, other, (stride - other) % vector == 0


def _shape_of_block(logits, most_warps: int):
    """LANES, VECTOR, warps: two lanes a thread, of 16 bytes each. So threads need fewer than 64 registers, two rows or
    more are at work on a multiprocessor, and 32 KiB or more in flight, which hides the memory's latency. Blocks of
    twice the size spill. Sixteen warps for a long row: few rows at work are what finds their second reading in L2."""
    vector = 16 // logits.element_size()
    lanes = triton.next_power_of_2(triton.cdiv(logits.shape[1] + vector - 1, vector))
    lanes = min(max(lanes, 64), most_warps * 64)
    return lanes, vector, lanes // 64


def cross_entropy(
    place, *, logits, targets, softcap, ignore_index, skip_ignored,
    gradient=None, loss=None, statistics=None, scales=None, shared_bytes=None,
):  # fmt: skip
    """fused/cross_entropy.cu: loss, statistics and gradient of each row, of which any may be None."""
    lanes, vector, warps = _shape_of_block(logits, 16)
    stride, other, same = _strides(logits, gradient, vector)
    one_pass[(logits.shape[0],)](
        logits, targets, gradient, loss, statistics, scales, stride, other, logits.shape[1], softcap, ignore_index,
        SKIP_IGNORED=skip_ignored, CAPPED=softcap > 0, SAME=same, LANES=lanes, VECTOR=vector, num_warps=warps,
    )  # fmt: skip


def cross_entropy_gradient(
    place, *, logits, targets, gradient, statistics, softcap, ignore_index, skip_ignored, scales=None
):
    """The gradient alone, from the statistics of an earlier pass."""
    lanes, vector, warps = _shape_of_block(logits, 8)
    stride, other, same = _strides(logits, gradient, vector)
    blocks = triton.cdiv(logits.shape[1] + vector - 1, lanes * vector)
    gradient_alone[(logits.shape[0] * blocks,)](
        logits, targets, gradient, statistics, scales, stride, other, logits.shape[1], blocks, softcap, ignore_index,
        SKIP_IGNORED=skip_ignored, CAPPED=softcap > 0, SAME=same, LANES=lanes, VECTOR=vector, num_warps=warps,
    )  # fmt: skip
