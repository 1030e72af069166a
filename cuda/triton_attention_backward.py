"""Flash attention, backward: the operation attention_backward in Triton, by two kernels.

queries_kernel: a program owns a tile of queries, computes delta = sum(o d_o) - d_lse, and adds up dq over the keys.
keys_kernel: a program owns a tile of keys, and adds up dk and dv over the queries of all heads that read them.
No two programs add to one number, so there are no atomics, no float32 workspace, and the same bits every time; the
price against the ladder in CUDA C++ is that scores and dp are multiplied twice, 14 T S K FLOP a head and not 10. Heads
wider than 128 have no registers for dk and dv at once: keys_kernel then runs for each, which takes 16.
Refused: what the forward pass refuses. The gradient of a sink is left to attention_ops, which has lse and delta.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_attention_rules import (
    EVERYTHING,
    LOG2E,
    at,
    bias_strides,
    describe,
    elements,
    in_sight,
    lse_strides,
    scaling,
    scored,
    sequence,
    sizes,
    spans_of_keys,
    spans_of_queries,
    strides,
    tile,
)  # fmt: skip
from cuda.triton_attention_rules import reference as forward_reference
from cuda.triton_compat import jit
from cuda.triton_tilings import Tiling, choose, prune

# (tile of queries, tile of keys). The accumulators lie in registers: dq of 128 queries, dk and dv of 128 keys. What is
# left decides how many scores there can be at once.
QUERIES = {
    64: (Tiling(128, 128, warps=8, stages=2), Tiling(128, 64, warps=8, stages=3)),
    128: (Tiling(128, 64, warps=8, stages=2), Tiling(128, 32, warps=8, stages=2)),
    256: (Tiling(128, 32, warps=8, stages=2), Tiling(128, 16, warps=8, stages=2)),
}
KEYS = {
    64: (Tiling(64, 128, warps=8, stages=3), Tiling(32, 128, warps=8, stages=3)),
    128: (Tiling(64, 128, warps=8, stages=2), Tiling(32, 128, warps=8, stages=2), Tiling(64, 64, warps=4, stages=2)),
    256: (Tiling(32, 128, warps=8, stages=2), Tiling(16, 128, warps=8, stages=2)),
}
SMALL = {  # without wgmma, and for less memory
    "queries": (Tiling(64, 32, warps=8, stages=2), Tiling(32, 32, warps=8, stages=1)),
    "keys": (Tiling(32, 64, warps=8, stages=2), Tiling(16, 64, warps=8, stages=1)),
}
FLOAT32 = (Tiling(32, 32, warps=8, stages=1), Tiling(16, 16, warps=8, stages=1))  # each thread holds whole operands


def reference(d_o: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **rules) -> tuple[Tensor, ...]:
    """dq, dk, dv: what torch makes of the definition."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(forward_reference(*leaves, **rules), leaves, (d_o, d_lse))


def tilings(
    kernel: str, kind: str, element_size: int, width: int, cap: bool = False, bias: bool = False, grouped: bool = False
) -> list[Tiling]:
    """Of the kernel "queries" or "keys": those that fit, the best guess first. The loop over the heads of a group costs
    keys_kernel registers too."""
    own = QUERIES if kernel == "queries" else KEYS
    candidates = SMALL[kernel] if kind == "sm_80" else (*own[max(64, width)], *SMALL[kernel])
    if element_size == 4 and kind != "interpreter":
        candidates = FLOAT32

    def shared(t: Tiling) -> int:
        kept, walked = (t.block_m, t.block_n) if kernel == "queries" else (t.block_n, t.block_m)
        ring = (t.stages - 1) * 4 * t.block_m * t.block_n if bias else 0
        return 2 * element_size * width * (kept + t.stages * walked) + ring

    def registers(t: Tiling) -> int:
        sums = t.block_m if kernel == "queries" else t.block_n * (2 if width <= 128 else 1)
        loop = 8 if grouped and kernel == "keys" else 0
        return int((sums * width + t.block_m * t.block_n * (2 + cap + bias)) / (32 * t.warps)) + 56 + loop

    return prune(candidates, kind, shared=shared, registers=registers)


