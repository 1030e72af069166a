"""What the kernels of attention in Triton share: who sees whom, what is done to scores, how tensors become descriptors.

The definition is that of attention/attention.h, in torch below; the rules are those of attention/rules.cuh. Scores are
in units of log2: exp(s - lse) is then one fused multiply-add and one exp2. Tensors come through host-side descriptors,
which are TMA on Hopper: rows and columns beyond a tensor are read as zeros, and so head widths are padded to a power of
two, as a block in Triton has to be. Refused with a ValueError: a scale that is not positive and finite.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import TensorDescriptor, jit

EVERYTHING = 1 << 30  # keys to the left or right, without a limit
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def reference(q, k, v, *, scale, softcap=0.0, left=EVERYTHING, right=EVERYTHING, sink=None, bias=None):
    """o (B, H, T, K) and lse (B, H, T) of q (B, H, T, K), k and v (B, G, S, K)."""
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    s = scale * q @ k.mT
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    distance = torch.arange(S, device=q.device) - torch.arange(T, device=q.device)[:, None] - (S - T)
    s = s.masked_fill((distance < -left) | (distance > right), -math.inf)
    lse = s.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None].to(lse.dtype))
    return (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp() @ v, lse


# ---- inside of kernels -----------------------------------------------------------------------------------------------
# Two tuples go through all of them: sight = (queries, keys, left, right), scaling = (scale, softcap in units of log2,
# scale / softcap). CAP says at compile time whether there is a soft-cap.


@jit
def sequence(starts_q, starts_k, b, queries, keys):
    """Of sequence b: queries, keys, first query and first key among the packed rows, number in the batch of tensors."""
    first_query, first_key, batch = 0, 0, b
    if starts_q is not None:
        first_query, first_key, batch = tl.load(starts_q + b), tl.load(starts_k + b), b * 0
        queries, keys = tl.load(starts_q + b + 1) - first_query, tl.load(starts_k + b + 1) - first_key
    return queries, keys, first_query, first_key, batch


@jit
def tile(descriptor, batch, head, row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return descriptor.load([batch, head, row, 0]).reshape(ROWS, WIDTH)


@jit
def at(x, strides, batch, head):
    """Where the rows of a head begin. In 64 bits: tensors may have more than 2^31 elements."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@jit
def elements(rows, columns, stride):
    """Offsets of a tile."""
    return rows.to(tl.int64)[:, None] * stride + columns[None, :]


@jit
def tanh(x):
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@jit
def scored(product, scaling, CAP: tl.constexpr):
    """The score of a product q . k, and its slope over scale."""
    if CAP:
        t = tanh(product * scaling[2])
        return t * scaling[1], 1 - t * t
    else:
        return product * scaling[0], 1.0


@jit
def in_sight(query, key, sight):
    """Query i stands at key i + keys - queries. Both are tiles that broadcast."""
    queries, keys, left, right = sight
    distance = key - query - (keys - queries)
    return (distance >= -left) & (distance <= right) & (key < keys)


@jit
def spans(first, last, all_first, all_last, limit, BLOCK: tl.constexpr):
    """The tiles that a block walks over, on multiples of BLOCK, as (begin, full, edge, end). Some row of the block sees
    [first, last), every row sees [all_first, all_last): from `full` to `edge` nothing has to be masked."""
    begin = tl.maximum(first, 0) // BLOCK * BLOCK
    end = tl.minimum(last, limit)
    full = (tl.maximum(all_first, begin) + BLOCK - 1) // BLOCK * BLOCK
    full = tl.maximum(tl.minimum(full, end), begin)
    edge = tl.maximum(tl.minimum(all_last, limit), 0) // BLOCK * BLOCK
    return begin, full, tl.maximum(edge, full), end


@jit
def spans_of_keys(first, last, sight, N: tl.constexpr):
    """For the queries from first to last, both included."""
    queries, keys, left, right = sight
    offset = keys - queries
    nearest, farthest = first + offset, last + offset  # the keys where the queries stand
    return spans(nearest - left, farthest + right + 1, farthest - left, nearest + right + 1, keys, N)


@jit
def spans_of_queries(first, last, sight, M: tl.constexpr):
    """For the keys from first to last, both included."""
    queries, keys, left, right = sight
    offset = keys - queries
    nearest, farthest = first - offset, last - offset
    return spans(nearest - right, farthest + left + 1, farthest - right, nearest + left + 1, queries, M)


# ---- launches --------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a problem: `sequences` are packed or a batch, `queries` and `keys` those of the longest."""

    sequences: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int  # padded

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def sizes(q: Tensor, k: Tensor, starts_q: Tensor | None, longest_q: int | None, longest_k: int | None) -> Sizes:
    heads, kv_heads, width = q.shape[1], k.shape[1], triton.next_power_of_2(q.shape[-1])
    if starts_q is None:
        return Sizes(q.shape[0], heads, kv_heads, q.shape[2], k.shape[2], width)
    return Sizes(starts_q.numel() - 1, heads, kv_heads, longest_q, longest_k, width)


def scaling(scale: float, softcap: float) -> tuple[float, float, float]:
    if not (0 < scale < math.inf):
        raise ValueError(f"scale: expected a positive finite number, not {scale!r}")
    return scale * LOG2E.value, softcap * LOG2E.value, scale / softcap if softcap else 0.0


def describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of `rows` rows of a head. A packed tensor (rows, heads, K) is one sequence (1, heads, rows, K). What stands
    alone in its dimension may have any stride; TMA wants a multiple of 16 bytes there too."""
    x = x if x.ndim == 4 else x.transpose(0, 1)[None]
    outer = [stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*outer, 1], [1, 1, rows, width])


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and row."""
    return x.stride()[:3] if x.ndim == 4 else (0, x.stride(1), x.stride(0))


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of batch and head."""
    return lse.stride()[:2] if lse.ndim == 3 else (0, lse.stride(0))


def bias_strides(bias: Tensor | None) -> tuple[int, int, int]:
    """Of batch, head and row: 0 where all share one."""
    if bias is None:
        return 0, 0, 0
    return tuple(stride if size > 1 else 0 for size, stride in zip(bias.shape[:3], bias.stride()[:3], strict=True))