# ---- dq --------------------------------------------------------------------------------------------------------------


@jit
def add_keys(
    dq, q, d_o, lse, delta, k, v, bias, first, batch, k_head, first_key, begin, end, bias_row, sight, scaling,
    MASKED: tl.constexpr, CAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq over scale, and over the tiles of keys from begin to end."""
    rows = first + tl.arange(0, M)
    for n in tl.range(begin, end, N):
        k_tile = tile(k, batch, k_head, first_key + n, N, WIDTH)
        s, slope = scored(tl.dot(q, k_tile.T, input_precision="ieee"), scaling, CAP)
        key = n + tl.arange(0, N)
        if bias is not None:
            inside = (rows < sight[0])[:, None] & (key < sight[1])[None, :]
            s += tl.load(bias + elements(rows, key, bias_row), mask=inside, other=0.0) * LOG2E
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            p = tl.where(in_sight(rows[:, None], key[None, :], sight), p, 0.0)
        dp = tl.dot(d_o, tile(v, batch, k_head, first_key + n, N, WIDTH).T, input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@jit
def queries_kernel(
    q, k, v, d_o, o, lse, d_lse, delta, dq, bias, starts_q, starts_k, o_strides, dq_strides, lse_strides, bias_strides,
    heads, group, queries, keys, left, right, scale, scaling, K: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """delta, and dq."""
    head, b = tl.program_id(0) % heads, tl.program_id(0) // heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # when causal the longest go first
    queries, keys, first_query, first_key, batch = sequence(starts_q, starts_k, b, queries, keys)
    if first >= queries:
        return
    sight = (queries, keys, left, right)
    begin, full, edge, end = spans_of_keys(first, tl.minimum(first + M, queries) - 1, sight, N)
    if bias is not None:
        bias = at(bias, bias_strides, b, head)
    rows = first_query + first + tl.arange(0, M)
    here = rows < first_query + queries
    columns = tl.arange(0, WIDTH)
    inside = here[:, None] & (columns < K)[None, :]

    upstream = tile(d_o, batch, head, first_query + first, M, WIDTH)
    out = tl.load(at(o, o_strides, batch, head) + elements(rows, columns, o_strides[2]), mask=inside, other=0.0)
    own_delta = tl.sum(out.to(tl.float32) * upstream.to(tl.float32), 1)
    own_lse = tl.load(at(lse, lse_strides, batch, head) + rows, mask=here, other=float("-inf"))
    if d_lse is not None:
        own_delta -= tl.load(at(d_lse, lse_strides, batch, head) + rows, mask=here, other=0.0)
    # A row that sees nothing gets an lse that makes every p 0, and no delta: d_lse of -inf means nothing.
    dead = own_lse == float("-inf")
    own_lse = tl.where(dead, float("inf"), own_lse * LOG2E)
    own_delta = tl.where(dead, 0.0, own_delta)
    tl.store(at(delta, lse_strides, batch, head) + rows, own_delta, mask=here)

    q_tile = tile(q, batch, head, first_query + first, M, WIDTH)
    acc = tl.zeros([M, WIDTH], tl.float32)
    if WINDOW:
        acc = add_keys(
            acc, q_tile, upstream, own_lse, own_delta, k, v, bias, first, batch, head // group, first_key, begin, full,
            bias_strides[2], sight, scaling, True, CAP, M, N, WIDTH,
        )  # fmt: skip
    acc = add_keys(
        acc, q_tile, upstream, own_lse, own_delta, k, v, bias, first, batch, head // group, first_key, full, edge,
        bias_strides[2], sight, scaling, False, CAP, M, N, WIDTH,
    )  # fmt: skip
    acc = add_keys(
        acc, q_tile, upstream, own_lse, own_delta, k, v, bias, first, batch, head // group, first_key, edge, end,
        bias_strides[2], sight, scaling, True, CAP, M, N, WIDTH,
    )  # fmt: skip
    dq = at(dq, dq_strides, batch, head) + elements(rows, columns, dq_strides[2])
    tl.store(dq, (acc * scale).to(dq.dtype.element_ty), mask=inside)


# ---- dk and dv -------------------------------------------------------------------------------------------------------


@jit
def add_queries(
    dk, dv, k, v, q, d_o, lse, delta, bias, first, batch, head, first_query, begin, end, bias_row, sight, scaling,
    MASKED: tl.constexpr, CAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr,
):  # fmt: skip
    """dk over scale and dv, over the tiles of one head's queries from begin to end. Scores are transposed: p' and ds'
    are then left operands of their products, which wgmma takes from registers. Keys beyond the last one are rows of
    their own, which nobody stores; queries beyond it get an lse that makes their p 0."""
    key = first + tl.arange(0, N)
    for m in tl.range(begin, end, M):
        rows = m + tl.arange(0, M)
        here = rows < sight[0]
        q_tile = tile(q, batch, head, first_query + m, M, WIDTH)
        s, slope = scored(tl.dot(k, q_tile.T, input_precision="ieee"), scaling, CAP)
        if bias is not None:
            inside = (key < sight[1])[:, None] & here[None, :]
            row_bias = bias + rows.to(tl.int64) * bias_row
            s += tl.load(row_bias[None, :] + key[:, None], mask=inside, other=0.0) * LOG2E
        row_lse = tl.load(lse + rows, mask=here, other=float("-inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
        p = tl.exp2(s - row_lse[None, :])
        if MASKED:
            p = tl.where(in_sight(rows[None, :], key[:, None], sight), p, 0.0)
        upstream = tile(d_o, batch, head, first_query + m, M, WIDTH)
        if DV:
            dv = tl.dot(p.to(upstream.dtype), upstream, dv, input_precision="ieee")
        if DK:
            dp = tl.dot(v, upstream.T, input_precision="ieee")
            ds = p * (dp - tl.load(delta + rows, mask=here, other=0.0)[None, :]) * slope
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@jit
def keys_kernel(
    q, k, v, d_o, lse, delta, dk, dv, bias, starts_q, starts_k, dk_strides, dv_strides, lse_strides, bias_strides,
    kv_heads, group, queries, keys, left, right, scale, scaling, K: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    k_head, b = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    first = tl.program_id(1) * N  # when causal the first keys are seen by most queries, and go first
    queries, keys, first_query, first_key, batch = sequence(starts_q, starts_k, b, queries, keys)
    if first >= keys:
        return
    sight = (queries, keys, left, right)
    begin, full, edge, end = spans_of_queries(first, tl.minimum(first + N, keys) - 1, sight, M)
    if bias is not None:  # one loop, which masks all: three with a bias have no registers
        full = tl.maximum(end, begin)
    elif not WINDOW:  # the last tile needs no mask either
        edge = tl.maximum(end, full)
    k_tile = tile(k, batch, k_head, first_key + first, N, WIDTH)
    v_tile = tile(v, batch, k_head, first_key + first, N, WIDTH)
    dk_acc = tl.zeros([N, WIDTH], tl.float32)
    dv_acc = tl.zeros([N, WIDTH], tl.float32)
    for i in tl.range(0, group):
        head = k_head * group + i
        lse_head = at(lse, lse_strides, batch, head) + first_query
        delta_head = at(delta, lse_strides, batch, head) + first_query
        bias_head = None
        if bias is not None:
            bias_head = at(bias, bias_strides, b, head)
        if CAUSAL or bias is not None:
            dk_acc, dv_acc = add_queries(
                dk_acc, dv_acc, k_tile, v_tile, q, d_o, lse_head, delta_head, bias_head, first, batch, head,
                first_query, begin, full, bias_strides[2], sight, scaling, True, CAP, M, N, WIDTH, DK, DV,
            )  # fmt: skip
        if bias is None:
            dk_acc, dv_acc = add_queries(
                dk_acc, dv_acc, k_tile, v_tile, q, d_o, lse_head, delta_head, None, first, batch, head, first_query,
                full, edge, 0, sight, scaling, False, CAP, M, N, WIDTH, DK, DV,
            )  # fmt: skip
        if WINDOW and bias is None:
            dk_acc, dv_acc = add_queries(
                dk_acc, dv_acc, k_tile, v_tile, q, d_o, lse_head, delta_head, None, first, batch, head, first_query,
                edge, end, 0, sight, scaling, True, CAP, M, N, WIDTH, DK, DV,
            )  # fmt: skip
    rows = first_key + first + tl.arange(0, N)
    columns = tl.arange(0, WIDTH)
    inside = (rows < first_key + keys)[:, None] & (columns < K)[None, :]
    if DK:
        dk = at(dk, dk_strides, batch, k_head) + elements(rows, columns, dk_strides[2])
        tl.store(dk, (dk_acc * scale).to(dk.dtype.element_ty), mask=inside)
    if DV:
        dv = at(dv, dv_strides, batch, k_head) + elements(rows, columns, dv_strides[2])
        tl.store(dv, dv_acc.to(dv.dtype.element_ty), mask=inside)


def attention_backward(
    place, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    delta: Tensor, scale: float, d_lse: Tensor | None = None, sink: Tensor | None = None, bias: Tensor | None = None,
    starts_q: Tensor | None = None, starts_k: Tensor | None = None, longest_q: int | None = None,
    longest_k: int | None = None, softcap: float = 0.0, left: int = EVERYTHING, right: int = EVERYTHING,
    deterministic: bool = True, step: str | None = None, dq_sum: Tensor | None = None, turns: Tensor | None = None,
    tiling_queries: Tiling | None = None, tiling_keys: Tiling | None = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, and delta, which lies as lse does. Ignored: step, dq_sum, turns, deterministic, which these
    kernels always are, and sink, which is in lse."""
    numbers = scaling(scale, softcap)
    size = sizes(q, k, starts_q, longest_q, longest_k)
    key = (str(q.dtype).removeprefix("torch."), q.shape[-1], right < size.queries)

    def prepare(kernel: str, given: Tiling | None):
        rules = softcap > 0, bias is not None, size.group > 1
        candidates = tilings(kernel, place.kind, q.element_size(), size.width, *rules)
        t = given or choose("attention_backward", place.kind, (kernel, *key), candidates)
        rows = ((q, t.block_m), (k, t.block_n), (v, t.block_n), (d_o, t.block_m))
        options = {
            "K": q.shape[-1], "WIDTH": size.width, "M": t.block_m, "N": t.block_n, "CAP": softcap > 0,
            "WINDOW": left < size.keys, "num_warps": t.warps, "num_stages": t.stages,
        }  # fmt: skip
        return t, [describe(x, n, size.width) for x, n in rows], options

    t, descriptors, options = prepare("queries", tiling_queries)
    queries_kernel[(size.sequences * size.heads, triton.cdiv(size.queries, t.block_m))](
        *descriptors, o, lse, d_lse, delta, dq, bias, starts_q, starts_k, strides(o), strides(dq), lse_strides(lse),
        bias_strides(bias), size.heads, size.group, size.queries, size.keys, left, right, scale, numbers, **options,
    )  # fmt: skip
    t, descriptors, options = prepare("keys", tiling_keys)
    for DK, DV in ((True, True),) if size.width <= 128 else ((True, False), (False, True)):
        keys_kernel[(size.sequences * size.kv_heads, triton.cdiv(size.keys, t.block_n))](
            *descriptors, lse, delta, dk, dv, bias, starts_q, starts_k, strides(dk), strides(dv), lse_strides(lse),
            bias_strides(bias), size.kv_heads, size.group, size.queries, size.keys, left, right, scale, numbers,
            CAUSAL=right < size.queries, DK=DK, DV=DV, **options,
        )  # fmt: skip
